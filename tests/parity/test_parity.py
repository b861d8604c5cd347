"""What blocking code does, async code does: one set of scenes over both, and the two accounts compared word by word.

An account holds what the application got (answers, chunks, exceptions and their causes), every request at engines with
its bytes, headers and time limits, every request at the broker, all reports, turn records, leases and warnings.
"""

from __future__ import annotations

import inspect

import pytest

import conserve_sdk
from conserve_sdk import AsyncConServeTransport, ConServe, ConServeTransport
from tests.parity import answers, failures, lifecycle  # noqa: F401 -- they collect their scenes
from tests.parity.program import COLOURS, play
from tests.parity.scenes import SCENES, Scene

TWINS = {
    "release": "arelease",
    "park": "apark",
    "close": "aclose",
    "transport": "async_transport",
    "http_client": "async_http_client",
    "openai_client": "async_openai_client",
}
COLOURLESS = {"closed", "reports_dropped", "idle", "stats", "flush"}
"""They send nothing to engines, and what goes to the broker goes from the background."""


@pytest.mark.parametrize("scene", [pytest.param(scene, id=scene.name) for scene in SCENES])
def test_both_colours_do_the_same(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    blocking, looped = (play(scene.play, colour, scene.setting(), caplog) for colour in COLOURS)
    assert blocking["seen"]
    for part, account in blocking.items():
        assert looped[part] == account, part


def test_no_entry_point_is_without_its_twin() -> None:
    """A new public method needs a twin and a scene, or a word here why it has none."""
    public = {name for name in vars(ConServe) if not name.startswith("_")}
    assert public == {*TWINS, *TWINS.values(), *COLOURLESS}
    for blocking, looped in TWINS.items():
        ours, theirs = (inspect.signature(getattr(ConServe, name)) for name in (blocking, looped))
        assert ours.parameters == theirs.parameters
        made_at_once = blocking in ("transport", "http_client", "openai_client")
        assert inspect.iscoroutinefunction(getattr(ConServe, looped)) != made_at_once
    functions = [name for name in conserve_sdk.__all__ if inspect.isfunction(getattr(conserve_sdk, name))]
    assert {name for name in functions if f"async_{name}" in functions} == {"openai_client"}
    assert set(functions) == {
        *("openai_client", "async_openai_client"),
        *("connect", "current_conversation", "last_turn", "make_lean", "wire_id"),  # they do no I/O
    }


def test_the_transports_are_twins() -> None:
    renamed = {"handle_async_request": "handle_request", "aclose": "close"}
    names = {name for name in vars(ConServeTransport) if not name.startswith("_")}
    twins = {name for name in vars(AsyncConServeTransport) if not name.startswith("_")}
    assert {renamed.get(name, name) for name in twins} == names
