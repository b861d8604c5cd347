"""A connector module for vLLM: stock NIXL, except that its progress thread rests between two looks.

NIXL 1.5.1 asks its agent for a progress thread with a delay of 0 (`nixl_cu1x/_api.py`), so each engine burns a
whole core while idle; three engines on a two-core machine then starve each other. Here the thread sleeps
`DELAY_US` between polls, which costs a transfer at most that much.

vLLM loads it by `kv_connector_module_path`; the class keeps the stock name because vLLM compares names.
"""

import importlib
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector

DELAY_US = 1_000
BINDINGS = ("nixl_cu13._api", "nixl_cu12._api")


def _bindings() -> Any:
    for name in BINDINGS:
        try:
            return importlib.import_module(name).nixlBind
        except ImportError:
            continue
    raise ImportError(f"none of {', '.join(BINDINGS)} is installed; run the installer again")


def _rest_between_polls(bindings: Any) -> None:
    stock = bindings.nixlAgentConfig

    class RestingAgentConfig(stock):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, DELAY_US if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = RestingAgentConfig


_rest_between_polls(_bindings())


class NixlConnector(NixlPullConnector):
    """The stock pull connector under its stock name."""
