"""Request fields that the routes share, checked as vLLM checks them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conserve_lab.emulator.errors import ApiError, invalid, prompt_too_long, unknown_model
from conserve_lab.emulator.kv_params import FIELD, checked_type
from conserve_lab.emulator.language import Wish, image_text

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the engine serves, as far as a request must know."""

    model: str
    max_model_len: int
    image_tokens: int
    connector: bool
    stream_interval: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Fields all three APIs have under the same names."""

    n: int
    seed: int | None
    stop: tuple[str, ...]
    include_stop: bool
    min_tokens: int
    ignore_eos: bool

    def wish(self, *, max_tokens: int, **rest: Any) -> Wish:
        """Return the wish these fields are part of."""
        return Wish(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop=self.stop,
            include_stop=self.include_stop,
            seed=self.seed,
            **rest,
        )


def check_model(body: Body, served: Served) -> str:
    """Return the model to echo.

    Raises:
        ApiError: The engine does not serve it (404).
    """
    model = body.get("model")
    if model in (None, ""):
        return served.model
    if model != served.model:
        raise unknown_model(model)
    return served.model


def kv_params(body: Body, served: Served) -> Mapping[str, Any] | None:
    """Return `kv_transfer_params`, or None for an engine without a connector, which ignores them."""
    params = checked_type(body.get(FIELD))
    if params is None or served.connector:
        return params
    return {"prompt_token_ids": params["prompt_token_ids"]} if "prompt_token_ids" in params else None


def sampling(body: Body) -> Sampling:
    """Read the shared sampling fields.

    Raises:
        ApiError: One is of the wrong type or out of range.
    """
    _check_ranges(body)
    n = whole(body, "n", default=1, least=1)
    if n > 1 and body.get("temperature") == 0:
        raise ApiError(f"n must be 1 when using greedy sampling, got {n}.", param="n")
    stop = body.get("stop") or []
    words = [stop] if isinstance(stop, str) else stop
    if not isinstance(words, list) or any(not isinstance(word, str) for word in words):
        raise ApiError("stop must be a string or a list of strings", param="stop")
    seed = body.get("seed")
    return Sampling(
        n=n,
        seed=seed if isinstance(seed, int) else None,
        stop=tuple(words),
        include_stop=bool(body.get("include_stop_str_in_output")),
        min_tokens=whole(body, "min_tokens", default=0, least=0),
        ignore_eos=bool(body.get("ignore_eos")),
    )


_RANGES = {
    "temperature": (0.0, None),
    "top_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
"""As `vllm/sampling_params.py` of vLLM 0.32 has them; nothing else is done with these fields here."""


def _check_ranges(body: Body) -> None:
    for name, (least, most) in _RANGES.items():
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(f"{name} must be a number, got {value!r}", param=name)
        if value < least or (most is not None and value > most):
            bounds = f"at least {least:g}" if most is None else f"between {least:g} and {most:g}"
            raise ApiError(f"{name} must be {bounds}, got {value}.", param=name)


def token_limit(body: Body, names: Sequence[str], *, prompt_tokens: int, max_model_len: int) -> int:
    """Return how many tokens may be generated: the first of `names` that is set, clipped to the context.

    Raises:
        ApiError: The prompt leaves no room, the limit is below 1, or `min_tokens` exceeds it.
    """
    if prompt_tokens >= max_model_len:
        raise prompt_too_long(prompt_tokens, max_model_len=max_model_len)
    room = max_model_len - prompt_tokens
    limit = room
    for name in names:
        if body.get(name) is not None:
            limit = min(whole(body, name, default=room, least=1), room)
            break
    minimum = whole(body, "min_tokens", default=0, least=0)
    if minimum > limit:
        raise ApiError(
            f"min_tokens must be less than or equal to max_tokens={limit}, got {minimum}.", param="min_tokens"
        )
    return limit


def check_stream_options(body: Body) -> Body:
    """Return `stream_options`.

    Raises:
        ApiError: They are given for an answer that is not streamed.
    """
    options = body.get("stream_options")
    if not options:
        return {}
    if not body.get("stream"):
        raise ApiError("Stream options can only be defined when `stream=True`.", param="stream_options")
    if not isinstance(options, dict):
        raise ApiError("stream_options must be an object", param="stream_options")
    return options


def whole(body: Body, name: str, *, default: int, least: int) -> int:
    """Return an integer field.

    Raises:
        ApiError: It is no integer or below `least`.
    """
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int:
        raise invalid(f"{name} must be an integer, got {value!r}", param=name)
    if value < least:
        raise ApiError(f"{name} must be at least {least}, got {value}.", param=name)
    return value


def text_of_content(content: Any, *, where: str, image_tokens: int = 0) -> str:
    """Return the text of a message's content: a string or a list of parts.

    Args:
        content: The message's content.
        where: Names the message in errors.
        image_tokens: What an image part adds; 0 for a model that takes none.

    Raises:
        ApiError: A part is neither text nor an image that the model takes.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(f"{where}.content must be a string or a list of parts", param=where)
    texts: list[str] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(text := part.get("text", part.get("refusal")), str):
            texts.append(text)
        elif isinstance(part, dict) and part.get("type") == "image_url" and image_tokens:
            texts.append(image_text(_image_reference(part, where=where), tokens=image_tokens))
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ApiError(f"{where}: content of type {kind!r} is not supported; send text", param=where)
    return "".join(texts)


def _image_reference(part: Mapping[str, Any], *, where: str) -> str:
    """Return the image's `data:` URL or its address, which stands for the image (nothing is fetched here)."""
    found = part.get("image_url")
    url = found.get("url") if isinstance(found, dict) else found
    address = url if isinstance(url, str) else ""
    if address.startswith(("http://", "https://")):
        return address
    head, _, data = address.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ApiError(f"{where}: image_url must be an http(s) address or a data: URL in base64", param=where)
    try:
        base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ApiError(f"{where}: image_url is not valid base64: {error}", param=where) from error
    return address


def usage(run_prompt: int, completion: int, cached: int, created: int | None = None) -> dict[str, Any]:
    """Return a `usage` object; only the chat API says how many tokens were `created` in the cache, as in vLLM."""
    details = (
        {"cached_tokens": cached} if created is None else {"cached_tokens": cached, "created_cache_tokens": created}
    )
    return {
        "prompt_tokens": run_prompt,
        "total_tokens": run_prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": details,
    }
