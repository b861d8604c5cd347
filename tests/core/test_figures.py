"""What is kept of the last grants, for the advice."""

from __future__ import annotations

from conserve_sdk.core import AFFINITY, BrokerSettings, ModelName, RequestId
from conserve_sdk.core.figures import GRANTS_REMEMBERED, Figures
from tests.core.world import M, World


def test_figures_of_the_last_grants() -> None:
    here = World(settings=BrokerSettings(placement=AFFINITY))
    model = ModelName("m")
    none = here.broker.grant_figures(model)
    assert (none.grants, none.wait_p95_ms, none.first_turn_p50_tokens) == (0, 0, 0)
    for index in range(19):
        here.release(here.grant(f"c{index}", 100 * (index + 1)))
    full = here.grant("full", 32_000), here.grant("too", 32_000), here.grant("three", 32_000), here.grant("4", 32_000)
    here.request("waits", 32_000, wait_ms=9_000, request_id=RequestId("waits"))
    here.wait(700)
    for lease in full:
        here.release(lease)
    figures = here.broker.grant_figures(model)
    assert (figures.grants, figures.wait_p95_ms, figures.first_turn_p50_tokens) == (24, 0, 1_200)


def test_percentiles_are_nearest_ranks_of_what_is_remembered() -> None:
    figures = Figures()
    for value in range(1, 45 + GRANTS_REMEMBERED):
        figures.granted(M, waited_ms=value, uncached_tokens=10 * value)
    found = figures.of(M)  # of 45 to 300: the 244th, and the 128th
    assert (found.grants, found.wait_p95_ms, found.first_turn_p50_tokens) == (256, 288, 1_720)
