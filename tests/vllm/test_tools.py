"""Valid tool calls from a random model: the grammar sees to the shape, and both legs see the same tools."""

import json

import pytest

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "add two numbers",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"left": {"type": "integer"}, "unit": {"type": "string", "enum": ["lines", "words"]}},
            "required": ["left", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def tool_body(raw, fleet):
    """The recipe: a strict tool, `required`, and a push towards the end wherever the grammar allows it."""

    def make(messages, **extra):
        push = {str(fleet.eos_token_id): 100}
        return raw.body(messages, tools=[ADD], max_tokens=300, logit_bias=push) | {"tool_choice": "required"} | extra

    return make


def arguments_of(answer):
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    return json.loads(call["function"]["arguments"])


@pytest.mark.parametrize("seed", range(4))
def test_a_migrated_turn_makes_one_call_that_satisfies_the_schema(raw, tool_body, seed):
    arguments = arguments_of(raw.migrate(tool_body(raw.task("tools"), temperature=1, seed=seed)))
    assert set(arguments) == {"left", "unit"}
    assert isinstance(arguments["left"], int)
    assert arguments["unit"] in {"lines", "words"}


def test_a_tool_loop_ends_in_a_plain_answer_from_the_decoder(raw, fleet, tool_body):
    before = fleet.metrics("p0")
    messages = raw.task("loop")
    first = raw.migrate(tool_body(messages))
    said = first["choices"][0]["message"]
    call = said["tool_calls"][0]
    messages += [
        {"role": "assistant", "content": said["content"], "tool_calls": said["tool_calls"]},
        {"role": "tool", "tool_call_id": call["id"], "content": "42"},
    ]
    last = tool_body(messages, tool_choice="none", max_tokens=16, logit_bias=None)

    answer = raw.ask("d0", last)

    assert raw.said(answer) == raw.said(raw.ask("a0", last))
    assert not answer["choices"][0]["message"].get("tool_calls")
    assert raw.cached(answer) >= first["usage"]["prompt_tokens"] // 32 * 32 - 32
    assert fleet.metrics("p0").since(before).requests == 1


def test_tools_are_part_of_the_prompt_so_both_legs_must_carry_them(raw, tool_body):
    with_tools = raw.prefill(tool_body(raw.task("legs")))
    without = raw.prefill(raw.body(raw.task("legs")))
    assert len(with_tools["prompt_token_ids"]) > len(without["prompt_token_ids"])
