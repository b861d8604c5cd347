"""The broker: hands out conversation leases over HTTP, journals them, and watches the engines.

It is a shell round `conserve_sdk.core`, which makes every decision. `BrokerServer` runs it, in a process of its own or
inside another one; `BrokerConfig` and `load_config` are its configuration.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conserve_broker.server import BrokerServer
    from conserve_broker.settings import BrokerConfig, ConfigProblem, load_config

__all__ = ["BrokerConfig", "BrokerServer", "ConfigProblem", "load_config"]

_HOMES = {  # loaded when first used: a command that only asks a broker must not wait for the server's imports
    "BrokerConfig": "settings",
    "BrokerServer": "server",
    "ConfigProblem": "settings",
    "load_config": "settings",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module.

    Raises:
        AttributeError: no such name.
        ImportError: the extra is not installed.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as missing:
        raise ImportError(f"{__name__} needs {missing.name}: pip install 'conserve-sdk[broker]'") from missing
