"""The dashboard at `/`: one page from this package, with nothing from anywhere else.

The page knows no more than `GET /v1/events` and the routes of operators tell it, and asks for an API key where the
broker does. Browsers ask each time whether a part has changed, so they never show those of two versions together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

__all__ = ["CONTENT_SECURITY_POLICY", "add_dashboard"]

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_PAGE = "index.html"


def add_dashboard(app: FastAPI) -> None:
    """Serve the page and its parts; they say nothing about the broker, so they need no key."""
    for name in _parts():
        path = "/" if name == _PAGE else f"/dashboard/{name}"
        app.add_route(path, _serving(name), methods=["GET"], include_in_schema=False)


def _serving(name: str) -> Callable[[Request], Awaitable[Response]]:
    body, etag = _part(name)
    headers = {**_HEADERS, "etag": etag}
    media_type = _TYPES[name.rpartition(".")[2]]

    async def serve(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return serve


def _parts() -> list[str]:
    return sorted(part.name for part in files(__name__).iterdir() if part.name.rpartition(".")[2] in _TYPES)


@cache
def _part(name: str) -> tuple[bytes, str]:
    """A file of this package and its entity tag."""
    body = files(__name__).joinpath(name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:20]}"'
