"""LangChain and LangGraph on ConServe: a chat model and graph node whose `thread_id` is the leased conversation."""

from __future__ import annotations

try:
    import langchain  # noqa: F401
    import langchain_openai  # noqa: F401
    import langgraph  # noqa: F401
except ImportError as missing:
    raise ImportError("conserve_langgraph needs LangGraph: pip install 'conserve-sdk[langgraph]'") from missing

from conserve_langgraph.callbacks import ConServeCallbackHandler
from conserve_langgraph.chat import ChatConServe, ConServeChat
from conserve_langgraph.middleware import ConServeMiddleware

__all__ = ["ChatConServe", "ConServeCallbackHandler", "ConServeChat", "ConServeMiddleware"]
