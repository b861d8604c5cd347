"""A prompt as a chain of digests, so that "is a prefix of" is one comparison.

Chat and Responses prompts are chains of items: a preamble (everything outside the messages that a chat template puts
into the prompt), then each message. Prompt strings and token lists of the completions route are chains of blocks of
`BLOCK_BYTES` plus a tail. Digest `n` covers everything up to item `n`, so equal digests mean equal prefixes.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conserve_sdk._kind import Kind
from conserve_sdk.core._quick import quick_init

__all__ = ["Head", "PromptDigest", "digest_prompt", "extend_digest", "has_preamble", "is_models_own"]

DIGEST_BYTES = 16
BLOCK_BYTES = 1024
MARKS = 8
"""Messages at the end of a prompt that are known by themselves too, to be found again in a rewritten history."""
MARK_BYTES = 512
SHARED_BYTES_MIN = 256
"""A shorter preamble is computed in no time wherever the prompt goes."""

# What vLLM's chat templates see besides the messages (entrypoints/openai/*/protocol.py, `build_chat_params`), and the
# salt that separates prefix caches. `tool_choice` is left out: it changes from turn to turn and rarely the prompt.
_PREAMBLE_KEYS = (
    "model",
    "tools",
    "functions",
    "instructions",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "mm_processor_kwargs",
    "reasoning_effort",
    "cache_salt",
)
_LEADING_ROLES = frozenset({"system", "developer"})
_ROLE_CHARS_MAX = 32
_MEDIA_KEYS = ("image_url", "input_audio", "audio_url", "video_url", "image_embeds", "file", "file_data", "image_pil")


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The end of a known prompt: what is kept of it.

    Attributes:
        chain: the digests of its items, one after the other.
        tail_bytes, tail: length and digest of what follows the last whole block of a prompt string.
        marks: of the last messages, whatever stood before them; see `_mark`.
    """

    chain: bytes
    tail_bytes: int
    tail: bytes
    marks: tuple[int, ...] = ()

    @property
    def items(self) -> int:
        """Number of items; a tail counts as one."""
        return len(self.chain) // DIGEST_BYTES + (self.tail_bytes > 0)

    @property
    def last_link(self) -> bytes:
        """The digest of everything but the tail."""
        return self.chain[-DIGEST_BYTES:]


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class PromptDigest:
    """One request's prompt, digested. Holds the text of a tail (under `BLOCK_BYTES`) and nothing else of the prompt.

    Attributes:
        kind: the route.
        head: what the book keeps when the request was served.
        opening_items: items up to and including the first one that is not the system's.
        sizes: text bytes up to and including each item, ascending. Media (images, audio) count nothing.
        raw: bytes of a prompt string, needed to compare tails of other prompts with it; empty for chains of messages.
        roles: of the messages (the type of an item without a role), cut to a few characters; empty for prompt strings.
        opened: whether there is a message that is not the system's.
    """

    kind: Kind
    head: Head
    opening_items: int
    sizes: tuple[int, ...]
    raw: bytes = b""
    roles: tuple[str, ...] = ()
    opened: bool = True

    def __repr__(self) -> str:
        return f"PromptDigest(kind={self.kind.value!r}, items={self.items}, text_bytes={self.text_bytes})"

    @property
    def items(self) -> int:
        """Number of items; the preamble counts as one."""
        return self.head.items

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the prompt's text, tools and message framing included, media left out."""
        return self.sizes[-1]

    def bytes_beyond(self, items: int) -> int:
        """Return the text bytes that follow the first `items` items."""
        return self.text_bytes - (self.sizes[items - 1] if items else 0)

    def appended_bytes(self, items: int) -> int:
        """Return the text bytes that follow the first `items` items and that the model did not write itself.

        What the model wrote is in its decoder's cache already.
        """
        appended = self.bytes_beyond(items)
        for number in range(max(items, 1), len(self.roles) + 1):
            if is_models_own(self.roles[number - 1]):
                appended -= self.sizes[number] - self.sizes[number - 1]
        return appended

    @property
    def prefix_key(self) -> str | None:
        """Names what comes before the conversation: tools and system prompt. None where that is nothing to speak of.

        Prompts with equal keys share those tokens, so that an engine that served one has them for the other.
        """
        leading = next((place for place, role in enumerate(self.roles) if role not in _LEADING_ROLES), len(self.roles))
        if not self.roles or self.sizes[leading] < SHARED_BYTES_MIN:
            return None
        return self.link(leading).hex()

    def link(self, item: int) -> bytes:
        """Return the digest of everything up to and including item number `item` (from 0)."""
        if item * DIGEST_BYTES < len(self.head.chain):
            return self.head.chain[item * DIGEST_BYTES : (item + 1) * DIGEST_BYTES]
        return _roll(self.head.last_link, self.head.tail)

    def extends(self, head: Head) -> bool:
        """Tell whether the prompt that ended in `head` is a prefix of this one (or equal to it)."""
        if not self.head.chain.startswith(head.chain):
            return False
        if not head.tail_bytes:
            return True
        start = (len(head.chain) // DIGEST_BYTES - 1) * BLOCK_BYTES
        piece = self.raw[start : start + head.tail_bytes]
        return len(piece) == head.tail_bytes and _digest(piece) == head.tail

    def shared_items(self, head: Head) -> int:
        """Return how many leading items this prompt shares with the one that ended in `head`."""
        if not self.head.tail_bytes and self.head.chain.startswith(head.chain):
            return len(head.chain) // DIGEST_BYTES
        low, high = 0, min(len(head.chain), len(self.head.chain)) // DIGEST_BYTES
        while low < high:  # the first item that differs makes all later digests differ
            middle = (low + high + 1) // 2
            start = (middle - 1) * DIGEST_BYTES
            if head.chain[start : start + DIGEST_BYTES] == self.head.chain[start : start + DIGEST_BYTES]:
                low = middle
            else:
                high = middle - 1
        equal_tails = self.head.tail_bytes and self.head == head
        return low + bool(equal_tails)


def digest_prompt(kind: Kind, body: Mapping[str, Any]) -> PromptDigest:
    """Digest all that enters the prompt of a request.

    Args:
        kind: the route.
        body: the request's JSON object as the application sent it. Wrong types are digested as they are: the engine
            is the one to refuse them.
    """
    if kind is Kind.COMPLETIONS:
        return _digest_raw(body)
    messages = body.get("messages") if kind is Kind.CHAT else _input_items(body.get("input"))
    return _digest_items(kind, body, messages if isinstance(messages, list) else [messages])


def extend_digest(known: PromptDigest, added: Sequence[Any]) -> PromptDigest:
    """The digest of a prompt of messages with more of them at its end."""
    return _extended(known, _input_items(added) if known.kind is Kind.RESPONSES else added)


def has_preamble(known: PromptDigest, body: Mapping[str, Any]) -> bool:
    """Tell whether a prompt of messages has the preamble of this body."""
    return _digest(_preamble(known.kind, body)) == known.link(0)


def _digest_items(kind: Kind, body: Mapping[str, Any], messages: Sequence[Any]) -> PromptDigest:
    preamble = _preamble(kind, body)
    head = Head(chain=_digest(preamble), tail_bytes=0, tail=b"")
    empty = PromptDigest(kind=kind, head=head, opening_items=1, sizes=(len(preamble),), opened=False)
    return _extended(empty, messages)


def _extended(known: PromptDigest, messages: Sequence[Any]) -> PromptDigest:
    link, size = known.head.last_link, known.text_bytes
    chain, sizes, marks = [known.head.chain], [], [*known.head.marks]
    marked_from = len(messages) - MARKS
    for number, message in enumerate(messages):
        text = _canonical(message)
        if number >= marked_from:
            marks.append(_mark(text))
        link = _roll(link, text)
        chain.append(link)
        size += len(text) - _media_bytes(message)
        sizes.append(size)
    leading = known.opening_items if known.opened else known.opening_items + _opening_items(messages)
    return PromptDigest(
        kind=known.kind,
        head=Head(chain=b"".join(chain), tail_bytes=0, tail=b"", marks=tuple(marks[-MARKS:])),
        opening_items=leading,
        sizes=(*known.sizes, *sizes),
        roles=(*known.roles, *(_role_of(message) for message in messages)),
        opened=known.opened or not all(_is_leading(message) for message in messages),
    )


def _digest_raw(body: Mapping[str, Any]) -> PromptDigest:
    prompt = body.get("prompt")
    raw = _raw_prompt(prompt)
    preamble = _preamble(Kind.COMPLETIONS, body) + type(prompt).__name__.encode()
    link = _digest(preamble)
    chain = [link]
    whole = len(raw) - len(raw) % BLOCK_BYTES
    for start in range(0, whole, BLOCK_BYTES):
        link = _roll(link, raw[start : start + BLOCK_BYTES])
        chain.append(link)
    tail = raw[whole:]
    sizes = list(range(0, whole + 1, BLOCK_BYTES))  # the preamble is no text here
    if tail:
        sizes.append(len(raw))
    head = Head(chain=b"".join(chain), tail_bytes=len(tail), tail=_digest(tail) if tail else b"")
    return PromptDigest(kind=Kind.COMPLETIONS, head=head, opening_items=min(2, head.items), sizes=tuple(sizes), raw=raw)


def _raw_prompt(prompt: Any) -> bytes:
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "surrogatepass")
    if isinstance(prompt, list) and prompt and all(type(token) is int and 0 <= token < 2**32 for token in prompt):
        return array("I", prompt).tobytes()
    return _canonical(prompt)  # several prompts in one request: equal or another


