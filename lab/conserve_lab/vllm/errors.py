"""What can go wrong around a real vLLM on this machine; every message says what to do next."""

from __future__ import annotations

__all__ = ["VllmEngineDiedError", "VllmError", "VllmInstallError", "VllmMissingError", "VllmStartError"]


class VllmError(Exception):
    """Root of this package's errors."""


class VllmMissingError(VllmError):
    """There is no vLLM environment where one was expected."""


class VllmInstallError(VllmError):
    """The vLLM environment could not be made."""


class VllmStartError(VllmError):
    """The model, the launcher or an engine did not come up in its budget."""


class VllmEngineDiedError(VllmError):
    """An engine's process ended although nobody asked for it."""
