"""Pickle and deepcopy: a copy that works, in another process too, or an error that says what to do."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import httpx2
import openai
import pytest

from conserve_langgraph import ConServeChat
from conserve_sdk import AsyncConServeTransport, ConServe, ConServeTransport, conversation

MESSAGES = [{"role": "user", "content": "hello " * 300}]

ELSEWHERE = """
import pickle, sys
copied = pickle.loads(sys.stdin.buffer.read())
{use}
print("answered")
"""
USES = {
    ConServe: "client = copied.openai_client(max_retries=0)",
    ConServeTransport: (
        "import httpx2, openai\n"
        "http = httpx2.Client(transport=copied)\n"
        "client = openai.OpenAI(base_url='http://conserve.invalid/v1', api_key='x', http_client=http, max_retries=0)"
    ),
}
CALL = """
answer = client.chat.completions.create(
    model="emulated", messages=[{"role": "user", "content": "hello"}], max_tokens=4
)
client.close()
assert answer.choices
"""


@pytest.mark.parametrize("kind", list(USES))
def test_a_pickle_works_in_another_process(stack, kind) -> None:
    original = kind(stack.broker_url, wait_s=3.0, on_turn=())
    code = ELSEWHERE.replace("{use}", USES[kind] + CALL.replace("emulated", stack.model))
    ran = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        input=pickle.dumps(original),
        capture_output=True,
        check=False,
    )
    original._runtime.close() if kind is ConServe else original.close()
    assert ran.returncode == 0, ran.stderr.decode()
    assert ran.stdout.split() == [b"answered"]
    assert ran.stderr == b""


def test_a_chat_model_survives_copy_and_pickle(stack) -> None:
    model = ConServeChat(model=stack.model, broker_url=stack.broker_url, temperature=0.5, max_tokens=4)
    try:
        for again in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model)), model.model_copy()):
            assert again.temperature == 0.5
            assert again.conserve is model.conserve  # the process has one set of connections for this broker
            assert again.invoke("hello").content
    finally:
        model.conserve.close()


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("kind", [ConServe, ConServeTransport, AsyncConServeTransport])
def test_a_used_object_can_be_pickled(stack, kind, protocol) -> None:
    """Connections, locks and threads do not travel."""
    with ConServe(stack.broker_url, on_turn=()) as conserve:
        with conversation("pickled"):
            conserve.openai_client().chat.completions.create(model=stack.model, messages=MESSAGES, max_tokens=4)
        used = {
            ConServe: lambda: conserve,
            ConServeTransport: conserve.transport,
            AsyncConServeTransport: conserve.async_transport,
        }[kind]()
        again = pickle.loads(pickle.dumps(used, protocol))
        assert again._runtime is not conserve._runtime
        assert again._runtime.settings == conserve._runtime.settings
        again._runtime.close()
        assert not conserve.closed
        assert copy.deepcopy(used) is used


def test_what_cannot_travel_says_so(stack) -> None:
    """openai's own clients hold locks; they are made from a `ConServe` object wherever they are needed."""
    with ConServe(stack.broker_url) as conserve:
        client = conserve.openai_client()
        assert isinstance(client, openai.OpenAI)
        with pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(client)
        with pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(httpx2.Client(transport=httpx2.MockTransport(lambda _: httpx2.Response(200))))
