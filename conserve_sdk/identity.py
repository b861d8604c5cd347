"""Which conversation a request belongs to.

Order, first hit wins: the header `X-ConServe-Conversation`, `with conversation(id)`, the header `X-Session-ID` given
by the application, the framework's own id (LangGraph's `thread_id`), the body's `prompt_cache_key`. None of them:
the conversation is anonymous and found by content (`_lineage.LineageBook`).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Self

from conserve_sdk.core.units import ConversationId, LineageId
from conserve_sdk.errors import ConfigError
from conserve_sdk.telemetry import ConversationStats, Tally

__all__ = [
    "HEADER_CONVERSATION",
    "HEADER_LINEAGE",
    "HEADER_SESSION",
    "conversation",
    "current_conversation",
    "current_lineage",
    "current_tally",
    "resolve_conversation",
    "resolve_lineage",
    "wire_id",
]

HEADER_CONVERSATION = "X-ConServe-Conversation"
HEADER_LINEAGE = "X-ConServe-Lineage"
HEADER_SESSION = "X-Session-ID"
"""Read by vLLM (`SESSION_ID_HEADER`, entrypoints/generate/base/serving.py) and by session-affine routers."""

WIRE_ID_MAX_CHARS = 160
"""Longer ids are hashed, so that `<conversation>/<lineage>` stays within the 255 characters of `X-Session-ID`."""

_PLAIN_ID = re.compile(rf"[\x21-\x7e]{{1,{WIRE_ID_MAX_CHARS}}}")

_Scope = tuple[ConversationId, LineageId | None, Tally]
_scope: ContextVar[_Scope | None] = ContextVar("conserve_conversation", default=None)


def wire_id(text: str) -> ConversationId:
    """Return `text` itself if it can stand in a header and in the protocol, else a stable hash of it.

    Args:
        text: any non-empty text; blanks, non-ASCII and over-long ids are hashed.

    Raises:
        ConfigError: `text` is empty.
    """
    if not text:
        raise ConfigError("a conversation id must not be empty: leave it out for an anonymous conversation")
    if _PLAIN_ID.fullmatch(text):
        return ConversationId(text)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return ConversationId(f"h-{digest}")


class conversation:  # noqa: N801 -- reads as a verb at the call site: `with conversation("ticket-17"):`
    """Mark every request made inside the block as a turn of one conversation.

    Works as `with` and as `async with`, nests, and may be left in another context than it was entered in. Threads
    started inside the block do not inherit it (`asyncio.to_thread` and tasks do). Inside an async generator the mark
    is visible to the consumer between two items: set it around the consumer instead.

    Args:
        conversation_id: the application's own id.
        lineage: names the growing prefix, where the application knows it better than the content shows it.

    Raises:
        ConfigError: an id is empty.
    """

    def __init__(self, conversation_id: str, *, lineage: str | None = None) -> None:
        named = None if lineage is None else LineageId(wire_id(lineage))
        wired, outer = wire_id(conversation_id), current_tally()
        shared = outer is not None and outer.conversation_id == wired
        self._value: _Scope = (wired, named, outer if outer and shared else Tally(wired))
        self._entered: list[Token[_Scope | None]] = []

    @property
    def conversation_id(self) -> ConversationId:
        """The id as it goes over the wire."""
        return self._value[0]

    def stats(self) -> ConversationStats:
        """The turns made inside this block so far; `print` shows them as a table.

        Counts turns begun here, whichever `ConServe` object sent them; of blocks nested in one another for the same
        conversation, the outermost counts for all. Turns that name another conversation by header are left out;
        `ConServe.stats` has those of any conversation.
        """
        return self._value[2].stats()

    def __enter__(self) -> Self:
        self._entered.append(_scope.set(self._value))
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        token = self._entered.pop()
        try:
            _scope.reset(token)
        except ValueError:  # left in another context (an async generator closed by the event loop)
            if _scope.get() is self._value:
                _scope.set(None if token.old_value is Token.MISSING else token.old_value)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, tb)


def current_conversation() -> ConversationId | None:
    """Return the id set by the innermost `with conversation(...)`, or None."""
    scope = _scope.get()
    return None if scope is None else scope[0]


def current_lineage() -> LineageId | None:
    """Return the lineage named by the innermost `with conversation(...)`, or None."""
    scope = _scope.get()
    return None if scope is None else scope[1]


def current_tally() -> Tally | None:
    """Return what adds up the turns of the innermost `with conversation(...)`, or None."""
    scope = _scope.get()
    return None if scope is None else scope[2]


def resolve_conversation(headers: Mapping[str, str], body: Mapping[str, Any] | None = None) -> ConversationId | None:
    """Find the conversation of a request; see the module's docstring for the order.

    Args:
        headers: the request's headers, in any case.
        body: the request's JSON object, where it has one.

    Returns:
        The id for the wire, or None for an anonymous conversation.
    """
    explicit = _header(headers, HEADER_CONVERSATION)
    if explicit:
        return wire_id(explicit)
    scoped = current_conversation()
    if scoped is not None:
        return scoped
    found = _header(headers, HEADER_SESSION) or _framework_id() or _cache_key(body)
    return wire_id(found) if found else None


def resolve_lineage(headers: Mapping[str, str]) -> LineageId | None:
    """Find the lineage the application named: the header `X-ConServe-Lineage`, else the enclosing `conversation`."""
    explicit = _header(headers, HEADER_LINEAGE)
    if explicit:
        return LineageId(wire_id(explicit))
    # A header that names another conversation than the enclosing block leaves the block's lineage behind.
    return None if _header(headers, HEADER_CONVERSATION) else current_lineage()


def _header(headers: Mapping[str, str], name: str) -> str | None:
    direct = headers.get(name)
    if direct is not None:
        return direct
    wanted = name.lower()
    return next((value for key, value in headers.items() if key.lower() == wanted), None)


def _framework_id() -> str | None:
    """LangGraph's thread id, read only where langchain_core is loaded already: it is never imported from here."""
    module = sys.modules.get("langchain_core.runnables.config")
    variable = getattr(module, "var_child_runnable_config", None)
    config = variable.get() if isinstance(variable, ContextVar) else None
    if not isinstance(config, Mapping):
        return None
    configurable = config.get("configurable") or {}
    metadata = config.get("metadata") or {}
    ids = (
        configurable.get("conserve_conversation_id"),
        configurable.get("thread_id"),
        *(metadata.get(key) for key in ("conversation_id", "session_id", "thread_id")),
    )
    return next((str(value) for value in ids if value not in (None, "")), None)


def _cache_key(body: Mapping[str, Any] | None) -> str | None:
    value = (body or {}).get("prompt_cache_key")
    return value if isinstance(value, str) and value else None
