"""Request bodies: which requests are turns, and the two legs made out of one body.

A first turn in mode `migrate` is sent twice: once to the prefiller (`prefill_leg`), once to the decoder (`decode_leg`).
Both legs must agree in everything that enters the prompt, because vLLM trusts the transferred blocks without
looking: a prompt of other tokens answers with wrong text, a longer one ends the decoder process
(vLLM 0.32 `kv_connector/v1/base_worker.py`). So a leg is the application's own body with the fewest changes.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conserve_sdk._kind import Kind
from conserve_sdk.core._quick import quick_init

__all__ = [
    "BadBody",
    "JsonObject",
    "TurnBody",
    "decode_leg",
    "dump",
    "kind_of",
    "local_because",
    "one_token",
    "prefill_leg",
    "read_body",
    "refers_to_media",
    "turn_body",
    "wire_path",
    "without_transfer",
]

JsonObject = dict[str, Any]

_SUFFIXES: tuple[tuple[str, Kind], ...] = (
    ("/chat/completions", Kind.CHAT),
    ("/completions", Kind.COMPLETIONS),
    ("/responses", Kind.RESPONSES),
)

TRANSFER_KEY = "kv_transfer_params"

_MODEL = re.compile(r"[\x21-\x7e]{1,256}")
"""What the broker takes as the name of a model (`protocol.Identifier`)."""

_PREFILL_DROPS = frozenset(
    {
        "stream_options",  # 400 unless the request streams
        "min_tokens",  # 400 when above max_tokens
        "best_of",
        "use_beam_search",  # beam search returns no transfer params
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        TRANSFER_KEY,
    }
)
"""What the prefill leg must not carry (vLLM 0.32, `entrypoints/openai/*/protocol.py`)."""


class BadBody(ValueError):  # noqa: N818 -- says what happened
    """The body cannot be a turn; the message says what is wrong with it, for a 400 answer."""


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class TurnBody:
    """One application request, parsed.

    Attributes:
        raw: the bytes to forward: the application's own, unless something had to be taken out.
        options: the same as a JSON object; without its messages where those were not read anew. Not to be changed.
        whole: whether the messages are among the options.
        stripped: True when the application had put transfer params into the request; they were taken out.
        local_because: why this body must not travel with transferred KV; empty when it may.
    """

    kind: Kind
    raw: bytes
    options: JsonObject
    model: str
    stream: bool
    stripped: bool
    local_because: str
    whole: bool = True

    @property
    def data(self) -> JsonObject:
        """All of it as a JSON object; parsed when it is asked for, where only the options were read."""
        if self.whole:
            return self.options
        data: JsonObject = json.loads(self.raw)
        return data


def kind_of(method: str, path: str) -> Kind | None:
    """What kind of turn a request is, or None when it is none."""
    if method.upper() != "POST":
        return None
    trimmed = path.rstrip("/")
    return next((kind for suffix, kind in _SUFFIXES if trimmed.endswith(suffix)), None)


def wire_path(path: str) -> str:
    """The part of an application's path that an engine knows: from `/v1` on.

    The application's base URL is a placeholder, so whatever stands before `/v1` belongs to nobody.
    """
    at = path.find("/v1/")
    if at >= 0:
        return path[at:]
    trimmed = path.rstrip("/")
    suffix = next((suffix for suffix, _ in _SUFFIXES if trimmed.endswith(suffix)), None)
    return f"/v1{suffix}" if suffix else path


def read_body(kind: Kind, raw: bytes) -> TurnBody:
    """Parse a body and take out what an application must not send.

    Raises:
        BadBody: no JSON object, or no model.
    """
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise BadBody(f"the request body is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadBody("the request body must be a JSON object")
    return turn_body(kind, raw, data)


def turn_body(kind: Kind, raw: bytes, data: JsonObject) -> TurnBody:
    """Make a turn of a parsed body; takes out of `data` what an application must not send.

    Raises:
        BadBody: no model.
    """
    model = data.get("model")
    if not isinstance(model, str) or not model:
        raise BadBody("the request body must name its 'model'")
    if not _MODEL.fullmatch(model):
        raise BadBody(f"'model' must be 1 to 256 printable ASCII characters without blanks, not {model[:80]!r}")
    stripped = _strip(data)
    return TurnBody(
        kind=kind,
        raw=dump(data) if stripped or not _spliceable(raw) else raw,
        options=data,
        model=model,
        stream=bool(data.get("stream")),
        stripped=stripped,
        local_because=local_because(kind, data),
    )


def prefill_leg(body: TurnBody, params: Mapping[str, Any]) -> bytes:
    """The body for the prefiller: one token, no stream, and its token ids asked for.

    The token limits are set to one under every name that wins over another (`max_completion_tokens` wins over
    `max_tokens`); everything that enters the prompt stays as it is.
    """
    leg = one_token(body, body.data)
    leg["return_token_ids"] = True
    leg[TRANSFER_KEY] = dict(params)
    return dump(leg)


def one_token(body: TurnBody, data: JsonObject) -> JsonObject:
    """The options of `data` for a request that computes a prompt and says next to nothing."""
    leg: JsonObject = {key: value for key, value in data.items() if key not in _PREFILL_DROPS}
    leg["stream"] = False
    if body.kind is Kind.RESPONSES:
        leg["max_output_tokens"] = 1
    else:
        leg["max_tokens"] = 1
    if "max_completion_tokens" in leg:
        leg["max_completion_tokens"] = 1
    if "n" in leg:
        leg["n"] = 1
    return leg


def decode_leg(body: TurnBody, params: Mapping[str, Any] | None) -> bytes:
    """The body for the decoder: the application's own bytes, with transfer params put in front where there are any."""
    if not params:
        return body.raw
    head = body.raw.index(b"{") + 1
    rest = body.raw[head:].lstrip()
    comma = b"" if rest.startswith(b"}") else b","
    written = _dump_flags(tuple(params.items())) if len(params) == 1 else dump(params)
    return b'{"%s":%s%s%s' % (TRANSFER_KEY.encode(), written, comma, rest)


