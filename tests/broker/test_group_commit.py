"""The way of changes from the loop to the journal: in order, and how long the loop stands still for them."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from conserve_broker._group_commit import APART_S, DUTY, FAST_S, HOLD_S, SPACING_S, GroupCommit
from conserve_broker.journal import DrainFlag, JournalError, MemoryJournal
from conserve_sdk.core import EngineId

BUDGET_S = 30.0


class Disk(MemoryJournal):
    """Takes as long as it is told to, on a clock that only its writes move; too long ones end with `finish`."""

    def __init__(self, takes_s: float = 0.0) -> None:
        super().__init__()
        self.takes_s = takes_s
        self.now_s = 100.0
        self.waits_s: list[float] = []
        self.groups: list[Sequence[Any]] = []
        self.writing: list[Future[None]] = []

    def clock(self) -> float:
        return self.now_s

    def submit(self, changes: Sequence[Any]) -> Future[None]:
        self.groups.append(changes)
        written = _Write(self)
        self.writing.append(written)
        return written

    def finish(self, error: Exception | None = None) -> None:
        writing, self.writing = self.writing, []
        for written in writing:
            written.set_result(None) if error is None else written.set_exception(error)


class _Write(Future[None]):
    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self._disk = disk

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if timeout is not None and not self.done():
            self._disk.waits_s.append(timeout)
            self._disk.now_s += min(timeout, self._disk.takes_s)
            if self._disk.takes_s <= timeout:
                self._disk.finish()
        return super().exception(0)


def flag(name: str) -> DrainFlag:
    return DrainFlag(EngineId(name), draining=True)


class Ends:
    def __init__(self) -> None:
        self.seen: list[tuple[float, str]] = []

    def __call__(self, seconds: float, error: BaseException | None) -> None:
        self.seen.append((round(seconds, 6), "" if error is None else str(error)))


async def a_round() -> None:
    """Long enough for a group to be handed over and to be heard of."""
    for _ in range(4):
        await asyncio.sleep(0)


async def write(commits: GroupCommit, disk: Disk, *, takes_s: float) -> bool:
    """One group that takes so long; whether the loop stood still for it."""
    disk.takes_s, before = takes_s, len(disk.waits_s)
    commits.submit([flag("d0")])
    commits.flush()
    disk.finish()
    await a_round()
    assert commits.pending is None
    return len(disk.waits_s) > before


async def test_changes_of_one_round_go_together_and_the_loop_waits_for_a_fast_disk() -> None:
    disk, ends = Disk(takes_s=FAST_S / 2), Ends()
    commits = GroupCommit(disk, ended=ends, clock=disk.clock, spacing_s=0)
    commits.submit([flag("d0")])
    commits.submit([flag("d1"), flag("d2")])
    commit = commits.pending
    assert commit is not None
    await a_round()
    assert disk.groups == [[flag("d0"), flag("d1"), flag("d2")]]
    assert disk.waits_s == [HOLD_S]
    assert commit.done()
    assert commits.pending is None
    assert ends.seen == [(FAST_S / 2, "")]


async def test_groups_that_follow_each_other_keep_a_distance() -> None:
    disk, ends = Disk(), Ends()
    commits = GroupCommit(disk, ended=ends, clock=disk.clock, spacing_s=3_600)
    commits.submit([flag("alone")])
    await a_round()
    commits.submit([flag("d1")])
    await a_round()
    commits.submit([flag("d2")])
    await a_round()
    assert disk.groups == [[flag("alone")]], "the next group is not due for an hour"
    commits.flush()
    disk.now_s += 3_600
    commits.submit([flag("d3")])
    await a_round()
    assert disk.groups == [[flag("alone")], [flag("d1"), flag("d2")], [flag("d3")]]


async def test_the_distance_grows_with_the_time_that_a_group_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, later_s = Disk(), []
    commits = GroupCommit(disk, ended=Ends(), clock=disk.clock)
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda delay_s, _: later_s.append(delay_s))
    for _ in range(200):
        await write(commits, disk, takes_s=FAST_S * 0.9)
    commits.submit([flag("next")])
    assert later_s[1] == pytest.approx(SPACING_S), "after one group nobody knows what is usual"
    assert later_s[-1] == pytest.approx(DUTY * FAST_S * 0.9, rel=0.01)


async def test_a_group_is_handed_over_when_it_is_due() -> None:
    disk = Disk()
    commits = GroupCommit(disk, ended=Ends(), clock=disk.clock, spacing_s=0.01)
    for name in ("d1", "d2"):
        commits.submit([flag(name)])
        commit = commits.pending
        assert commit is not None
        async with asyncio.timeout(BUDGET_S):
            await commit
    assert disk.groups == [[flag("d1")], [flag("d2")]]


async def test_the_loop_goes_on_when_one_group_takes_too_long() -> None:
    disk, ends = Disk(takes_s=HOLD_S * 3), Ends()
    commits = GroupCommit(disk, ended=ends, clock=disk.clock, spacing_s=0)
    commits.submit([flag("slow")])
    await a_round()
    slow = commits.pending
    assert slow is not None
    assert (disk.waits_s, ends.seen) == ([HOLD_S], [])
    commits.submit([flag("next")])
    commits.flush()
    last = commits.pending
    assert last is not None
    disk.finish()
    await a_round()
    assert slow.done()
    assert last.done()
    assert [error for _, error in ends.seen] == ["", ""]


async def test_groups_end_in_order_even_when_the_loop_waits_for_the_later_one() -> None:
    disk, ends = Disk(takes_s=HOLD_S * 3), Ends()
    commits = GroupCommit(disk, ended=ends, clock=disk.clock, spacing_s=0)
    commits.submit([flag("slow")])
    commits.flush()
    [slow] = disk.writing
    disk.takes_s = FAST_S / 2
    commits.submit([flag("fast")])
    disk.writing.clear()
    slow.set_exception(JournalError("journal: disk full"))
    commits.flush()
    await a_round()
    assert [error for _, error in ends.seen] == ["journal: disk full", ""]


async def test_a_slow_disk_is_left_to_itself_and_tried_again_later() -> None:
    disk = Disk()
    commits = GroupCommit(disk, ended=Ends(), clock=disk.clock, spacing_s=0)
    stood_still = [await write(commits, disk, takes_s=HOLD_S * 3) for _ in range(10)]
    held = stood_still.count(True)
    assert stood_still == [True] * held + [False] * (10 - held), "once it is known to be slow, nobody waits"
    assert 2 <= held < 10
    disk.now_s += APART_S
    assert await write(commits, disk, takes_s=FAST_S / 2)
    assert all([await write(commits, disk, takes_s=FAST_S / 2) for _ in range(50)])


async def test_one_slow_group_among_fast_ones_changes_nothing() -> None:
    disk = Disk()
    commits = GroupCommit(disk, ended=Ends(), clock=disk.clock, spacing_s=0)
    for _ in range(5):
        assert await write(commits, disk, takes_s=HOLD_S / 2)
        assert all([await write(commits, disk, takes_s=FAST_S / 4) for _ in range(100)])


@pytest.mark.parametrize("takes_s", [FAST_S / 2, HOLD_S * 3])
async def test_who_waits_learns_that_a_group_failed(takes_s: float) -> None:
    class Failing(Disk):
        def finish(self, error: Exception | None = None) -> None:
            super().finish(error or JournalError("journal: disk full"))

    disk, ends = Failing(takes_s), Ends()
    commits = GroupCommit(disk, ended=ends, clock=disk.clock, spacing_s=0)
    commits.submit([flag("d0")])
    commit = commits.pending
    assert commit is not None
    await a_round()
    disk.finish()
    await a_round()
    assert [error for _, error in ends.seen] == ["journal: disk full"]
    assert str(commit.exception()) == "journal: disk full"


async def test_nothing_to_write_is_nothing_to_wait_for() -> None:
    disk = Disk()
    commits = GroupCommit(disk, ended=Ends(), clock=disk.clock, spacing_s=0)
    commits.submit([])
    commits.flush()
    await a_round()
    assert (disk.groups, commits.pending) == ([], None)
