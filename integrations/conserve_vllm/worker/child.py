"""The engine's process: started in a session of its own, signalled as a group, its exit code passed on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from conserve_vllm.worker.options import Clash

__all__ = ["SIGNALS", "Child"]

SIGNALS = frozenset(
    {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGQUIT}
)
"""What the worker waits for; it blocks them, so that each is taken at one place only."""


class Child:
    """A running command.

    Args:
        argv: program and arguments.
        env: variables on top of ours.

    Raises:
        Clash: the program cannot be started.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        try:
            self._process = subprocess.Popen(  # noqa: S603 -- the command is the operator's own
                argv,
                env={**os.environ, **env},
                start_new_session=True,  # ^C comes to us alone, and is passed on when it is time
                preexec_fn=_unblock,  # noqa: PLW1509 -- no threads yet
            )
        except OSError as error:
            raise Clash(f"cannot start {argv[0]}: {error.strerror}") from error

    @property
    def exit_code(self) -> int | None:
        """As a shell tells it (128 and the signal's number if one ended it); None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Signal the process itself, which knows its own children."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it with everything it started."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
