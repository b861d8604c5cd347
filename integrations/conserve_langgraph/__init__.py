"""LangChain and LangGraph on ConServe: a chat model and graph node whose `thread_id` is the leased conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import langchain  # noqa: F401
    import langchain_openai  # noqa: F401
    import langgraph  # noqa: F401
except ImportError as missing:
    raise ImportError("conserve_langgraph needs LangGraph: pip install 'conserve-sdk[langgraph]'") from missing

from conserve_langgraph.callbacks import ConServeCallbackHandler
from conserve_langgraph.chat import ChatConServe, ConServeChat

if TYPE_CHECKING:
    from conserve_langgraph.middleware import ConServeMiddleware

__all__ = ["ChatConServe", "ConServeCallbackHandler", "ConServeChat", "ConServeMiddleware"]


def __getattr__(name: str) -> Any:
    """Load the middleware when it is first used: graphs without agents need not wait for `langchain.agents`."""
    if name != "ConServeMiddleware":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from conserve_langgraph.middleware import ConServeMiddleware

    globals()[name] = ConServeMiddleware
    return ConServeMiddleware
