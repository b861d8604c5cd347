"""Long prompts in slices: what is cut, what is sent, and what happens when a slice goes wrong. In both colours."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conserve_sdk import conversation
from conserve_sdk._bodies import read_body
from conserve_sdk._kind import Kind
from conserve_sdk._slices import slice_legs
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import EngineReply, ScriptedEngine

SIZE = 1_024


def legs(kind: Kind = Kind.CHAT, *, held: int = 0, size: int = 8, **body: object) -> list[dict]:
    turn = read_body(kind, json.dumps({"model": "m", **body}).encode())
    return [json.loads(leg) for leg in slice_legs(turn, held_items=held + 1 if held else 0, slice_chars=size)]


def texts(messages: list[dict]) -> str:
    return "".join(message["content"] for message in messages)


class TestCuts:
    @pytest.mark.parametrize(("chars", "cuts"), [(12, []), (13, [8]), (20, [8]), (21, [8, 16])])
    def test_the_rest_is_half_a_slice_to_one_and_a_half(self, chars: int, cuts: list[int]) -> None:
        found = legs(messages=[{"role": "user", "content": "x" * chars}])
        assert [len(texts(leg["messages"])) for leg in found] == cuts
        assert [len(leg["prompt"]) for leg in legs(Kind.COMPLETIONS, prompt="x" * chars)] == cuts

    @given(
        sizes=st.lists(st.integers(0, 30), max_size=6),
        roles=st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=6, max_size=6),
        held=st.integers(0, 6),
        size=st.integers(1, 20),
    )
    @example(sizes=[8, 8, 8], roles=["user"] * 6, held=1, size=8)
    @example(sizes=[40], roles=["assistant"] * 6, held=0, size=8)
    def test_each_slice_is_a_longer_beginning(self, sizes: list[int], roles: list[str], held: int, size: int) -> None:
        messages = [
            {"role": role, "content": "abcdefghijklmnopqrstuvwxyzabcd"[:length]}
            for role, length in zip(roles, sizes, strict=False)
        ]
        found = [leg["messages"] for leg in legs(messages=messages, held=held, size=size)]
        whole = texts(messages)
        for beginning in found:
            *before, last = beginning
            assert before == messages[: len(before)]
            assert {**messages[len(before)], "content": last["content"]} == last
            assert whole.startswith(texts(beginning))
            if last != messages[len(before)]:
                assert last["role"] != "assistant", "what the model said is not cut"
        lengths = [(len(beginning), len(texts(beginning))) for beginning in found]
        assert lengths == sorted(set(lengths)), "each goes on where the last one ended"
        assert all(len(beginning) > held or beginning == messages[: len(beginning)] for beginning in found)

    def test_a_slice_computes_the_prompt_and_says_next_to_nothing(self) -> None:
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        options = {"tools": tools, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 900}
        (leg,) = legs(messages=[{"role": "user", "content": "x" * 16}], temperature=0.5, seed=7, **options)
        assert leg == {
            "model": "m",
            "tools": tools,
            "stream": False,
            "max_tokens": 1,
            "temperature": 0.5,
            "seed": 7,
            "messages": [{"role": "user", "content": "x" * 8}],
        }

    def test_parts_are_not_cut(self) -> None:
        parts = {
            "role": "user",
            "content": [{"type": "text", "text": "x" * 40}, {"type": "image_url", "image_url": {}}],
        }
        opening, question = {"role": "system", "content": "s" * 4}, {"role": "user", "content": "q" * 20}
        found = [leg["messages"] for leg in legs(messages=[opening, parts, question])]
        assert found[:2] == [[opening], [opening, parts, {**question, "content": "q" * 4}]]

    @pytest.mark.parametrize(
        "body",
        [
            {"messages": []},
            {"messages": "nonsense" * 9},
            {"messages": ["nonsense" * 9, 7, None]},
            {"messages": [{"role": "user", "content": "x" * 99}], "n": 2},
            {"messages": [{"role": "user", "content": "x" * 99}], "truncate_prompt_tokens": 9},
        ],
    )
    def test_what_cannot_be_cut_is_sent_whole(self, body: dict) -> None:
        assert [leg for leg in legs(**body) if leg["messages"]] == []
        assert legs(Kind.RESPONSES, input="x" * 99) == []
        assert legs(Kind.COMPLETIONS, prompt=[1] * 99) == []


@pytest.fixture
def sliced(make_world):
    """A world whose first turns stay on their decoder; what its engines say first can be given."""

    def make(*replies, **options):
        options.setdefault("settings", BrokerSettings())
        return make_world(engine=ScriptedEngine(*replies, then="answer"), slice_chars=SIZE, **options)

    return make


class TestTurns:
    def test_a_long_prompt_comes_in_slices_by_rank(self, sliced) -> None:
        world = sliced()
        assert world.turn("x" * (3 * SIZE), max_tokens=50).text
        *before, turn = world.engine.calls
        assert [len(call.messages[-1]["content"]) for call in before] == [SIZE, 2 * SIZE]
        assert {call.body["max_tokens"] for call in before} == {1}
        assert len({call.engine for call in world.engine.calls}) == 1
        (rank,) = {call.headers["x-vllm-priority"] for call in world.engine.calls}
        assert int(rank) > 1_700_000_000_000
        assert len(turn.messages[-1]["content"]) == 3 * SIZE
        assert world.record.hops == 3

    def test_an_application_that_ranks_its_requests_has_its_way(self, sliced) -> None:
        world = sliced()
        world.turn("x" * (3 * SIZE), extra_headers={"X-Vllm-Priority": "7"})
        assert [call.headers.get_list("x-vllm-priority") for call in world.engine.calls] == [["7"]] * 3

    def test_a_short_one_has_no_rank(self, sliced) -> None:
        world = sliced()
        world.turn("x" * SIZE)
        (call,) = world.engine.calls
        assert "x-vllm-priority" not in call.headers

    def test_of_a_follow_up_only_what_is_new_is_cut(self, sliced) -> None:
        world = sliced()
        history = [{"role": "user", "content": "x" * (3 * SIZE)}]
        world.turn(messages=history)
        history += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "y" * 40}]
        world.turn(messages=history)
        assert len(world.engine.calls) == 4, "a short append is not sliced, however long the history"
        history += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "z" * (2 * SIZE)}]
        world.turn(messages=history)
        (cut,) = world.engine.calls[4:-1]
        assert cut.messages[:-1] == history[:-1]
        assert SIZE // 2 < len(cut.messages[-1]["content"]) <= SIZE

    def test_of_a_longer_prompt_string_only_what_is_new_is_cut(self, sliced) -> None:
        world = sliced(EngineReply.completion(), EngineReply.completion(), EngineReply.completion())

        def ask(prompt: str) -> list[int]:
            before = len(world.engine.calls)
            client = world.conserve.openai_client(max_retries=0)
            with conversation("strings"):
                client.completions.create(model="test-model", prompt=prompt)
            return [len(call.body["prompt"]) for call in world.engine.calls[before:]]

        assert ask("x" * (3 * SIZE)) == [SIZE, 2 * SIZE, 3 * SIZE]
        assert ask("x" * (3 * SIZE) + "y" * SIZE) == [4 * SIZE]
        assert ask("x" * (3 * SIZE) + "y" * (3 * SIZE)) == [5 * SIZE, 6 * SIZE]

    def test_a_lost_lease_begins_anew(self, sliced) -> None:
        world = sliced()
        history = [{"role": "user", "content": "x" * (3 * SIZE)}]
        world.turn(messages=history)
        world.broker.restart_engine(world.record.decoder_id)
        assert world.conserve.flush()
        history += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "y"}]
        world.turn(messages=history)
        world.turn(messages=[*history, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "z"}])
        assert [record.hops for record in world.turns.records] == [3, 3, 1]

    @pytest.mark.parametrize("bad", [EngineReply.failure(400), EngineReply.failure(503), EngineReply.broken()])
    def test_a_slice_that_goes_wrong_costs_only_itself(self, sliced, bad) -> None:
        world = sliced(bad)
        assert world.turn("x" * (4 * SIZE)).text
        assert len(world.engine.calls) == 2, "the other slices are left out"
        assert world.record.failovers == 0
        assert not world.reports("engine_failure")

    def test_a_prefiller_is_fed_in_slices_and_the_decoder_pulls_all_of_it(self, sliced) -> None:
        world = sliced(settings=BrokerSettings(placement=PAPER))
        assert world.turn("x" * (3 * SIZE)).text
        engines = [call.engine for call in world.engine.calls]
        assert engines[:3] == ["p0"] * 3
        assert engines[3].startswith("d")
        assert [call.is_prefill for call in world.engine.calls] == [False, False, True, False]
        assert world.record.migrated
