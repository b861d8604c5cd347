"""A connector module for vLLM: stock NIXL, except that its progress thread rests between two looks.

NIXL 1.5.1 asks its agent for a progress thread with a delay of 0 (`nixl_cu1x/_api.py`), so each engine burns a
whole core while idle; three engines on a two-core machine then starve each other. Here the thread sleeps
`DELAY_US` between polls, which costs a transfer at most that much.

vLLM loads it by `kv_connector_module_path`; the class keeps the stock name because vLLM compares names. Runs inside
vLLM's process only: nothing else in this package imports it.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["DELAY_US", "find_bindings", "rest_between_polls"]

DELAY_US = 1_000
BINDINGS = ("nixl_cu13._api", "nixl_cu12._api")
STOCK = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"


def rest_between_polls(bindings: Any) -> None:
    """Make every agent's configuration keep `DELAY_US`, whatever NIXL's own Python sets."""
    stock = bindings.nixlAgentConfig

    def set_attribute(config: Any, name: str, value: object) -> None:
        stock.__setattr__(config, name, DELAY_US if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = type(stock)("RestingAgentConfig", (stock,), {"__setattr__": set_attribute})


def find_bindings(names: tuple[str, ...] = BINDINGS) -> Any:
    """NIXL's compiled part, of whichever CUDA version is installed.

    Raises:
        ImportError: none is.
    """
    for name in names:
        try:
            return importlib.import_module(name).nixlBind
        except ImportError:
            continue
    raise ImportError(f"none of {', '.join(names)} is installed: pip install nixl, or start without --quiet-nixl")


def __getattr__(name: str) -> Any:
    """The connector class, made when vLLM asks for it."""
    if name != "NixlConnector":
        raise AttributeError(name)
    stock = importlib.import_module(STOCK).NixlPullConnector
    rest_between_polls(find_bindings())
    made = type(stock)("NixlConnector", (stock,), {"__module__": __name__, "__doc__": "The stock pull connector."})
    globals()[name] = made
    return made
