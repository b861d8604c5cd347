"""Hooks that follow a turn while it runs: when they are told what, and that none of them can spoil a turn."""

import pytest

from conserve_sdk import TurnCollector
from conserve_sdk.telemetry import HopEnd, HopStart, TurnObserver, TurnRecord, TurnStart, TurnWatch
from conserve_sdk.testing import EngineReply, ScriptedEngine


class Journal:
    """An observer that writes down all it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple] = []

    def begin_turn(self, turn: TurnStart, /) -> TurnWatch:
        self.entries.append(("turn", turn))
        return self

    def begin_hop(self, hop: HopStart, headers, /) -> None:
        self.entries.append(("hop", hop))
        headers["x-seen-by"] = "the journal"

    def end_hop(self, hop: HopEnd, /) -> None:
        self.entries.append(("hop over", hop))

    def end(self, record: TurnRecord, /, *, at_us: int) -> None:
        self.entries.append(("over", record))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.entries]

    def all(self, kind) -> list:
        return [what for name, what in self.entries if name == kind]


def watched(make_world, engine=None):
    journal, collect = Journal(), TurnCollector()
    world = make_world(engine=engine, on_turn=[journal, collect])
    return world, journal, collect


def test_a_migrating_turn_is_two_hops(make_world) -> None:
    world, journal, collect = watched(make_world)
    assert isinstance(journal, TurnObserver)
    assert world.turn().text == "ok"
    assert journal.kinds == ["turn", "hop", "hop over", "hop", "hop over", "over"]
    (start,) = journal.all("turn")
    assert (start.conversation_id, start.model, start.path, start.turn) == (
        *("c1", "test-model", "/v1/chat/completions", 1),
    )
    assert [hop.phase for hop in journal.all("hop")] == ["prefill", "decode"]
    assert [hop.engine_id for hop in journal.all("hop")] == world.engines_called
    ids = [call.headers["x-request-id"] for call in world.engine.calls]
    assert [hop.request_id for hop in journal.all("hop")] == ids
    assert [(end.status, end.error) for end in journal.all("hop over")] == [(200, ""), (200, "")]
    assert {call.headers["x-seen-by"] for call in world.engine.calls} == {"the journal"}
    assert journal.all("over") == list(collect.records)


@pytest.mark.parametrize("stream", [False, True])
def test_a_decode_hop_lasts_as_long_as_its_answer(make_world, stream) -> None:
    world, journal, _ = watched(make_world)
    world.turn(stream=stream)
    assert journal.kinds[-2:] == ["hop over", "over"]
    assert journal.all("turn")[0].streams is stream


def test_a_hop_that_fails_is_over_before_the_next_begins(make_world) -> None:
    engine = ScriptedEngine(EngineReply.prefill(), EngineReply.unreachable(), then="answer")
    world, journal, collect = watched(make_world, engine)
    world.turn()
    assert journal.kinds == ["turn", *["hop", "hop over"] * len(engine.calls), "over"]
    assert [end.error for end in journal.all("hop over")][:2] == ["", "unreachable"]
    assert collect.records[-1].failovers == 1


@pytest.mark.parametrize(
    ("replies", "status", "error"),
    [
        ([EngineReply.failure(400)] * 2, 400, "http_400"),  # asked again without the transfer, to be sure
        ([EngineReply.stream_error(status=400)] * 2, 400, "http_400"),
        ([EngineReply.chat_stream("o", end=False).dropped()], 200, "stream_dropped"),
    ],
)
def test_a_decode_that_ends_badly_says_so(make_world, replies, status, error) -> None:
    world, journal, _ = watched(make_world, ScriptedEngine(EngineReply.prefill(), *replies))
    world.turn(stream=True)
    end = journal.all("hop over")[-1]
    assert (end.status, end.error) == (status, error)
    assert len(journal.all("hop over")) == len(journal.all("hop")) == len(world.engine.calls)


def test_a_prefill_that_fails_says_so(make_world) -> None:
    world, journal, _ = watched(make_world, ScriptedEngine(EngineReply.failure(503), then="answer"))
    assert world.turn().text == "ok"
    ends = journal.all("hop over")
    assert [(end.status, end.error) for end in ends] == [(503, "http_503"), (200, "")]
    engine = ScriptedEngine(EngineReply.silent(), then="answer")
    world, journal, _ = watched(make_world, engine)
    assert world.turn().text == "ok"
    assert journal.all("hop over")[0].error == "timeout"


def test_an_observer_that_raises_is_left_out_and_spoils_nothing(make_world, caplog) -> None:
    class Bad(Journal):
        def __init__(self, at) -> None:
            super().__init__()
            self.at = at

        def begin_turn(self, turn, /):
            if self.at == "turn":
                raise RuntimeError("no")
            return super().begin_turn(turn)

        def begin_hop(self, hop, headers, /) -> None:
            raise RuntimeError("no")

    bad, worse, collect = Bad("turn"), Bad("hop"), TurnCollector()

    def broken_hook(record) -> None:
        raise RuntimeError("no")

    world = make_world(on_turn=[bad, worse, broken_hook, collect])
    assert world.turn().text == "ok"
    assert (bad.kinds, worse.kinds) == ([], ["turn"])
    assert len(collect.records) == 1
    assert sum("turn_hook_failed" in line.message for line in caplog.records) == 3


def test_without_an_observer_the_applications_trace_reaches_both_hops(make_world) -> None:
    world = make_world()
    trace = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=1"}
    world.turn(extra_headers=trace)
    assert len(world.engine.calls) == 2
    for call in world.engine.calls:
        assert {name: call.headers[name] for name in trace} == trace
    assert "traceparent" not in make_and_turn(make_world).headers


def make_and_turn(make_world):
    world = make_world()
    world.turn()
    return world.engine.calls[0]
