"""Which conversation a model call belongs to, and what is sent of that."""

from agents import ModelSettings

from conserve_openai_agents._identity import name_turn
from conserve_sdk import conversation

HEADER = "X-ConServe-Conversation"
RUN = "agents-sdk:run:1"


def test_own_prompt_cache_key_is_forwarded() -> None:
    settings = ModelSettings(extra_args={"prompt_cache_key": "mine"})
    named = name_turn(settings)
    assert named.settings is settings
    assert (named.conversation, named.owned) == ("mine", False)
    assert name_turn(ModelSettings(extra_body={"prompt_cache_key": "mine"})).conversation == "mine"


def test_generated_key_becomes_the_header() -> None:
    settings = ModelSettings(extra_args={"prompt_cache_key": RUN, "seed": 1}, extra_headers={"X-A": "b"})
    named = name_turn(settings)
    assert named.settings.extra_args == {"seed": 1}
    assert named.settings.extra_headers == {"X-A": "b", HEADER: RUN}
    assert (named.conversation, named.owned) == (RUN, True)


def test_the_key_of_a_session_is_not_the_runs_own() -> None:
    named = name_turn(ModelSettings(extra_args={"prompt_cache_key": "agents-sdk:session:1"}))
    assert (named.conversation, named.owned) == ("agents-sdk:session:1", False)


def test_header_of_the_application_wins_over_the_generated_key() -> None:
    for name in (HEADER.lower(), "X-Session-ID"):
        named = name_turn(ModelSettings(extra_args={"prompt_cache_key": RUN}, extra_headers={name: "mine"}))
        assert named.settings.extra_headers == {name: "mine"}
        assert named.settings.extra_args is None
        assert (named.conversation, named.owned) == ("mine", False)


def test_the_block_wins_over_the_generated_key_and_over_a_session_header() -> None:
    settings = ModelSettings(extra_args={"prompt_cache_key": RUN}, extra_headers={"X-Session-ID": "s"})
    with conversation("block"):
        named = name_turn(settings)
    assert (named.conversation, named.owned) == ("block", False)
    assert named.settings.extra_headers == {"X-Session-ID": "s"}


def test_a_host_takes_only_calls_that_have_nothing_but_their_run() -> None:
    riding = name_turn(ModelSettings(extra_args={"prompt_cache_key": RUN}), host="around")
    assert (riding.conversation, riding.owned) == ("around", False)
    assert riding.settings.extra_headers == {HEADER: "around"}
    session = name_turn(ModelSettings(extra_args={"prompt_cache_key": "agents-sdk:session:1"}), host="around")
    assert session.conversation == "agents-sdk:session:1"


def test_nothing_names_it() -> None:
    settings = ModelSettings()
    assert name_turn(settings).conversation is None
    assert name_turn(settings).settings is settings
