"""One HTTP server that can be killed like a process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp, Scope


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals alone and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class EngineServer:
    """Serves an app on a port that stays reserved while the server is dead.

    Args:
        app: The application.
        host: Address to bind.
        port: Port to bind; 0 takes a free one, kept from then on.
    """

    def __init__(self, app: ASGIApp, *, host: str, port: int) -> None:
        self._app = app
        # Bound but never listening: connections are refused, and nobody else gets the port.
        self._reservation = _bound_socket(host, port)
        self._host = host
        self.port: int = self._reservation.getsockname()[1]
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def listening(self) -> bool:
        """Whether connections are accepted."""
        return self._server is not None

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The port cannot be bound.
        """
        config = uvicorn.Config(self._app, lifespan="off", log_config=None, log_level=None, access_log=False, ws="none")
        server = _Server(config)
        self._task = asyncio.create_task(server.serve(sockets=[_bound_socket(self._host, self.port)]))
        await server.listening.wait()
        self._server = server

    async def kill(self) -> None:
        """Refuse connections and cut those that exist, as the end of a process does."""
        server, self._server = self._server, None
        if server is None or self._task is None:
            return
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        server.should_exit = server.force_exit = True
        await self._task

    def drop(self, scope: Scope) -> None:
        """Cut the connection a request came by."""
        if self._server is None:
            return
        for connection in list(self._server.server_state.connections):
            if connection.transport.get_extra_info("peername")[:2] == tuple(scope["client"])[:2]:
                connection.transport.abort()

    def close(self) -> None:
        """Give the port back; call it after `kill`."""
        self._reservation.close()


def _bound_socket(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener
