"""ConServeChat as a LangChain chat model."""

import asyncio
import copy
import gc
import pickle
from typing import Literal

import openai
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_core.prompts import ChatPromptTemplate
from openai.resources.chat import AsyncCompletions, Completions
from pydantic import BaseModel, ValidationError

from conserve_lab.stack import LocalStack
from conserve_langgraph import ChatConServe, ConServeChat
from conserve_sdk import ConServe
from conserve_sdk._lean import AsyncOpenAI, OpenAI
from conserve_sdk.errors import ConfigError
from conserve_sdk.telemetry import TurnCollector


class Verdict(BaseModel):
    """A verdict on a change."""

    word: Literal["good", "bad"]
    score: int


def test_same_prompt_same_answer_streamed_or_not(llm: ConServeChat) -> None:
    answer = llm.invoke("Tell me about leases.")
    streamed = AIMessageChunk("")
    for chunk in llm.stream("Tell me about leases."):
        streamed += chunk
    assert streamed.text == answer.text != ""
    assert streamed.usage_metadata == answer.usage_metadata
    assert answer.usage_metadata is not None


def test_prompt_values_are_prompts_not_states(llm: ConServeChat) -> None:
    prompt = ChatPromptTemplate([("system", "Be brief."), ("user", "{question}")])
    assert (prompt | llm).invoke({"question": "Who renews a lease?"}).text


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output(llm: ConServeChat, method: Literal["function_calling", "json_schema"]) -> None:
    verdict = llm.with_structured_output(Verdict, method=method).invoke("Judge this change.")
    assert isinstance(verdict, Verdict)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_asyncio_run_three_times(llm: ConServeChat, turns: TurnCollector) -> None:
    for number in range(3):
        asyncio.run(llm.ainvoke(f"Question {number}"))
        gc.collect()  # the connections of a loop that is gone say so when they are collected: here, not in another test
    assert len(turns.records) == 3


def test_models_with_the_same_broker_share_its_connection(stack: LocalStack) -> None:
    one = ConServeChat(model="emulated", broker_url=stack.broker_url)
    two = ConServeChat(model="emulated", broker_url=stack.broker_url)
    assert one.conserve is two.conserve
    one.conserve.close()
    assert ConServeChat(model="emulated", broker_url=stack.broker_url).conserve is not one.conserve


def test_pickled_model_connects_by_itself(stack: LocalStack) -> None:
    llm = ConServeChat(model="emulated", broker_url=stack.broker_url, temperature=0.5, conversation_id="c")
    copied = pickle.loads(pickle.dumps(llm))
    assert (copied.model_name, copied.temperature, copied.conversation_id) == ("emulated", 0.5, "c")
    assert copied.invoke("Hello").text == llm.invoke("Hello").text
    llm.conserve.close()


def test_deep_copy_shares_the_connection(llm: ConServeChat) -> None:
    copied = copy.deepcopy(llm)
    assert copied is not llm
    assert copied.conserve is llm.conserve
    assert copied.invoke("Hello").text


def test_its_clients_are_lean(llm: ConServeChat) -> None:
    for model in (llm, copy.deepcopy(llm), pickle.loads(pickle.dumps(ConServeChat(model="m", broker_url="http://b")))):
        assert model.client is model.root_client.chat.completions
        assert isinstance(model.root_client, OpenAI)
        assert model.async_client is model.root_async_client.chat.completions
        assert isinstance(model.root_async_client, AsyncOpenAI)


def test_clients_that_were_given_are_used_as_they_are(conserve: ConServe) -> None:
    given, nonblocking = openai.OpenAI(api_key="k"), openai.AsyncOpenAI(api_key="k")
    own = Completions(given)
    model = ConServeChat(
        model="m",
        conserve=conserve,
        client=own,
        root_client=given,
        async_client=AsyncCompletions(nonblocking),
        root_async_client=nonblocking,
    )
    assert model.client is own
    assert type(model.root_client) is openai.OpenAI
    assert type(model.async_client) is AsyncCompletions


def test_own_http_clients_are_refused_with_the_remedy(conserve: ConServe) -> None:
    with pytest.raises(ValidationError, match="makes its own HTTP clients: leave out base_url, give broker_url"):
        ConServeChat(model="emulated", conserve=conserve, base_url="http://engine/v1")


def test_without_a_broker_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONSERVE_BROKER_URL", raising=False)
    with pytest.raises(ConfigError, match="CONSERVE_BROKER_URL"):
        ConServeChat(model="emulated")


def test_tracing_names_and_alias(llm: ConServeChat) -> None:
    assert ChatConServe is ConServeChat
    assert llm._llm_type == "conserve-chat"
    assert llm._get_ls_params()["ls_provider"] == "conserve"
