"""Pydantic AI on ConServe: a model whose conversations are leased, and a provider for the other OpenAI models."""

from __future__ import annotations

try:
    import pydantic_ai.models.openai  # noqa: F401
except ImportError as missing:
    raise ImportError("conserve_pydantic_ai needs Pydantic AI: pip install 'conserve-sdk[pydantic-ai]'") from missing

from conserve_pydantic_ai.model import ConServeModel, ConServeProvider

__all__ = ["ConServeModel", "ConServeProvider"]
