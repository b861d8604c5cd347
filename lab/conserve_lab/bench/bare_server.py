"""The same server stack answering a fixed body: what no broker on it can exceed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

ANSWER = b'{"answer":"' + b"x" * 1_200 + b'"}'
"""About as long as a lease."""


def bare_app() -> FastAPI:
    """FastAPI with one route that reads the body and answers, as the broker's routes do, without looking at it."""

    class Fixed(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            async def handler(request: Request) -> Response:
                async for _ in request.stream():
                    pass
                return Response(ANSWER, media_type="application/json")

            return handler

    app = FastAPI(docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.routes.append(Fixed("/v1/leases", lambda: None, methods=["POST"]))
    return app


def main(port: int) -> None:
    """Serve on the loopback interface until terminated."""
    uvicorn.run(
        bare_app(), host="127.0.0.1", port=port, lifespan="off", ws="none", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=75,
    )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
