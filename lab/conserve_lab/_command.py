"""How the lab's commands end: exit codes, and errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import typer

from conserve_broker.settings import ConfigProblem
from conserve_lab.calibration import CalibrationError
from conserve_lab.demo.errors import DemoError
from conserve_lab.emulator import FleetConfigError
from conserve_lab.hardware import UnknownEngine
from conserve_lab.simulator import RunFailed
from conserve_lab.workloads import WorkloadError

USAGE = 2
FAILED = 1


def run_command(command: Callable[..., int], argv: Sequence[str], *, name: str) -> int:
    """Run a Typer command.

    Args:
        command: function whose parameters are the options; its docstring is the help text.
        argv: arguments without the command's own name.
        name: for usage texts and error lines.

    Returns:
        What the command returned; 2 for wrong usage or configuration, 1 for any other known failure, 130 if
        interrupted.
    """
    app = _app()
    app.command()(command)
    return _run(app, argv, name=name)


def run_commands(commands: Mapping[str, Callable[..., int]], argv: Sequence[str], *, name: str) -> int:
    """Like `run_command`, for a command with subcommands."""
    app = _app()
    app.callback()(lambda: None)
    for subcommand, command in commands.items():
        app.command(subcommand)(command)
    return _run(app, argv, name=name)


def _app() -> typer.Typer:
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=False
    )


def _run(app: typer.Typer, argv: Sequence[str], *, name: str) -> int:
    try:
        return int(app(args=list(argv), prog_name=name, standalone_mode=False) or 0)
    except typer.Abort:
        return 130
    except (ConfigProblem, FleetConfigError, WorkloadError, CalibrationError, UnknownEngine) as error:
        return _fail(name, str(error), USAGE)
    except (DemoError, RunFailed, OSError) as error:
        return _fail(name, str(error), FAILED)
    except typer.TyperException as error:
        named = getattr(error, "format_message", None)  # a usage error knows which option it is about
        return _fail(name, named() if named else str(error), USAGE)


def _fail(name: str, text: str, code: int) -> int:
    sys.stderr.write(f"{name}: {text}\n")
    return code
