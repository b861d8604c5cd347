"""The emulated model: reversible tokens, a prefix-stable template, deterministic answers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_lab.emulator.language import (
    Call,
    ChatMessage,
    LanguageSettings,
    Mark,
    NamedTool,
    Speaker,
    Tool,
    Wish,
    assemble,
    block_keys,
    mark_id,
    parse_prompt,
    render_chat,
    text_of,
    text_tokens,
)
from conserve_lab.emulator.language.hints import hints_of
from conserve_lab.emulator.language.prompt import canonical_arguments, parse_tools
from conserve_lab.emulator.language.tokens import new_tokens, pieces

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SPEAKER = Speaker(LanguageSettings())
READ_FILE = {
    "type": "function",
    "function": {
        "name": "read_file",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@given(TEXT)
def test_text_survives_the_tokenizer(text: str) -> None:
    ids = text_tokens(text)
    assert text_of(ids) == text
    assert "".join(pieces(ids)) == text
    assert len(ids) == -(-len(text.encode()) // 4)


def test_lone_surrogates_do_not_break_the_tokenizer() -> None:
    assert text_of(text_tokens("a\ud800b")) == "a?b"


MESSAGES = st.lists(
    st.builds(
        ChatMessage,
        st.sampled_from(["system", "user", "assistant", "tool"]),
        TEXT,
        st.lists(st.builds(Call, st.sampled_from(["f", "get_it"]), st.just('{"a": 1}')), max_size=2).map(tuple),
    ),
    max_size=6,
)


@given(MESSAGES)
def test_a_rendered_chat_is_read_back(messages: list[ChatMessage]) -> None:
    dialogue = parse_prompt(render_chat(messages, tools=[READ_FILE]))
    assert list(dialogue.messages) == messages
    assert [tool.name for tool in dialogue.tools] == ["read_file"]


@given(MESSAGES, MESSAGES)
def test_a_longer_conversation_extends_the_tokens_of_the_shorter(
    first: list[ChatMessage], more: list[ChatMessage]
) -> None:
    shorter = render_chat(first, add_generation_prompt=False)
    longer = render_chat([*first, *more], add_generation_prompt=False)
    assert longer[: len(shorter)] == shorter
    keys, more_keys = block_keys(shorter, block_size=4), block_keys(longer, block_size=4)
    assert more_keys[: len(keys)] == keys


@given(st.text(max_size=20), st.integers(0, 3))
def test_a_generated_answer_comes_back_with_its_own_tokens(question: str, calls_min: int) -> None:
    speaker = Speaker(LanguageSettings(tool_calls_min=calls_min, tool_calls_max=calls_min))
    messages = [ChatMessage("user", question)]
    prompt = render_chat(messages, tools=[READ_FILE])
    answer = speaker.answer(prompt, Wish())
    said = assemble(answer)
    spaced = [Call(call.name, json.dumps(json.loads(call.arguments), indent=1)) for call in said.calls]
    again = render_chat(
        [*messages, ChatMessage("assistant", said.content, tuple(spaced))],
        tools=[READ_FILE],
        add_generation_prompt=False,
    )
    assert again == prompt + answer.token_ids


def test_block_keys_depend_on_everything_before_and_on_the_salt() -> None:
    one, two = text_tokens("aaaabbbbccccdddd"), text_tokens("xaaabbbbccccdddd")
    assert block_keys(one, block_size=2)[1] != block_keys(two, block_size=2)[1]
    assert block_keys(one, block_size=2) != block_keys(one, block_size=2, salt="s")
    assert len(block_keys(one, block_size=3)) == 1


def test_unknown_tokens_are_read_as_something_and_never_break() -> None:
    odd = new_tokens([1, 2, 0xFE00_00FF, mark_id(Mark.ARGUMENTS), 7, 0xFFFF_FFFF])
    assert parse_prompt(odd).messages == ()
    assert parse_tools("{") == ()
    assert parse_tools("3") == ()
    assert parse_tools('[3, {"function": 4}, {"name": "flat"}]') == (Tool("flat"),)
    assert canonical_arguments("{broken") == "{broken"
    assert SPEAKER.answer(odd, Wish()).token_ids


def test_the_same_prompt_gives_the_same_answer_in_another_process() -> None:
    code = (
        "from conserve_lab.emulator.language import *\n"
        "p = render_chat([ChatMessage('user', 'hello')])\n"
        "a = Speaker(LanguageSettings()).answer(p, Wish())\n"
        "print(list(a.token_ids), block_keys(p + a.token_ids, block_size=2))"
    )
    prompt = render_chat([ChatMessage("user", "hello")])
    answer = SPEAKER.answer(prompt, Wish())
    expected = f"{list(answer.token_ids)} {block_keys(prompt + answer.token_ids, block_size=2)}"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        assert done.stdout.strip() == expected


def test_seed_and_index_change_the_words_but_limits_only_cut_them() -> None:
    prompt = render_chat([ChatMessage("user", "hello")])
    whole = SPEAKER.answer(prompt, Wish())
    assert 20 <= len(whole.token_ids) <= 61
    assert whole.finish_reason == "stop"
    assert whole.token_ids[-1] == mark_id(Mark.END)
    for changed in (Wish(seed=1), Wish(index=1)):
        assert SPEAKER.answer(prompt, changed).token_ids != whole.token_ids
    short = SPEAKER.answer(prompt, Wish(max_tokens=5))
    assert (short.token_ids, short.finish_reason) == (whole.token_ids[:5], "length")
    assert len(SPEAKER.answer(prompt, Wish(max_tokens=300, ignore_eos=True)).token_ids) == 300
    assert len(SPEAKER.answer(prompt, Wish(min_tokens=100)).token_ids) >= 99


def test_stop_strings_end_the_text_before_the_word_or_after_it() -> None:
    prompt = render_chat([ChatMessage("user", "hello")])
    text = assemble(SPEAKER.answer(prompt, Wish())).content
    word = text.split()[3]
    stopped = SPEAKER.answer(prompt, Wish(stop=["never said", word]))
    assert assemble(stopped).content == text[: text.index(word)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", word)
    kept = SPEAKER.answer(prompt, Wish(stop=[word], include_stop=True))
    assert assemble(kept).content == text[: text.index(word) + len(word)]
    assert assemble(SPEAKER.answer(prompt, Wish(stop=["never said"]))).content == text


def run_agent(question: str, settings: LanguageSettings) -> list[str]:
    """Play an agent's loop and return the tools called."""
    speaker = Speaker(settings)
    messages = [ChatMessage("system", "You help."), ChatMessage("user", question)]
    called: list[str] = []
    while True:
        answer = speaker.answer(render_chat(messages, tools=[READ_FILE, ADD]), Wish())
        said = assemble(answer)
        messages.append(ChatMessage("assistant", said.content, tuple(Call(c.name, c.arguments) for c in said.calls)))
        if not said.calls:
            assert answer.finish_reason == "stop"
            assert f"result {len(called)}" in said.content or not called
            return called
        assert answer.finish_reason == "tool_calls"
        called += [call.name for call in said.calls]
        messages.append(ChatMessage("tool", f"result {len(called)}"))


