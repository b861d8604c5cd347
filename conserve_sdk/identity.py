"""Which conversation a request belongs to.

Order, first hit wins: the header `X-ConServe-Conversation`, `with conversation(id)`, the header `X-Session-ID` given
by the application, the framework's own id (LangGraph's `thread_id`, LangChain's metadata), the body's
`prompt_cache_key`, OpenTelemetry's baggage `gen_ai.conversation.id`. None of them: the conversation is anonymous and
found by content (`_lineage.LineageBook`).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast

from conserve_sdk.core.units import ConversationId, LineageId
from conserve_sdk.errors import ConfigError
from conserve_sdk.telemetry import ConversationStats, Tally

__all__ = [
    "HEADER_CONVERSATION",
    "HEADER_LINEAGE",
    "HEADER_PARENT",
    "HEADER_SESSION",
    "conversation",
    "current_conversation",
    "current_lineage",
    "current_tally",
    "resolve_conversation",
    "resolve_lineage",
    "resolve_parent",
    "wire_id",
]

HEADER_CONVERSATION = "X-ConServe-Conversation"
HEADER_LINEAGE = "X-ConServe-Lineage"
HEADER_PARENT = "X-ConServe-Parent"
"""The conversation that the request's own is a part of: its first lease names that one's as its parent."""
HEADER_SESSION = "X-Session-ID"
"""Read by vLLM (`SESSION_ID_HEADER`, entrypoints/generate/base/serving.py) and by session-affine routers."""

WIRE_ID_MAX_CHARS = 160
"""Longer ids are hashed, so that `<conversation>/<lineage>` stays within the 255 characters of `X-Session-ID`."""

_PLAIN_ID = re.compile(rf"[\x21-\x7e]{{1,{WIRE_ID_MAX_CHARS}}}")

BAGGAGE_KEY = "gen_ai.conversation.id"
"""OpenTelemetry's name for the conversation; some agent frameworks set it as baggage too."""

P = ParamSpec("P")
T = TypeVar("T")