def without_transfer(raw: bytes) -> bytes:
    """The body of a request that is no turn, without transfer params, however deep they stand.

    Several of vLLM's other routes take them too (`/v1/messages`, `/v1/chat/completions/batch`, ...).
    """
    if TRANSFER_KEY.encode() not in raw and b"\\u" not in raw:
        return raw
    try:
        data = json.loads(raw)
    except ValueError:
        return raw  # no JSON (a form with a file): nothing that an engine would read them from
    return dump(data) if _strip_deep(data) else raw


def _strip_deep(node: object) -> bool:
    found = isinstance(node, dict) and node.pop(TRANSFER_KEY, ...) is not ...
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        found = _strip_deep(child) or found
    return found


def _strip(data: JsonObject) -> bool:
    found = data.pop(TRANSFER_KEY, ...) is not ...  # even a null would stand beside ours, and the last one wins
    # vLLM merges `vllm_xargs` into the same dictionary that carries the params to its scheduler.
    for key in ("vllm_xargs", "extra_body"):
        nested = data.get(key)
        if isinstance(nested, dict) and TRANSFER_KEY in nested:
            del nested[TRANSFER_KEY]
            found = True
    return found


def _spliceable(raw: bytes) -> bool:
    return raw.lstrip()[:1] == b"{" and b"\x00" not in raw[:4]


def local_because(kind: Kind, data: JsonObject) -> str:
    """Why a body must not travel with transferred KV; empty when it may.

    Requests that reach the engine as several sequences would use one set of transfer params several times.
    """
    reasons = {
        "several_choices": _above_one(data.get("n")) or _above_one(data.get("best_of")),
        "beam_search": data.get("use_beam_search"),
        # Needs the prompt computed where the answer is made.
        "prompt_logprobs": data.get("echo") or data.get("prompt_logprobs") is not None,
        "several_prompts": kind is Kind.COMPLETIONS and _several_prompts(data.get("prompt")),
        # Lives in the memory of the engine that made it.
        "stored_response": kind is Kind.RESPONSES and (data.get("previous_response_id") or data.get("background")),
        "no_output": data.get("max_tokens") == 0,
        # vLLM cuts to another length where the output is limited, as it is on the prefill leg only
        # (0.32, `renderers/params.py`, `max_truncation_tokens`).
        "truncated_prompt": data.get("truncate_prompt_tokens") is not None
        or data.get("truncation") not in (None, "disabled"),
        # Each engine would fetch it for itself, and nothing says that both get the same.
        "remote_media": refers_to_media(data.get("messages")) or refers_to_media(data.get("input")),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def refers_to_media(items: object) -> bool:
    """Whether a message refers to an image, a sound, a video or a file by address instead of holding it."""
    contents = [item.get("content") for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    values = [value for part in parts for key, value in part.items() if key.endswith("_url")]
    urls = [value.get("url") if isinstance(value, dict) else value for value in values]
    return any(isinstance(url, str) and not url.startswith("data:") for url in urls)


def _above_one(value: object) -> bool:
    return isinstance(value, int) and value > 1


def _several_prompts(prompt: object) -> bool:
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)


def dump(data: Mapping[str, Any]) -> bytes:
    """A body's bytes."""
    # ASCII only: a lone surrogate survives the round trip as an escape and cannot be encoded otherwise.
    return json.dumps(data, separators=(",", ":")).encode("ascii")


@functools.lru_cache(maxsize=16)
def _dump_flags(params: tuple[tuple[str, Any], ...]) -> bytes:
    """The same of what is sent with every turn."""
    return dump(dict(params))