def test_an_agent_loop_ends_after_its_number_of_calls_and_names_the_last_result() -> None:
    lengths = {len(run_agent(f"question {number}", LanguageSettings())) for number in range(60)}
    assert min(lengths) >= 2
    assert max(lengths) <= 11
    assert len(lengths) >= 6
    exact = LanguageSettings(tool_calls_min=1, tool_calls_max=1)
    assert len(run_agent("anything", exact)) == 1
    assert run_agent("anything", LanguageSettings(tool_calls_min=0, tool_calls_max=0)) == []


def test_tools_named_by_the_user_are_called_in_turn() -> None:
    settings = LanguageSettings(tool_calls_min=4, tool_calls_max=4)
    assert run_agent("please read the file", settings) == ["read_file"] * 4
    assert run_agent("read the file, then add", settings) == ["read_file", "add", "read_file", "add"]


def test_tool_choice_is_obeyed() -> None:
    prompt = render_chat([ChatMessage("user", "x"), ChatMessage("assistant", "done")], tools=[READ_FILE, ADD])
    assert not assemble(SPEAKER.answer(prompt, Wish())).calls
    assert not assemble(SPEAKER.answer(prompt, Wish(tool_choice="none"))).calls
    required = SPEAKER.answer(prompt, Wish(tool_choice="required"))
    assert (len(assemble(required).calls), required.finish_reason) == (1, "tool_calls")
    named = SPEAKER.answer(prompt, Wish(tool_choice=NamedTool("add")))
    assert (assemble(named).calls[0].name, named.finish_reason) == ("add", "stop")
    assert assemble(named).calls[0].arguments == "{}"
    outside = SPEAKER.answer(render_chat([ChatMessage("user", "x")]), Wish(tools=[Tool("given")]))
    assert assemble(outside).calls[0].name == "given"


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 7])
def test_a_call_cut_off_by_the_limit_comes_back_as_text(tokens: int) -> None:
    prompt = render_chat([ChatMessage("user", "read")], tools=[READ_FILE])
    whole = assemble(SPEAKER.answer(prompt, Wish()))
    cut = SPEAKER.answer(prompt, Wish(max_tokens=tokens))
    said = assemble(cut)
    assert cut.finish_reason == "length"
    assert said.content.startswith("<tool_call>")
    assert not said.calls
    call = f'<tool_call>{{"name": "{whole.calls[0].name}", "arguments": {whole.calls[0].arguments}'
    assert call.startswith(said.content)


def test_a_whole_call_without_its_end_mark_is_still_a_call() -> None:
    prompt = render_chat([ChatMessage("user", "read")], tools=[READ_FILE])
    whole = SPEAKER.answer(prompt, Wish())
    cut = SPEAKER.answer(prompt, Wish(max_tokens=len(whole.token_ids) - 1))
    assert cut.finish_reason == "length"
    assert assemble(cut).calls[0].arguments == assemble(whole).calls[0].arguments


def test_answers_bound_to_a_schema_or_to_choices() -> None:
    prompt = render_chat([ChatMessage("user", "x")])
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}, "required": ["n"]}
    assert json.loads(assemble(SPEAKER.answer(prompt, Wish(answer_schema=schema))).content)["n"] >= 3
    assert assemble(SPEAKER.answer(prompt, Wish(choices=["yes", "no"]))).content in {"yes", "no"}


def test_hints_are_numbers_quotes_scripts_and_words() -> None:
    hints = hints_of("add 17 and -2.5 to `a b`, \"c\" and 'd' for 你好 in v2 don't")
    assert hints.numbers == (17, -2.5)
    assert hints.quoted == ("a b", "c", "d")
    assert hints.other_script == ("你好",)
    assert hints_of("alpha be").phrases == ("alpha",)


def test_settings_must_be_ranges() -> None:
    with pytest.raises(ValueError, match=r"tool_calls_min\.\.tool_calls_max must be a range"):
        LanguageSettings(tool_calls_min=3, tool_calls_max=2)