def _input_items(given: Any) -> Any:
    """Write a Responses `input` as items; a bare string is one user message (OpenAI's API reference)."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        return given
    return [
        {key: value for key, value in item.items() if (key, value) != ("type", "message")}
        if isinstance(item, Mapping)
        else item
        for item in given
    ]


def _preamble(kind: Kind, body: Mapping[str, Any]) -> bytes:
    seen = {key: body[key] for key in _PREAMBLE_KEYS if body.get(key) not in (None, [], {}, "")}
    return _canonical([kind.value, seen])


def _role_of(message: Any) -> str:
    named = (message.get("role") or message.get("type")) if isinstance(message, Mapping) else None
    return named[:_ROLE_CHARS_MAX] if isinstance(named, str) else ""


def is_models_own(role: str) -> bool:
    """Whether a message, or an item of the Responses API, came from the model."""
    return role in ("assistant", "reasoning") or role.endswith("_call")


def _opening_items(messages: Iterable[Any]) -> int:
    """Messages up to and including the first one that is not the system's."""
    count = 0
    for message in messages:
        count += 1
        if not _is_leading(message):
            break
    return count


def _is_leading(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") in _LEADING_ROLES


def _media_bytes(message: Any) -> int:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return 0
    return sum(
        len(_canonical(part))
        for part in content
        if isinstance(part, Mapping) and any(part.get(key) is not None for key in _MEDIA_KEYS)
    )


def _canonical(value: Any) -> bytes:
    if type(value) is dict and len(value) == 2:
        content, role = value.get("content"), value.get("role")
        if type(content) is str and type(role) is str:  # nearly every message: said without building an encoder
            text = f'{{"content":{_quote(content)},"role":{_quote(role)}}}'
            return text.encode("utf-8", "surrogatepass")
    return _encode(value).encode("utf-8", "surrogatepass")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _mark(text: bytes) -> int:
    """Tell messages of one process apart: by all of a short one, by the ends and the length of a long one."""
    return hash(text if len(text) <= 2 * MARK_BYTES else (len(text), text[:MARK_BYTES], text[-MARK_BYTES:]))


def _roll(link: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=link).digest()


_quote = json.encoder.encode_basestring
_encode = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str).encode
