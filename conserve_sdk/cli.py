"""The `conserve` command: finds a subcommand among the installed packages and hands over.

Subcommands are entry points of the group `conserve.commands`, each a `callable(argv) -> exit code`. Only the one asked
for is imported, so that a bare SDK install starts fast and still has `conserve doctor`.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Final

from conserve_sdk.errors import ConfigError, ConServeError

__all__ = ["main"]

GROUP: Final = "conserve.commands"
DISTRIBUTION: Final = "conserve-sdk"

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130

_SUMMARIES: Final = {
    "advise": "say which placement a running fleet's figures call for",
    "bench": "replay a workload and compare policies",
    "broker": "run the broker, or check its configuration",
    "demo": "broker, emulated fleet and real agents, with a live view",
    "doctor": "check this installation, the broker and the engines",
    "emulate": "run an emulated vLLM fleet",
    "engines": "list, drain and undrain engines",
    "leases": "list live leases",
    "top": "watch a broker and its fleet in the terminal",
    "drain": "give an engine no new leases; --wait for its last one to end",
    "undrain": "let a drained engine take leases again",
    "explain": "show why a lease was placed where it is",
    "lab": "fit the engine model to measured engines",
    "simulate": "policies beside each other in virtual time",
    "worker": "start an engine as a member of a fleet",
}
_EXTRAS: Final = {
    "conserve_broker": "broker",
    "conserve_lab": "lab",
    "conserve_langgraph": "langgraph",
    "conserve_openai_agents": "openai-agents",
    "conserve_pydantic_ai": "pydantic-ai",
    "conserve_vllm": "vllm",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0 good, 1 failed, 2 wrong usage or configuration, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _print_help()
    if arguments[0] == "--version":
        _say(f"conserve {metadata.version(DISTRIBUTION)}")
        return 0
    found = next((entry for entry in _commands() if entry.name == arguments[0]), None)
    if found is None:
        return _unknown(arguments[0])
    return _run(found, arguments[1:])


def _commands() -> list[metadata.EntryPoint]:
    return sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name)


def _run(entry: metadata.EntryPoint, arguments: list[str]) -> int:
    try:
        command: Callable[[list[str]], int] = entry.load()
        return command(arguments)
    except ModuleNotFoundError as exc:
        package = (exc.name or "").partition(".")[0]
        extra = _EXTRAS.get(entry.module.partition(".")[0])
        if extra is None or package in _EXTRAS or package == "conserve_sdk":
            raise  # nothing that an extra would bring: a broken installation or a mistake of ours
        _complain(f"`conserve {entry.name}` needs {package}: pip install '{DISTRIBUTION}[{extra}]'")
        return EXIT_USAGE
    except ConServeError as exc:
        _complain(str(exc))
        return EXIT_USAGE if isinstance(exc, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _print_help() -> int:
    _say("usage: conserve COMMAND [OPTIONS]\n\ncommands:")
    commands = _commands()
    width = max((len(entry.name) for entry in commands), default=0)
    for entry in commands:
        _say(f"  {entry.name:<{width}}  {_SUMMARIES.get(entry.name, entry.value)}")
    _say("\n`conserve COMMAND --help` tells more; `conserve --version` prints the version.")
    return 0


def _unknown(name: str) -> int:
    close = difflib.get_close_matches(name, [entry.name for entry in _commands()], n=1)
    hint = f"did you mean `conserve {close[0]}`?" if close else "`conserve --help` lists the commands"
    _complain(f"no command {name!r}: {hint}")
    return EXIT_USAGE


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _complain(line: str) -> None:
    sys.stderr.write(f"conserve: {line}\n")
