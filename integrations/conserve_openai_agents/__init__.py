"""OpenAI Agents SDK on ConServe: models and a model provider whose sessions are leased conversations."""

from __future__ import annotations

try:
    import agents  # noqa: F401
except ImportError as missing:
    raise ImportError("conserve_openai_agents needs the SDK: pip install 'conserve-sdk[openai-agents]'") from missing

from conserve_openai_agents.models import ConServeModel, ConServeModelProvider, ConServeResponsesModel

__all__ = ["ConServeModel", "ConServeModelProvider", "ConServeResponsesModel"]
