"""Reads the body of a turn; of a follow-up turn, only what was added since the one before.

An agent sends its whole history again with every turn, and so do its bytes repeat: up to the end of the messages that
were there before, and after the end of the new ones. Where they do, only the new messages are parsed and digested. The
result is the one that reading all of it gives (`tests/sdk/test_prompts.py` holds the two against each other), because
JSON has no context: what stood inside a list of messages says the same whatever is put behind it.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from conserve_sdk._bodies import JsonObject, TurnBody, local_because, read_body, refers_to_media, turn_body
from conserve_sdk._digest import PromptDigest, digest_prompt, extend_digest, has_preamble
from conserve_sdk._fork import call_in_forked_child
from conserve_sdk._kind import Kind
from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.units import ConversationId

__all__ = ["PromptReader", "Reading"]

KEPT_BYTES_MAX = 32 * 1024 * 1024
"""Of all prompts together; the ones that were not used longest go first."""
PROMPT_BYTES_MAX = 4 * 1024 * 1024
"""A longer prompt is read anew every time."""
PROMPTS_PER_SCOPE_MAX = 8

_ITEMS = {Kind.CHAT: "messages", Kind.RESPONSES: "input"}
_OPENINGS = {kind: re.compile(rb'"%s"[ \t\n\r]*:[ \t\n\r]*\[' % key.encode()) for kind, key in _ITEMS.items()}
_BLANKS = b" \t\n\r"
_decoder = json.JSONDecoder()


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A turn's body and the digest of its prompt."""

    body: TurnBody
    digest: PromptDigest


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A prompt that was read.

    Attributes:
        upto: the body's bytes from the first on to the end of its last message.
        after: the ones that follow, from the bracket on that closes the list.
        before: the options in front of the messages.
        options: all of them.
        reason: `local_because` of the options alone.
        media: whether a message refers to remote media.
        digest: of the prompt.
    """

    upto: bytes
    after: bytes
    before: JsonObject
    options: JsonObject
    model: str
    reason: str
    media: bool
    digest: PromptDigest


@dataclass(slots=True)
class _Scope:
    """The prompts of one conversation, the newest last."""

    prompts: list[_Known] = field(default_factory=list)

    def size(self) -> int:
        return sum(len(known.upto) for known in self.prompts)


class PromptReader:
    """Reads bodies and remembers prompts, in bounded memory. Thread-safe."""

    def __init__(self, *, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._kept_bytes_max = kept_bytes_max
        self._start_afresh()
        call_in_forked_child(self._start_afresh)

    @property
    def kept_bytes(self) -> int:
        """Bytes of prompts that are remembered."""
        return self._kept_bytes

    def read(self, kind: Kind, raw: bytes, *, scope: ConversationId | None) -> Reading:
        """Read a body.

        Args:
            kind: the route.
            raw: as the application sent it.
            scope: the conversation, as far as it is known without the body: where to look first. The result does not
                depend on it.

        Raises:
            BadBody: no JSON object, or no model.
        """
        known = self._find(kind, raw, scope)
        read = _follow(kind, raw, known) if known is not None else None
        if read is None:
            known, read = None, _read_all(kind, raw)
        reading, now_known = read
        if now_known is not None and len(raw) <= PROMPT_BYTES_MAX:
            self._keep(scope, now_known, instead_of=known)
        return reading

    def forget(self, scope: ConversationId) -> None:
        """Drop the prompts of a conversation."""
        with self._lock:
            self._drop(scope)

    def _find(self, kind: Kind, raw: bytes, scope: ConversationId | None) -> _Known | None:
        with self._lock:
            held = self._scopes.get(scope)
            prompts = tuple(reversed(held.prompts)) if held else ()
        fitting = (each for each in prompts if each.digest.kind is kind and raw.startswith(each.upto))
        return next(fitting, None)

    def _keep(self, scope: ConversationId | None, new: _Known, *, instead_of: _Known | None) -> None:
        with self._lock:
            held = self._scopes.setdefault(scope, _Scope())
            self._scopes.move_to_end(scope)
            before = held.size()
            held.prompts = [each for each in held.prompts if each is not instead_of][1 - PROMPTS_PER_SCOPE_MAX :]
            held.prompts.append(new)
            self._kept_bytes += held.size() - before
            while self._kept_bytes > self._kept_bytes_max:
                self._drop(next(iter(self._scopes)))

    def _drop(self, scope: ConversationId | None) -> None:
        held = self._scopes.pop(scope, None)
        self._kept_bytes -= held.size() if held else 0

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._scopes: OrderedDict[ConversationId | None, _Scope] = OrderedDict()
        self._kept_bytes = 0


_Read = tuple[Reading, _Known | None]


def _read_all(kind: Kind, raw: bytes) -> _Read:
    parts = _split(kind, raw)
    if parts is None:
        body = read_body(kind, raw)
        return Reading(body=body, digest=digest_prompt(kind, body.data)), None
    data, before, upto_bytes = parts
    items = data[_ITEMS[kind]]
    body = turn_body(kind, raw, data)
    digest = digest_prompt(kind, data)
    if body.stripped or not items:
        return Reading(body=body, digest=digest), None
    options = {name: value for name, value in data.items() if name != _ITEMS[kind]}
    known = _Known(
        upto=raw[:upto_bytes],
        after=raw[upto_bytes:],
        before=before,
        options=options,
        model=body.model,
        reason=local_because(kind, options),
        media=refers_to_media(items),
        digest=digest,
    )
    return Reading(body=body, digest=digest), known


def _split(kind: Kind, raw: bytes) -> tuple[JsonObject, JsonObject, int] | None:
    """Parse a body in three parts, so that the place is known where its messages end.

    Returns:
        The body, the options in front of its messages, and the bytes up to the bracket that closes them. None where
        the list does not stand at the top, or anything else is not as it should be: `read_body` has the words for it.
    """
    opening = _OPENINGS[kind].search(raw) if kind in _OPENINGS and raw[:1] == b"{" and b"\x00" not in raw[:4] else None
    if opening is None:
        return None
    key, head = _ITEMS[kind], raw[: opening.start()].rstrip(_BLANKS)
    try:
        before = json.loads(head.removesuffix(b",") + b"}")  # fails where the name stands inside of something
        text = raw[opening.end() - 1 :].decode()
        items, end = _decoder.raw_decode(text)
        after = _options_after(text[end:])
    except ValueError:
        return None
    if after is None or key in before or key in after or head[-1:] != (b"," if before else b"{"):
        return None
    return {**before, key: items, **after}, before, opening.end() - 1 + len(text[: end - 1].encode())


def _follow(kind: Kind, raw: bytes, known: _Known) -> _Read | None:
    """Read what was added to a known prompt; None where something else was changed."""
    try:
        read = _added(raw[len(known.upto) :], known)
    except ValueError:
        return None
    if read is None:
        return None
    added, options, after_bytes = read
    model, reason = known.model, known.reason
    if options is not known.options:
        checked = None if _ITEMS[kind] in options else turn_body(kind, raw, options)
        if checked is None or checked.stripped or not has_preamble(known.digest, options):
            return None
        model, reason = checked.model, checked.local_because
    media = known.media or refers_to_media(added)
    digest = extend_digest(known.digest, added) if added else known.digest
    body = TurnBody(
        kind=kind,
        raw=raw,
        options=options,
        model=model,
        stream=bool(options.get("stream")),
        stripped=False,
        whole=False,
        local_because=reason or ("remote_media" if media else ""),
    )
    upto_bytes = len(raw) - after_bytes
    return Reading(body=body, digest=digest), _Known(
        upto=raw[:upto_bytes],
        after=raw[upto_bytes:],
        before=known.before,
        options=options,
        model=model,
        reason=reason,
        media=media,
        digest=digest,
    )


def _added(rest: bytes, known: _Known) -> tuple[list[Any], JsonObject, int] | None:
    """The messages that were added, the options, and how many bytes follow the last message.

    Raises:
        ValueError: no JSON.
    """
    if rest == known.after:
        return [], known.options, len(rest)
    if rest.startswith(b",") and rest.endswith(known.after):
        try:
            items = json.loads(b"[%s]" % rest[1 : -len(known.after)])
        except ValueError:
            items = []  # the end is the same by chance: there are other options in front of it
        if items:
            return items, known.options, len(known.after)
    if not rest.startswith((b",", b"]")):
        return None
    text = rest.decode()
    goes_on = text.startswith(",")
    items, end = _decoder.raw_decode("[" + text.removeprefix(","))
    end -= not goes_on
    options = _options_after(text[end:]) if bool(items) is goes_on else None
    if options is None:
        return None
    return items, {**known.before, **options}, len(text[end - 1 :].encode())


def _options_after(text: str) -> JsonObject | None:
    """What follows the messages in the body; None for what cannot follow."""
    rest = text.strip(" \t\n\r")
    if rest == "}":
        return {}
    if not rest.startswith(","):
        return None
    options = json.loads("{" + rest[1:])
    return options if options and isinstance(options, dict) else None  # `,}` is no end
