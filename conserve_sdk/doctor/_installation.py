"""What is installed on this machine."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Final

from conserve_sdk.doctor._finding import Finding, note, ok
from conserve_sdk.protocol import PROTOCOL_VERSION

__all__ = ["check_installation"]

DISTRIBUTION: Final = "conserve-sdk"

_REQUIREMENT = re.compile(r"""^(?P<name>[A-Za-z0-9._-]+).*;.*extra\s*==\s*['"](?P<extra>[^'"]+)['"]""")


def check_installation() -> Iterator[Finding]:
    """Report versions, and for each extra whether everything it needs is installed."""
    yield ok("python", "installed", f"{platform.python_version()} on {platform.platform()}")
    yield ok(DISTRIBUTION, "installed", metadata.version(DISTRIBUTION))
    yield ok("protocol", "installed", f"version {PROTOCOL_VERSION}")
    for name in ("openai", "httpx2", "pydantic"):
        yield ok(name, "installed", metadata.version(name))
    for extra, names in sorted(_extras().items()):
        missing = sorted({name for name in names if _version(name) is None})
        if missing:
            detail = f"not installed ({', '.join(missing)} missing)"
            yield note(f"extra {extra}", "extra", detail, fix=f"pip install '{DISTRIBUTION}[{extra}]'")
        else:
            yield ok(f"extra {extra}", "extra", "installed")


def _extras() -> dict[str, list[str]]:
    """Requirements of each extra, as the installed distribution declares them (PEP 508 markers)."""
    extras: dict[str, list[str]] = {}
    for line in metadata.requires(DISTRIBUTION) or []:
        found = _REQUIREMENT.match(line)
        if found and found["name"] != DISTRIBUTION:
            extras.setdefault(found["extra"], []).append(found["name"])
    return extras


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
