"""The cheaper constructor makes what the dataclass says: same fields, defaults, guard, equality and copies."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, is_dataclass, replace

import pytest

from conserve_sdk import core
from conserve_sdk.core import BrokerCounters, Finding, Lease, Ms, TurnFinished, WaitingRequest
from conserve_sdk.core._quick import quick_init, quick_make
from tests.core.world import World

LEASE = World().grant("c")


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    x: int
    y: int = 2
    notes: list[str] = field(default_factory=list, init=False, compare=False)


def test_fields_and_defaults() -> None:
    point = Point(x=1)
    assert (point.x, point.y, point.notes) == (1, 2, [])
    assert type(point) is Point
    assert point == Point(x=1, y=2) != Point(x=2)
    assert hash(point) == hash(Point(x=1))
    assert point.notes is not Point(x=1).notes
    assert repr(point) == "Point(x=1, y=2, notes=[])"


@pytest.mark.parametrize("arguments", [{}, {"y": 1}, {"x": 1, "z": 1}])
def test_what_is_missing_or_unknown_is_an_error(arguments: dict[str, int]) -> None:
    with pytest.raises(TypeError):
        Point(**arguments)


def test_it_is_still_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        LEASE.epoch = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        del LEASE.epoch


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each)), replace])
def test_copies(copied) -> None:  # type: ignore[no-untyped-def]
    assert copied(LEASE) == LEASE


def test_a_changed_lease_is_a_replaced_one() -> None:
    """A field that `after` or `until` forgot would show here."""
    changes = {"expires_at_ms": Ms(7), "activity_since_ms": Ms(8), "ledger_tokens": 9, "turns": 3, "migrations": 1}
    changed = LEASE.after(activity=LEASE.activity, **changes)  # type: ignore[arg-type]
    assert changed == replace(LEASE, **changes)  # type: ignore[arg-type]
    assert LEASE.until(Ms(7)) == replace(LEASE, expires_at_ms=Ms(7))
    assert {each.name for each in fields(Lease)} == set(Lease.__slots__)


def test_what_the_core_takes_and_gives_cannot_change_and_is_made_by_keyword() -> None:
    exported = [getattr(core, name) for name in core.__all__]
    values = [each for each in exported if is_dataclass(each) and each is not BrokerCounters]
    assert {Lease, TurnFinished, WaitingRequest, Finding} <= set(values)
    for each in values:
        if isinstance(each, type):
            assert each.__dataclass_params__.frozen, each  # type: ignore[attr-defined]
            assert "__slots__" in vars(each), each
            assert all(part.kw_only for part in fields(each)), each


def test_a_constructor_that_does_more_is_left_alone() -> None:
    with pytest.raises(AssertionError, match="does more"):

        @quick_init
        @dataclass(frozen=True, slots=True, kw_only=True)
        class Checked:
            x: int

            def __post_init__(self) -> None: ...

    with pytest.raises(AssertionError, match="a factory's value"):

        @quick_init
        @dataclass(frozen=True, slots=True, kw_only=True)
        class Made:
            x: list[int] = field(default_factory=list)


def test_a_constructor_by_place_takes_every_field_and_no_other() -> None:
    point = quick_make(Point, "notes", "y", "x")(["a"], 3, 1)
    assert (point, point.notes) == (Point(x=1, y=3), ["a"])
    with pytest.raises(AssertionError, match="not the fields of Point: x, y"):
        quick_make(Point, "x", "y")
