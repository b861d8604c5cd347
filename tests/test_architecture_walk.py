"""docs/architecture.md tells the truth: a profiled first and follow-up turn make the calls of its walks in their order,
files that it names exist, and its picture is the one that the import contracts make."""

import re
import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import pytest

from conserve_lab.stack import LocalStack
from conserve_langgraph import ConServeChat
from conserve_sdk import ConServe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/architecture.md"
PICTURE = ROOT / "docs/import-contracts.svg"
ROW = re.compile(r"^\| `(\S+\.py)` \| `([\w.]+)` \| .+ \|$")
PREFIX = f"{ROOT}/"
FLUSH_S = 60.0
"""For the reports to be taken: only a broken build waits that long."""

Call = tuple[str, str]


@dataclass
class Recorder:
    """The calls of this project's functions, in all threads, while it is on; a resumed coroutine counts again."""

    calls: list[Call] = field(default_factory=list)
    on: bool = False

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        if self.on and event == "call":
            file = frame.f_code.co_filename
            if file.startswith(PREFIX):
                self.calls.append((file.removeprefix(PREFIX), frame.f_code.co_qualname))

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        self.calls = []
        self.on = True
        try:
            yield self.calls
        finally:
            self.on = False


def walk(heading: str) -> list[Call]:
    """The files and functions of a section's table."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    found = [match.groups() for match in map(ROW.match, rows) if match]
    assert len(found) == len(rows) > 0, f"rows of {heading!r} are `file` | `function` | what"
    return [(file, function) for file, function in found]


def assert_in_order(steps: list[Call], calls: list[Call]) -> None:
    place = 0
    for number, step in enumerate(steps, 1):
        if step not in calls[place:]:
            known = "is called, but earlier" if step in calls else "is never called"
            pytest.fail(f"step {number}, {step[0]} {step[1]}, {known}")
        place = calls.index(step, place) + 1


@dataclass
class Recorded:
    first: list[Call]
    follow_up: list[Call]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """Two turns of one conversation, against a broker with a journal on disk, in this process."""
    recorder = Recorder()
    journal = tmp_path_factory.mktemp("walk") / "journal.sqlite"
    before = sys.getprofile(), threading.getprofile()
    threading.setprofile(recorder)  # before the broker's threads start
    try:
        with (
            LocalStack(preset="paper", settings={"journal": {"path": str(journal)}}) as stack,
            ConServe(stack.broker_url) as conserve,
        ):
            model = ConServeChat(model=stack.model, conserve=conserve)
            config = {"configurable": {"thread_id": "walk"}}
            sys.setprofile(recorder)
            prompt = [("user", "tell me all about leases " * 100)]
            with recorder.recording() as first:
                answer = model.invoke(prompt, config)
                assert conserve.flush(FLUSH_S)
            with recorder.recording() as follow_up:
                model.invoke([*prompt, answer, ("user", "and then?")], config)
            sys.setprofile(None)
            assert [record.migrated for record in conserve.stats("walk").recent] == [True, False]
            yield Recorded(first=first, follow_up=follow_up)
    finally:
        sys.setprofile(before[0])
        threading.setprofile(before[1])


def test_a_first_turn_goes_this_way(recorded: Recorded) -> None:
    assert_in_order(walk("One first turn"), recorded.first)


def test_a_grant_goes_this_way_to_the_journal(recorded: Recorded) -> None:
    assert_in_order(walk("One grant, from the request to the journal"), recorded.first)


def test_a_report_goes_this_way(recorded: Recorded) -> None:
    assert_in_order(walk("One report"), recorded.first)


def test_a_follow_up_turn_goes_this_way(recorded: Recorded) -> None:
    assert_in_order(walk("One follow-up turn"), recorded.follow_up)


def test_a_follow_up_turn_asks_no_broker_and_touches_no_prefiller(recorded: Recorded) -> None:
    functions = {function for _, function in recorded.follow_up}
    assert "Legs._compute" in functions
    assert functions.isdisjoint({"SyncBrokerClient.acquire", "SyncBrokerClient.supersede", "Legs._fetch_ticket"})


def test_every_file_that_the_page_names_exists() -> None:
    table = PAGE.read_text().partition("## Where a change goes\n")[2]
    named = re.findall(r"`((?:conserve_sdk|broker|lab|integrations)/[\w/.]+)`", PAGE.read_text())
    assert len(named) > 60
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert table.count("| `") > 5


def test_the_picture_is_the_contracts_own() -> None:
    draw = runpy.run_path(str(ROOT / ".ci/contracts_picture.py"))["draw"]
    assert PICTURE.read_text() == draw(), "the contracts changed: run `python .ci/contracts_picture.py`"
