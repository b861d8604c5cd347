"""Import vLLM once, then fork a server for each one that is asked for.

Most of a small server's start-up is importing vLLM (8 s of 17 s, twice: API server and engine core). This process
imports it once and forks; a restarted engine is up in a few seconds. For experiments and tests only: vLLM itself
starts its engine core with `spawn` on a CPU, and here that becomes `fork`.

Commands come on stdin, one JSON object a line: `{"do": "start", "name", "argv", "env", "log"}` and
`{"do": "kill", "name"}`. Events go to stdout: `ready`, `started`, `exited`. When stdin ends, every server is
killed and this process ends: nobody can leave a fleet behind.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
REAP_INTERVAL_S = 0.1
COMMANDS, EVENTS = 0, 1


class Channel:
    """JSON lines to whoever started us, on a descriptor that no library prints to."""

    def __init__(self) -> None:
        self._fd = os.dup(EVENTS)
        os.dup2(sys.stderr.fileno(), EVENTS)

    def send(self, event: str, **fields: object) -> None:
        """Report an event."""
        os.write(self._fd, (json.dumps({"event": event, **fields}) + "\n").encode())

    def close(self) -> None:
        """Let go of the descriptor, in a fork that has nothing to report."""
        os.close(self._fd)


class ForkServer:
    """The servers by name, and the loop that starts, kills and buries them."""

    def __init__(self, channel: Channel, serve: Callable[[], None]) -> None:
        self._channel = channel
        self._serve = serve
        self._names: dict[int, str] = {}

    def run(self) -> None:
        """Obey until stdin ends."""
        pending = b""
        while True:
            readable, _, _ = select.select([COMMANDS], [], [], REAP_INTERVAL_S)
            self._bury()
            if not readable:
                continue
            chunk = os.read(COMMANDS, 65536)
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._obey(json.loads(line))
        for pid in list(self._names):
            self._kill(pid)

    def _obey(self, command: dict[str, Any]) -> None:
        if command["do"] == "start":
            self._start(command)
            return
        for pid, name in list(self._names.items()):
            if name == command["name"]:
                self._kill(pid)

    def _start(self, command: dict[str, Any]) -> None:
        pid = os.fork()
        if pid == 0:
            self._channel.close()
            _become_server(command, self._serve)
        self._names[pid] = command["name"]
        self._channel.send("started", name=command["name"], pid=pid)

    def _kill(self, pid: int) -> None:
        """SIGKILL to the server and its engine core: a crash, not a shutdown."""
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not reached setsid() yet, or is dead and waits to be buried
            os.kill(pid, signal.SIGKILL)

    def _bury(self) -> None:
        while self._names:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            name = self._names.pop(pid, None)
            if name is None:
                continue
            # A server that died by itself may leave its engine core behind, holding the NIXL port.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            self._channel.send("exited", name=name, pid=pid, code=os.waitstatus_to_exitcode(status))


def _die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends, however it ends; forks do not inherit this wish."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _become_server(command: dict[str, Any], serve: Callable[[], None]) -> NoReturn:
    """Turn this fork into the server that was asked for; never returns."""
    code = 1
    try:
        os.setsid()
        _die_with_parent()
        os.register_at_fork(after_in_child=_die_with_parent)  # the engine core dies with its server
        log = os.open(command["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, COMMANDS)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(command["env"])
        sys.argv = ["api_server", *command["argv"]]
        serve()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:  # noqa: BLE001  whatever it is goes into the log; a fork must not run on in our loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _never_import_again() -> None:
    """Undo the two ways in which vLLM would import itself anew for each engine.

    Its CPU platform starts the engine core with `spawn`, and its registry looks at a model's class in a subprocess
    (lest that initialise CUDA; result cached under VLLM_CACHE_ROOT, but four first starts at once cost 25 s).
    """
    import vllm.model_executor.models.registry
    import vllm.utils.system_utils
    import vllm.v1.engine.coordinator
    import vllm.v1.engine.utils

    def context() -> Any:
        return multiprocessing.get_context("fork")

    for module in (vllm.utils.system_utils, vllm.v1.engine.coordinator, vllm.v1.engine.utils):
        module.get_mp_context = context
    vllm.model_executor.models.registry._run_in_subprocess = lambda look: look()


def _import_vllm() -> Callable[[], None]:
    """Import all that a server would import after the fork; returns vLLM's own entry point."""
    import vllm.model_executor.models.llama
    import vllm.v1.attention.backends.cpu_attn
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401
    import xgrammar  # noqa: F401
    from vllm.entrypoints.launchers.api_server import entry

    from conserve_vllm.quiet_nixl import NixlConnector  # noqa: F401  the connector, and NIXL's bindings with it

    return entry.main


def main() -> None:
    """Import, say so, obey."""
    channel = Channel()
    serve = _import_vllm()
    _never_import_again()
    channel.send("ready")
    ForkServer(channel, serve).run()


if __name__ == "__main__":
    main()