# The blocks entered in this context, the innermost last. A block that is left goes, with whatever was entered inside it
# and never left (an abandoned async generator's). Nothing is shared between contexts, so one object may be entered in
# many threads, and left in another context.
_scope: ContextVar[tuple[conversation, ...]] = ContextVar("conserve_conversation", default=())


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

    Works as `with` and as `async with`, nests, may be entered again and in several threads at once, and may be left in
    another context than it was entered in. Tasks, `asyncio.to_thread` and LangGraph's pools inherit the mark; a plain
    `ThreadPoolExecutor` does not, and inside a generator the mark is visible to its consumer between two items. `wrap`
    is the answer to both.

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
        self._value = (wired, named)
        self._tally = outer if outer and shared else Tally(wired)

    @property
    def conversation_id(self) -> ConversationId:
        """The id as it goes over the wire."""
        return self._value[0]

    @property
    def lineage(self) -> LineageId | None:
        """The lineage it names, None where the content tells."""
        return self._value[1]

    def wrap(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return `function` with every call of it marked, whichever thread or task makes the call.

        ```python
        with ThreadPoolExecutor() as pool:
            futures = [pool.submit(conversation("ticket-17").wrap(ask), question) for question in questions]
        ```

        Coroutine functions stay coroutine functions. The body of a generator function, of either colour, runs marked
        while its consumer sees nothing of the mark. Works as a decorator too.
        """
        if inspect.isasyncgenfunction(function):
            return cast("Callable[P, T]", functools.wraps(function)(_asteps(self, function)))
        if inspect.isgeneratorfunction(function):
            return cast("Callable[P, T]", functools.wraps(function)(_steps(self, function)))
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def marked_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                return await _inside(self, function(*args, **kwargs))

            return cast("Callable[P, T]", marked_coroutine)

        @functools.wraps(function)
        def marked(*args: P.args, **kwargs: P.kwargs) -> T:
            with self:
                result = function(*args, **kwargs)
            # Such as a lambda's: nothing of it has run yet.
            return cast("T", _inside(self, result)) if inspect.iscoroutine(result) else result

        return marked

    def stats(self) -> ConversationStats:
        """The turns made inside this block so far; `print` shows them as a table.

        Counts turns begun here, whichever `ConServe` object sent them; of blocks nested in one another for the same
        conversation, the outermost counts for all. Turns that name another conversation by header are left out;
        `ConServe.stats` has those of any conversation.
        """
        return self._tally.stats()

    def __enter__(self) -> Self:
        _scope.set((*_scope.get(), self))
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        blocks = _scope.get()
        mine = next((place for place in reversed(range(len(blocks))) if blocks[place] is self), None)
        if mine is not None:  # else left in a context that never saw it (an async generator closed by its event loop)
            _scope.set(blocks[:mine])

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(conversation, lineage=self.lineage), (self.conversation_id,)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.__exit__(kind, exc, tb)


def current_conversation() -> ConversationId | None:
    """Return the id set by the innermost `with conversation(...)`, or None."""
    blocks = _scope.get()
    return blocks[-1].conversation_id if blocks else None


def current_lineage() -> LineageId | None:
    """Return the lineage named by the innermost `with conversation(...)`, or None."""
    blocks = _scope.get()
    return blocks[-1].lineage if blocks else None


def current_tally() -> Tally | None:
    """Return what adds up the turns of the innermost `with conversation(...)`, or None."""
    blocks = _scope.get()
    return blocks[-1]._tally if blocks else None  # noqa: SLF001 -- the class's own module


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
    found = _header(headers, HEADER_SESSION) or _framework_id() or _cache_key(body) or _baggage_id()
    return wire_id(found) if found else None


def resolve_lineage(headers: Mapping[str, str]) -> LineageId | None:
    """Find the lineage the application named: the header `X-ConServe-Lineage`, else the enclosing `conversation`."""
    explicit = _header(headers, HEADER_LINEAGE)
    if explicit:
        return LineageId(wire_id(explicit))
    # A header that names another conversation than the enclosing block leaves the block's lineage behind.
    return None if _header(headers, HEADER_CONVERSATION) else current_lineage()


def resolve_parent(headers: Mapping[str, str]) -> ConversationId | None:
    """Find the parent conversation the application named in the header `X-ConServe-Parent`."""
    named = _header(headers, HEADER_PARENT)
    return wire_id(named) if named else None


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


def _baggage_id() -> str | None:
    """The conversation in OpenTelemetry's baggage, read only where its API is loaded already."""
    get_baggage = getattr(sys.modules.get("opentelemetry.baggage"), "get_baggage", None)
    value = get_baggage(BAGGAGE_KEY) if callable(get_baggage) else None
    return str(value) if value not in (None, "") else None


async def _inside(block: conversation, coroutine: Coroutine[Any, Any, T]) -> T:
    with block:
        return await coroutine


def _steps(block: conversation, function: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Any]:
    """A generator function whose body alone runs inside the block."""

    def steps(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        inner = function(*args, **kwargs)
        step: Callable[[], Any] = functools.partial(next, inner)
        try:
            while True:
                try:
                    with block:
                        item = step()
                except StopIteration as end:
                    return end.value
                try:
                    step = functools.partial(inner.send, (yield item))
                except GeneratorExit:
                    raise
                except BaseException as error:  # noqa: BLE001 -- the body decides what it means
                    step = functools.partial(inner.throw, error)
        finally:
            with block:
                inner.close()

    return steps


def _asteps(block: conversation, function: Callable[..., AsyncGenerator[Any, Any]]) -> Callable[..., Any]:
    """The async twin of `_steps`."""

    async def steps(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        inner = function(*args, **kwargs)
        step: Callable[[], Any] = functools.partial(anext, inner)
        try:
            while True:
                try:
                    with block:
                        item = await step()
                except StopAsyncIteration:
                    return
                try:
                    step = functools.partial(inner.asend, (yield item))
                except GeneratorExit:
                    raise
                except BaseException as error:  # noqa: BLE001 -- the body decides what it means
                    step = functools.partial(inner.athrow, error)
        finally:
            with block:
                await inner.aclose()

    return steps
