"""Every snippet of README and docs runs: Python against a real broker and emulated fleet, TOML through the
configuration check, commands as far as a test may run them. Links between documents lead somewhere."""

import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from conserve_broker.check import check_config
from conserve_lab.stack import LocalStack
from conserve_sdk.cli import main
from tests.support.loops import loop_for_blocking_runs

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "integrations/*/*.md", "broker/*.md", "lab/**/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
BROKER_IN_DOCS = "http://127.0.0.1:7070"
LANGUAGES_THAT_RUN = {"python", "toml", "console", "text", "bash", "json"}


@pytest.fixture(scope="module")
def broker_url() -> Iterator[str]:
    with LocalStack() as stack:
        yield stack.broker_url


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in NAMES if _blocks(ROOT / name, "python")])
def test_python_blocks_run(name: str, broker_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = PythonEvaluator()

    def against_the_stack(example: Example) -> None:
        example.parsed = type(example.parsed)(
            example.parsed.replace(BROKER_IN_DOCS, broker_url),
            example.parsed.offset,
            example.parsed.line_offset,
        )
        run(example)

    examples = list(Sybil([CodeBlockParser("python", against_the_stack)]).parse(ROOT / name).examples())
    assert len(examples) == len(_blocks(ROOT / name, "python"))
    for example in examples:
        with loop_for_blocking_runs():
            example.evaluate()
    capsys.readouterr()


@pytest.mark.parametrize("module", ["conserve_langgraph", "conserve_openai_agents", "conserve_pydantic_ai"])
def test_every_adapter_is_shown_in_few_lines(module: str) -> None:
    """Where somebody meets it first: its own page, and the pages that show all ways to reach a fleet."""
    first = _blocks(ROOT / "integrations" / module / "README.md", "python")[0]
    shared = [*_blocks(ROOT / "README.md", "python"), *_blocks(ROOT / "docs/clients.md", "python")]
    assert module in first
    assert any(module in block for block in shared)
    assert max(sum(bool(line.strip()) for line in block.splitlines()) for block in (first, *shared)) <= 15


def test_toml_blocks_are_configurations(tmp_path: Path) -> None:
    blocks = [block for name in NAMES for block in _blocks(ROOT / name, "toml")]
    assert blocks, "the README shows a broker's configuration"
    for number, block in enumerate(blocks):
        tomllib.loads(block)
        path = tmp_path / f"{number}.toml"
        path.write_text(block)
        report = check_config(path)
        assert report.exit_code == 0, report.errors


def _commands() -> list[tuple[str, str]]:
    lines = {
        (line.removeprefix("$ ").strip(), name)
        for name in NAMES
        for block in _blocks(ROOT / name, "console") + _blocks(ROOT / name, "bash")
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    }
    return sorted(lines)


@pytest.mark.parametrize(("line", "name"), _commands())
def test_commands_exist(line: str, name: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    match program:
        case "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(arguments) <= set(targets)
        case "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = re.findall(r"conserve-sdk\[([a-z,-]+)\]", line)
            assert "conserve-sdk" in line
            assert all(extra in extras for group in asked for extra in group.split(","))
        case "conserve":
            # `--help` behind the subcommand proves that command and options parse without running servers here.
            words = [word for word in arguments if not word.startswith("-")]
            shown = _help(*words[:1])
            for option in (word for word in arguments if word.startswith("--")):
                assert option in shown or option in _help(*words[:2]), option
        case "cp":
            assert (ROOT / name).parent.joinpath(arguments[0]).exists()
        case _:
            pytest.fail(f"{name} shows a command that no test knows: {line}")


@cache
def _help(*words: str) -> str:
    """What `conserve WORDS --help` prints; in this process, because a new one spends seconds on imports."""
    with redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        try:
            code: object = main([*words, "--help"])
        except SystemExit as end:  # argparse's way
            code = end.code
    assert not code, words
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


@pytest.mark.parametrize("name", NAMES)
def test_every_block_names_a_language_that_is_checked(name: str) -> None:
    fences = re.findall(r"^```(\S*)$", (ROOT / name).read_text(), re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES_THAT_RUN


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), f"{name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name} links to {target}"
