"""An emulated fleet for the lab's tests."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet


@pytest.fixture(scope="module")
def shared_fleet() -> Iterator[EmulatedFleet]:
    """One instant fleet per test module: for tests that leave no fault behind."""
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as fleet:
        yield fleet


@pytest.fixture
def fleet() -> Iterator[EmulatedFleet]:
    """A fresh instant fleet: for tests that count, kill or change things."""
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as fresh:
        yield fresh


@pytest.fixture(scope="session")
def http() -> Iterator[httpx2.Client]:
    """One client for all tests (its TLS context takes a third of a second), with a generous timeout."""
    with httpx2.Client(timeout=30) as client:
        yield client
