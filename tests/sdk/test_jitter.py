"""Threads of ours that drew from `random` would change what a seeded application draws."""

import inspect
import random

import pytest

from conserve_sdk._broker_client import AsyncBrokerClient, SyncBrokerClient
from conserve_sdk._jitter import own_random
from conserve_sdk._registry import LeaseRegistry


def test_our_random_numbers_are_not_the_applications() -> None:
    before = random.getstate()
    drawn = {own_random() for _ in range(100)}
    assert len(drawn) > 90
    assert all(0 <= each < 1 for each in drawn)
    assert random.getstate() == before


@pytest.mark.parametrize("kind", [SyncBrokerClient, AsyncBrokerClient, LeaseRegistry])
def test_whoever_spreads_its_calls_draws_from_them(kind: type) -> None:
    assert inspect.signature(kind.__init__).parameters["jitter"].default is own_random  # type: ignore[misc]
