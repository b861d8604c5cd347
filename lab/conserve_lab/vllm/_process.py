"""Run a command to its end and read what it says, line by line."""

from __future__ import annotations

import subprocess
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["CommandFailedError", "stream"]

TAIL_LINES = 3


class CommandFailedError(Exception):
    """A command ended with an exit code other than 0; the message has its last lines."""


def stream(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield a command's output, both streams, as it comes.

    Args:
        command: Program and arguments.
        env: Its whole environment; None means ours.

    Yields:
        Lines without their newline.

    Raises:
        CommandFailedError: It could not be started, or ended with an exit code other than 0.
    """
    try:
        process = subprocess.Popen(  # noqa: S603  commands are made by this package, never by a user
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise CommandFailedError(f"{command[0]}: {error.strerror}") from error
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    assert process.stdout is not None
    try:
        with process.stdout as output:
            for raw in output:
                line = raw.rstrip("\n")
                if line:
                    tail.append(line.strip())
                yield line
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if code != 0:
        raise CommandFailedError(f"exit code {code}: {' | '.join(tail) or 'no output'}")
