"""Finding transfer params in a request body, wherever and however they are written.

A body that cannot hold them is not even parsed. One that might is parsed, and goes on as the guard read it: written
anew, so that the engine cannot read another meaning into it (a key given twice, another encoding).
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote_to_bytes

from conserve_vllm.prompt import TRANSFER_KEY
from conserve_vllm.refusal import Refusal

__all__ = ["may_hold_params", "parse"]

_KEY = TRANSFER_KEY.encode()
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")
"""The only way to write the key's letters in JSON without the letters."""
_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff", b"\x00")
_FORMS = ("multipart/", "application/x-www-form-urlencoded")

_ONLY_TEXT = frozenset(
    {"messages", "tools", "functions", "input", "response_format", "text", "metadata", "structured_outputs"}
)
"""Below these nothing is read as params: a tool may well have an argument of that name."""


def may_hold_params(raw: bytes) -> bool:
    """Whether the body must be looked into."""
    if _KEY in raw or raw.startswith(_OTHER_ENCODINGS) or b"\x00" in raw[:4]:
        return True
    return b"\\u00" in raw and _ESCAPED_ASCII.search(raw) is not None


def parse(raw: bytes, content_type: str) -> dict[str, Any] | None:
    """The body as an object, whose params are in `kv_transfer_params` and nowhere else; None for one without a say.

    Raises:
        Refusal: it may hold params where the guard cannot judge them.
    """
    if content_type.lower().startswith(_FORMS):
        raise Refusal(400, "misplaced_transfer_params", f"a form must not hold {TRANSFER_KEY}")
    try:
        body = json.loads(raw)
        if _holds_deep(body):
            raise Refusal(
                400, "misplaced_transfer_params", f"{TRANSFER_KEY} belongs at the top of the body and nowhere else"
            )
    except (ValueError, RecursionError) as error:
        raise Refusal(
            400, "unreadable_body", f"the body seems to hold {TRANSFER_KEY} and is not JSON that can be checked"
        ) from error
    return body if isinstance(body, dict) else None


def form_may_hold_params(raw: bytes, content_type: str) -> bool:
    """Whether a form that is URL-encoded hides the key behind its own escapes."""
    return content_type.lower().startswith(_FORMS[1]) and may_hold_params(unquote_to_bytes(raw.replace(b"+", b" ")))


def _holds_deep(body: object) -> bool:
    """Whether the key stands anywhere but at the top."""
    if isinstance(body, dict):
        waiting: list[object] = [value for key, value in body.items() if key not in _ONLY_TEXT and key != TRANSFER_KEY]
    else:
        waiting = [body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if TRANSFER_KEY in node:
                return True
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
    return False
