"""Make the environment in which real vLLM runs on a CPU: `python -m conserve_lab.vllm .venv-vllm`.

vLLM pins hundreds of megabytes of its own and must not share an environment with an agent, so it gets one of its
own, made with plain `venv` and pip from the pins in `requirements.txt` beside this file, or those of an older vLLM
(`--version`). Run again, the installer finds its stamp and does nothing. About 2.5 GB on disk and two to four minutes.

torch's CPU build carries a local version (`+cpu`) that PyPI does not have. The installer first asks pip as it is
configured here and then PyTorch's own CPU index; `--torch-index` or `CONSERVE_TORCH_INDEX` names another one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from conserve_lab.vllm._process import CommandFailedError, stream
from conserve_lab.vllm.errors import VllmInstallError
from conserve_lab.vllm.pins import NEWEST, REQUIREMENTS, VERSIONS, pins_file, pins_of

__all__ = ["InstallPlan", "Step", "install", "installed_version", "main", "plan_install", "python_of"]

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH_INDEX_VARIABLE = "CONSERVE_TORCH_INDEX"
IMPORTS = ("transformers", "vllm", "nixl")  # the first says so when what it needs does not fit
STAMP = "conserve-requirements.sha256"
PACKAGES_PER_LINE = 25

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of an installation.

    Attributes:
        title: What it does, for the user.
        command: The command to run.
        otherwise: The command to run if the first one fails, or None.
        remedy: What the user can do if the step fails.
    """

    title: str
    command: tuple[str, ...]
    otherwise: tuple[str, ...] | None = None
    remedy: str


@dataclass(frozen=True, kw_only=True)
class InstallPlan:
    """The steps that make one environment, and the stamp that says they are done."""

    venv: Path
    steps: tuple[Step, ...]
    digest: str

    @property
    def stamp(self) -> Path:
        """The file that holds the digest of what is installed."""
        return self.venv / STAMP

    @property
    def is_done(self) -> bool:
        """Whether the environment already holds exactly these requirements."""
        return self.stamp.is_file() and self.stamp.read_text().strip() == self.digest


def python_of(venv: Path) -> Path:
    """The interpreter of an environment.

    Args:
        venv: The environment's directory.

    Returns:
        An absolute path; it is not resolved, because a venv's python is a link to the base interpreter.
    """
    return venv.absolute() / "bin" / "python"


def installed_version(venv: Path) -> str | None:
    """The vLLM version that an environment was made for from today's pins; None if it is not ready to use."""
    stamp = venv / STAMP
    found = stamp.read_text().strip() if stamp.is_file() else ""
    return next((version for version in VERSIONS if _digest(pins_of(version).encode()) == found), None)


def plan_install(
    venv: Path,
    *,
    requirements: Path = REQUIREMENTS,
    torch_index: str | None = None,
    imports: Sequence[str] = IMPORTS,
) -> InstallPlan:
    """Say which commands make the environment, without running any.

    Args:
        venv: Where the environment goes.
        requirements: The pins.
        torch_index: The package index that has torch's CPU build; None tries pip's own configuration first and
            PyTorch's CPU index second.
        imports: Modules that must import in the finished environment.

    Returns:
        The plan.

    Raises:
        VllmInstallError: The requirements cannot be read.
    """
    try:
        content = requirements.read_bytes()
    except OSError as error:
        raise VllmInstallError(f"cannot read {requirements}: {error.strerror}; reinstall conserve-sdk") from error
    python = str(python_of(venv))
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", "--no-deps")
    steps = [
        Step(
            title=f"create {venv}",
            command=(sys.executable, "-m", "venv", str(venv)),
            remedy="install the venv module of this Python (Debian: apt install python3-venv)",
        )
    ]
    if torch := _pin_of("torch", content.decode()):
        steps.append(_torch_step(torch, pip=pip, index=torch_index))
    steps.append(
        Step(
            title=f"install the pins of {requirements.name}",
            command=(*pip, "-r", str(requirements)),
            remedy="check the network and the disk (2.5 GB are needed) and run it again: it goes on where it stopped",
        )
    )
    steps.append(
        Step(
            title=f"import {', '.join(imports)}",
            command=(python, "-W", "ignore", "-c", f"import {', '.join(imports)}"),
            remedy=f"remove {venv} and run it again",
        )
    )
    return InstallPlan(venv=venv, steps=tuple(steps), digest=_digest(content))


def install(plan: InstallPlan, *, say: Say) -> bool:
    """Carry a plan out.

    Args:
        plan: What to do.
        say: Gets one line of progress at a time.

    Returns:
        False when there was nothing to do.

    Raises:
        VllmInstallError: A step failed; the message has its last lines of output and what to do.
    """
    if plan.is_done:
        say(f"{plan.venv} is up to date")
        return False
    if plan.stamp.exists():
        plan.stamp.unlink()  # an interrupted run must not look finished
    started_at = time.monotonic()
    for number, step in enumerate(plan.steps, start=1):
        say(f"[{number}/{len(plan.steps)}] {step.title}")
        _run(step, say=say)
    plan.stamp.write_text(plan.digest + "\n")
    say(f"{plan.venv} is ready after {time.monotonic() - started_at:.0f} s")
    return True


def _run(step: Step, *, say: Say) -> None:
    attempts = [step.command] if step.otherwise is None else [step.command, step.otherwise]
    for command in attempts:
        try:
            _follow(command, say=say)
        except CommandFailedError as error:
            failure = error
        else:
            return
    raise VllmInstallError(f"could not {step.title}: {failure}; {step.remedy}") from failure


def _follow(command: Sequence[str], *, say: Say) -> None:
    """Run a command, and turn pip's chatter into a line every now and then."""
    packages = 0
    for line in stream(command):
        word = line.split(" ", 1)[0]
        if word in {"Collecting", "Processing"}:
            packages += 1
            if packages % PACKAGES_PER_LINE == 0:
                say(f"      {packages} packages fetched")
        elif word == "Installing":
            say("      unpacking")


def _torch_step(pin: str, *, pip: tuple[str, ...], index: str | None) -> Step:
    command = (*pip, pin)
    if index is not None:
        command = (*command, "--extra-index-url", index)
    return Step(
        title=f"install {pin}",
        command=command,
        otherwise=None if index is not None else (*command, "--extra-index-url", TORCH_INDEX),
        remedy=f"name a package index that has {pin}: --torch-index URL or {TORCH_INDEX_VARIABLE}=URL",
    )


def _pin_of(name: str, requirements: str) -> str | None:
    for line in requirements.splitlines():
        if line.startswith(f"{name}=="):
            return line.strip()
    return None


def _digest(content: bytes) -> str:
    major, minor, *_ = sys.version_info
    return hashlib.sha256(content + f"python{major}.{minor}".encode()).hexdigest()


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m conserve_lab.vllm", description=__doc__)
    parser.add_argument("venv", type=Path, help="where the environment goes, e.g. .venv-vllm")
    parser.add_argument(
        "--torch-index",
        default=os.environ.get(TORCH_INDEX_VARIABLE),
        help=f"package index with torch's CPU build (default: ${TORCH_INDEX_VARIABLE}, else pip's own configuration)",
    )
    parser.add_argument("--version", default=NEWEST, choices=VERSIONS, help=f"of vLLM (default: {NEWEST})")
    options = parser.parse_args(argv)
    try:
        with pins_file(options.version) as requirements:
            plan = plan_install(options.venv, requirements=requirements, torch_index=options.torch_index)
            install(plan, say=_print)
    except VllmInstallError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
