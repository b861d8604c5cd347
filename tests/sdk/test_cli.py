"""The `conserve` command: dispatch, and one clear line for everything that can be wrong."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from conserve_sdk import cli
from conserve_sdk.errors import BrokerUnavailable, ConfigError

COMMANDS = [
    "advise",
    "bench",
    "broker",
    "demo",
    "doctor",
    "drain",
    "emulate",
    "engines",
    "explain",
    "lab",
    "leases",
    "simulate",
    "top",
    "undrain",
    "worker",
]


@pytest.fixture
def plant(monkeypatch, tmp_path: Path):
    """Install a subcommand `sample` that runs the given body of `def main(argv)`."""

    def install(body: str, *, module: str = "conserve_lab_sample.cli", head: str = "") -> None:
        package = tmp_path / module.partition(".")[0]
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "cli.py").write_text(f"{head}\ndef main(argv):\n    {body}\n")
        monkeypatch.syspath_prepend(tmp_path)
        entry = metadata.EntryPoint("sample", f"{module}:main", cli.GROUP)
        monkeypatch.setattr(cli, "_commands", lambda: [entry])
        monkeypatch.setitem(cli._EXTRAS, package.name, "lab")

    yield install
    for name in [name for name in sys.modules if name.startswith("conserve_lab_sample")]:
        del sys.modules[name]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_installed_command(argv: list[str], capsys) -> None:
    assert cli.main(argv) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == COMMANDS
    assert set(cli._SUMMARIES) == set(COMMANDS)


def test_version(capsys) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"conserve {metadata.version('conserve-sdk')}\n"


@pytest.mark.parametrize(
    ("name", "hint"), [("doktor", "did you mean `conserve doctor`?"), ("xyz", "`conserve --help` lists the commands")]
)
def test_an_unknown_command_gets_a_hint(name: str, hint: str, capsys) -> None:
    assert cli.main([name]) == 2
    assert capsys.readouterr().err == f"conserve: no command {name!r}: {hint}\n"


def test_arguments_are_handed_over_and_the_exit_code_comes_back(plant, capsys) -> None:
    plant("print(argv); return 7")
    assert cli.main(["sample", "--flag", "x"]) == 7
    assert capsys.readouterr().out == "['--flag', 'x']\n"


def test_the_process_arguments_are_the_default(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["conserve", "--version"])
    assert cli.main() == 0
    assert capsys.readouterr().out.startswith("conserve ")


@pytest.mark.parametrize("where", [{"head": "import absent_package.part"}, {"head": ""}])
def test_a_missing_extra_is_named(plant, capsys, where: dict) -> None:
    plant("import absent_package.part", **where)
    assert cli.main(["sample"]) == 2
    expected = "conserve: `conserve sample` needs absent_package: pip install 'conserve-sdk[lab]'\n"
    assert capsys.readouterr().err == expected


def test_a_mistake_of_ours_is_not_taken_for_a_missing_extra(plant) -> None:
    plant("import conserve_lab_sample.absent")
    with pytest.raises(ModuleNotFoundError):
        cli.main(["sample"])


def test_a_command_of_another_distribution_needs_no_extra_of_ours(plant, monkeypatch) -> None:
    plant("import absent_package")
    monkeypatch.delitem(cli._EXTRAS, "conserve_lab_sample")
    with pytest.raises(ModuleNotFoundError):
        cli.main(["sample"])


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("set it", key="k"), 2), (BrokerUnavailable("no answer"), 1)],
)
def test_errors_are_one_line(plant, monkeypatch, capsys, error: Exception, code: int) -> None:
    plant("raise argv[0]")
    entry = cli._commands()[0]
    assert cli._run(entry, [error]) == code
    assert capsys.readouterr().err == f"conserve: {error}\n"


def test_an_interrupt_is_quiet(plant, capsys) -> None:
    plant("raise KeyboardInterrupt")
    assert cli.main(["sample"]) == 130
    assert capsys.readouterr().err == ""


def test_unknown_commands_of_others_show_where_they_come_from(plant, capsys) -> None:
    plant("return 0")
    cli.main([])
    assert "  sample  conserve_lab_sample.cli:main\n" in capsys.readouterr().out


def test_the_installed_script_runs() -> None:
    script = Path(sys.executable).with_name("conserve")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == f"conserve {metadata.version('conserve-sdk')}\n"


def test_asking_for_help_loads_no_subcommand() -> None:
    program = "import sys; from conserve_sdk.cli import main; main([]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"conserve_broker", "conserve_lab", "conserve_sdk.doctor", "typer", "rich", "langgraph"}
