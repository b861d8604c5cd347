"""Which of the suite on real vLLM passes on which vLLM: `python -m conserve_lab.vllm.versions 0.31.0 0.32.0`.

For each version it makes an environment (2.5 GB each; kept, unless `--discard`), runs `tests/vllm` of the working
directory in it, and writes one table of all. Results of earlier runs in the same folder stay in the table, so
that versions can be run one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from conserve_lab.vllm._process import CommandFailedError, stream
from conserve_lab.vllm.errors import VllmError
from conserve_lab.vllm.install import install, plan_install
from conserve_lab.vllm.pins import VERSIONS, pins_file

__all__ = ["SuiteResult", "main", "read_report", "table"]

DEFAULT_FOLDER = Path(".cache/vllm-versions")
SUITE = "tests/vllm"
FOUND = "found.json"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What the suite said about one vLLM version.

    Attributes:
        version: vLLM's.
        seconds: How long the run took, without the installation.
        load: The machine's load average at its end.
        outcomes: `passed`, `failed` (errors too) or `skipped`, by `file::test`.
    """

    version: str
    seconds: float
    load: float
    outcomes: dict[str, str] = field(default_factory=dict)

    def files(self) -> list[str]:
        """The test files that were run, sorted."""
        return sorted({name.split("::")[0] for name in self.outcomes})

    def share(self, file: str) -> str:
        """How many of a file's tests passed: `3 of 4`, or the number alone if all did; "-" if none was run."""
        found = [outcome for name, outcome in self.outcomes.items() if name.split("::")[0] == file]
        passed = found.count(PASSED)
        if not found:
            return "-"
        return str(passed) if passed == len(found) else f"**{passed} of {len(found)}**"

    def failures(self) -> list[str]:
        """The tests that did not pass, sorted."""
        return sorted(name for name, outcome in self.outcomes.items() if outcome != PASSED)


def read_report(path: Path) -> dict[str, str]:
    """Read pytest's JUnit report.

    Returns:
        The outcome of each test, by `file::test`. A test that passed and failed in its teardown failed.
    """
    worst = {PASSED: 0, SKIPPED: 1, FAILED: 2}
    outcomes: dict[str, str] = {}
    for case in ET.parse(path).iter("testcase"):  # noqa: S314  pytest wrote it, a moment ago
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name', '')}"
        kinds = {child.tag for child in case}
        outcome = FAILED if kinds & {"failure", "error"} else SKIPPED if "skipped" in kinds else PASSED
        outcomes[name] = max(outcome, outcomes.get(name, PASSED), key=worst.__getitem__)
    return outcomes


def table(results: Sequence[SuiteResult]) -> str:
    """One Markdown table: a row for each test file, a column for each version; then what did not pass."""
    lines = [
        f"| | {' | '.join(result.version for result in results)} |",
        f"|---|{'---|' * len(results)}",
    ]
    for file in sorted({file for result in results for file in result.files()}):
        lines += [f"| `{file}` | {' | '.join(result.share(file) for result in results)} |"]
    lines.append(f"| all | {' | '.join(_all(result) for result in results)} |")
    for result in results:
        lines += [f"- {result.version}: `{name}` {result.outcomes[name]}" for name in result.failures()]
    return "\n".join(lines) + "\n"


def _all(result: SuiteResult) -> str:
    passed = len(result.outcomes) - len(result.failures())
    return f"{passed} of {len(result.outcomes)}, {result.seconds:.0f} s, load {result.load:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        0 if everything passed on every version asked for, 1 if not, 2 for wrong usage.
    """
    options = _parser().parse_args(argv)
    if not Path(SUITE).is_dir():
        sys.stderr.write(f"error: no {SUITE} here; run this in ConServe's repository\n")
        return 2
    try:
        found = [_try(version, folder=options.folder, pytest=options.pytest) for version in options.versions]
    except (VllmError, CommandFailedError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        if options.discard:
            for version in options.versions:
                shutil.rmtree(options.folder / version / "venv", ignore_errors=True)
    sys.stdout.write(table(list(_results(options.folder))))
    return 1 if any(result.failures() for result in found) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m conserve_lab.vllm.versions", description=__doc__)
    parser.add_argument("versions", nargs="+", choices=VERSIONS, metavar="VERSION", help=", ".join(VERSIONS))
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="for environments and results")
    parser.add_argument("--discard", action="store_true", help="remove each environment afterwards")
    parser.add_argument("--pytest", action="append", default=[], help="an argument for pytest; may be repeated")
    return parser


def _try(version: str, *, folder: Path, pytest: Sequence[str]) -> SuiteResult:
    home = folder / version
    home.mkdir(parents=True, exist_ok=True)
    with pins_file(version) as requirements:
        install(plan_install(home / "venv", requirements=requirements), say=_say)
    report = home / "report.xml"
    report.unlink(missing_ok=True)
    env = {**os.environ, "CONSERVE_REQUIRE_VLLM": "1", "CONSERVE_VLLM_VENV": str(home / "venv")}
    command = [sys.executable, "-m", "pytest", "-m", "vllm", SUITE, f"--junitxml={report}", *pytest]
    try:
        for line in stream(command, env=env):
            _say(line)
    except CommandFailedError as error:
        if not report.is_file() or not read_report(report):  # tests that fail are a result, none at all is none
            raise VllmError(f"the suite did not run on vLLM {version}: {error}") from error
    suite = next(ET.parse(report).iter("testsuite"))  # noqa: S314
    result = SuiteResult(
        version=version, seconds=float(suite.get("time", 0)), load=os.getloadavg()[0], outcomes=read_report(report)
    )
    (home / FOUND).write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


def _results(folder: Path) -> Iterator[SuiteResult]:
    for version in VERSIONS:
        if (path := folder / version / FOUND).is_file():
            yield SuiteResult(**json.loads(path.read_text()))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
