"""The error tree: catchable as openai's, one line each, fields survive pickling."""

import copy
import pickle

import openai
import pytest

from conserve_sdk import errors

TREE = {
    "ConServeError": openai.OpenAIError,
    "ConfigError": errors.ConServeError,
    "BrokerError": errors.ConServeError,
    "BrokerUnavailable": errors.BrokerError,
    "LeaseRefused": errors.BrokerError,
    "AccessDenied": errors.BrokerError,
    "RateLimited": errors.BrokerError,
    "ProtocolError": errors.BrokerError,
    "LeaseError": errors.ConServeError,
    "LeaseExpired": errors.LeaseError,
    "LeaseLost": errors.LeaseError,
    "LeaseClosed": errors.LeaseError,
    "EngineError": errors.ConServeError,
    "EngineUnavailable": errors.EngineError,
    "EngineRefused": errors.EngineError,
    "TurnTimeout": errors.EngineError,
}

SAMPLES = [
    errors.ConfigError("set it", key="broker_url"),
    errors.BrokerUnavailable("no answer", broker_url="http://b:1", status=503, code="shutting_down"),
    errors.LeaseRefused("full", reason="no_capacity", retry_after_ms=1500, conversation_id="c 1", status=503),
    errors.AccessDenied("no", status=401, code="key_unknown"),
    errors.RateLimited("slower", retry_after_ms=700, status=429, code="rate_limited"),
    errors.ProtocolError("odd", lease_id="L1"),
    errors.LeaseExpired("over", lease_id="L1"),
    errors.LeaseLost("gone", lease_id="L1", engine_id="d0"),
    errors.LeaseClosed("closed"),
    errors.EngineUnavailable("refused", engine_id="d0", phase="decode", status=502),
    errors.EngineRefused("too long", engine_id="d0"),
    errors.TurnTimeout("too late", budget_ms=30_000, engine_id="d0", phase="prefill"),
]


def test_the_tree_is_complete_and_hangs_together() -> None:
    assert set(errors.__all__) == set(TREE)
    for name, parent in TREE.items():
        assert getattr(errors, name).__bases__ == (parent,)


def test_str_is_one_line_with_the_fields_that_are_set() -> None:
    error = errors.LeaseRefused(
        "no decoder has room:\n  try later", reason="no_capacity", retry_after_ms=0, conversation_id="a\nb"
    )
    assert str(error) == (
        "no decoder has room: try later (conversation_id='a\\nb', reason='no_capacity', retry_after_ms=0)"
    )
    assert str(errors.LeaseClosed("closed")) == "closed"


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_fields_survive_pickle_and_copy(error: errors.ConServeError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert twin.fields() == error.fields()
        assert str(twin) == str(error)


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_every_declared_field_is_an_attribute_and_shown_when_set(error: errors.ConServeError) -> None:
    for name, value in error.fields().items():
        assert getattr(error, name) == value
        assert (f"{name}={value!r}" in str(error)) == (value not in (None, ""))
