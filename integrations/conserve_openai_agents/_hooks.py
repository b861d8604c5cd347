"""What openai-agents knows about a run but does not publish; each use is held by a test that says what to do instead.

Three private hooks are used (openai-agents 0.24): `Model._supports_default_prompt_cache_key`, overridden by the
models, `Model._cleanup_on_run_end`, overridden too, and `agents.models._run_context`, read here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["current_run_owner"]

try:
    from agents.models._run_context import get_model_run_owner as _read_owner
except ImportError:  # another release: leases then end by their time, and nothing else changes
    _read: Callable[[], object | None] | None = None
else:
    _read = _read_owner

READS_OWNER: Final = _read is not None
"""Whether this release of openai-agents tells which run a model call belongs to."""


def current_run_owner() -> object | None:
    """Return the object that stands for the run around this model call; the same is given to `_cleanup_on_run_end`."""
    return None if _read is None else _read()
