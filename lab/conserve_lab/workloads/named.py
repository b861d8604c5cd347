"""Traces by name: in the folder that is given, or the one that CONSERVE_TRACES names."""

from __future__ import annotations

import os
from pathlib import Path

from conserve_lab.workloads.conversation import WorkloadError

TRACES_VARIABLE = "CONSERVE_TRACES"
_ENDINGS = (".jsonl", ".jsonl.gz", ".public.jsonl", ".public.jsonl.gz")


def trace_path(name: str, *, folder: Path | None) -> Path:
    """Return the file of a trace: `name` itself if it is one, else the one of that name in the folder.

    Args:
        name: a path, or a file's name with or without its ending.
        folder: where traces lie; None: what the environment says.

    Raises:
        WorkloadError: there is no such file.
    """
    if Path(name).is_file():
        return Path(name)
    told = os.environ.get(TRACES_VARIABLE)
    folder = folder or (Path(told) if told else None)
    if folder is None:
        raise WorkloadError(
            f"no readable file {name!r}: name one, or the folder of traces with --traces or {TRACES_VARIABLE}"
        )
    for ending in ("", *_ENDINGS):
        path = folder / f"{name}{ending}"
        if path.is_file():
            return path
    known = sorted({_plain(path) for path in folder.glob("*.jsonl*") if not path.name.startswith("messages.")})
    raise WorkloadError(f"no trace {name!r} in {folder}: it holds {', '.join(known) or 'none'}")


def short_name(workload: str) -> str:
    """What a workload is called in tables: a file without folder and ending."""
    return _plain(Path(workload))


def _plain(path: Path) -> str:
    name = path.name
    for ending in sorted(_ENDINGS, key=len, reverse=True):
        name = name.removesuffix(ending)
    return name
