"""Which conversation a request belongs to, and that naming it loses nothing."""

from pydantic_ai.messages import ModelRequest, UserPromptPart
from pydantic_ai.settings import ModelSettings

from conserve_pydantic_ai._identity import name_conversation
from conserve_sdk import conversation

HEADER = "X-ConServe-Conversation"
MESSAGES = [ModelRequest(parts=[UserPromptPart("hello")], conversation_id="run's own")]


def test_the_runs_conversation_becomes_the_header() -> None:
    settings = ModelSettings(temperature=0.5, extra_headers={"X-A": "b"})
    named, found = name_conversation(MESSAGES, settings, ModelSettings(extra_headers={"X-A": "a", "X-C": "d"}))
    assert found == "run's own"
    assert named == {"temperature": 0.5, "extra_headers": {"X-A": "b", "X-C": "d", HEADER: "run's own"}}
    assert settings == {"temperature": 0.5, "extra_headers": {"X-A": "b"}}


def test_what_the_application_says_wins() -> None:
    for name in (HEADER.lower(), "X-Session-ID"):
        settings = ModelSettings(extra_headers={name: "mine"})
        assert name_conversation(MESSAGES, settings, None) == (settings, "mine")
        assert name_conversation(MESSAGES, None, settings) == (None, "mine")
    with conversation("block"):
        assert name_conversation(MESSAGES, None, None) == (None, "block")


def test_nothing_names_it() -> None:
    assert name_conversation([ModelRequest(parts=[UserPromptPart("hello")])], None, None) == (None, None)
    assert name_conversation([], None, None) == (None, None)
