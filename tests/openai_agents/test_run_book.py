"""The accounts of runs, without a runner: several models, nested runs, runs that share a conversation."""

import gc
import weakref

import pytest
from agents import FunctionTool, Tool, WebSearchTool
from openai.types.responses import ResponseFunctionToolCall

from conserve_openai_agents._runs import Run, RunBook, book_of, may_need_approval
from conserve_sdk import ConServe


class Recorder:
    """Stands in for `ConServe`: what is told, in order."""

    closed = False

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def idle(self, name: str) -> int:
        self.told.append(("idle", name))
        return 1

    async def apark(self, name: str) -> int:
        self.told.append(("park", name))
        return 1

    async def arelease(self, name: str) -> int:
        self.told.append(("release", name))
        return 1


class Owner:
    """A run of the runner."""


async def _invoke(_context: object, _arguments: str) -> str:
    return ""


def _tool(name: str, **more: object) -> FunctionTool:
    return FunctionTool(name=name, description="", params_json_schema={}, on_invoke_tool=_invoke, **more)  # type: ignore[arg-type]


def _call(name: str) -> ResponseFunctionToolCall:
    return ResponseFunctionToolCall(call_id="c", name=name, arguments="{}", type="function_call")


def _begin(book: RunBook, owner: Owner, conversation: str, *, owned: bool = False) -> Run:
    run = book.run_of(owner)
    assert run is not None
    run.asks(conversation, owned=owned)
    return run


async def test_the_second_model_of_a_run_is_told_nothing_new() -> None:
    book, owner, conserve = RunBook(), Owner(), Recorder()
    _begin(book, owner, "mine", owned=True)
    _begin(book, owner, "mine", owned=True)
    await book.end(owner, conserve=conserve)
    await book.end(owner, conserve=conserve)
    assert conserve.told == [("idle", "mine"), ("release", "mine")]


async def test_a_conversation_of_another_run_under_way_is_left_alone() -> None:
    book, inner, outer, conserve = RunBook(), Owner(), Owner(), Recorder()
    _begin(book, outer, "shared")
    _begin(book, inner, "shared").answered([_call("delete")], [_tool("delete", needs_approval=True)])
    await book.end(inner, conserve=conserve)
    assert conserve.told == []
    await book.end(outer, conserve=conserve)
    assert conserve.told == [("idle", "shared"), ("park", "shared")], "the inner run's tool waits, so the outer does"


async def test_a_wait_ends_with_the_next_turn() -> None:
    book, owner, conserve = RunBook(), Owner(), Recorder()
    run = _begin(book, owner, "c")
    run.answered([_call("delete")], [_tool("delete", needs_approval=True)])
    assert run.waits
    _begin(book, owner, "c")
    await book.end(owner, conserve=conserve)
    assert conserve.told == [("idle", "c")]


async def test_a_run_that_is_over_is_nobodys_parent() -> None:
    book, first, second = RunBook(), Owner(), Owner()
    _begin(book, first, "a")
    await book.end(first, conserve=Recorder())
    assert _begin(book, second, "b").parent is None


async def test_a_closed_conserve_is_not_asked() -> None:
    book, owner, conserve = RunBook(), Owner(), Recorder()
    _begin(book, owner, "mine", owned=True)
    conserve.closed = True
    await book.end(owner, conserve=conserve)
    assert conserve.told == [("idle", "mine")]


async def _policy(*_: object) -> bool:
    return False


@pytest.mark.parametrize(
    ("tool", "may"),
    [
        (_tool("plain"), False),
        (_tool("asks", needs_approval=True), True),
        (_tool("depends", needs_approval=_policy), True),
        (WebSearchTool(), True),
    ],
    ids=["plain", "asks", "depends", "hosted"],
)
def test_which_tools_may_wait(tool: Tool, may: bool) -> None:
    assert may_need_approval(tool) is may


def test_runs_and_books_are_not_kept_alive() -> None:
    conserve = ConServe("http://127.0.0.1:9")
    owner = Owner()
    book = book_of(conserve)
    assert book is book_of(conserve)
    book.run_of(owner)
    watched = weakref.ref(book)
    conserve.close()
    del conserve, owner, book
    gc.collect()
    assert watched() is None


def test_a_call_outside_of_a_run_has_none() -> None:
    assert RunBook().run_of(None) is None
