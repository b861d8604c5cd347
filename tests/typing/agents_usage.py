"""Only type-checked: what a program with strict types writes against the adapters of agent frameworks."""

from __future__ import annotations

from typing import assert_type

from agents import Agent as SdkAgent
from agents import Model as SdkModel
from agents import RunConfig
from pydantic_ai import Agent
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIResponsesModel

from conserve_openai_agents import ConServeModel as AgentsModel
from conserve_openai_agents import ConServeModelProvider, ConServeResponsesModel
from conserve_pydantic_ai import ConServeModel, ConServeProvider
from conserve_sdk import ConServe, connect


def openai_agents() -> None:
    conserve = connect("http://127.0.0.1:7070")
    provider = ConServeModelProvider(conserve=conserve, default_model="m", use_responses=True)
    assert_type(provider.conserve, ConServe)
    assert_type(provider.get_model(None), SdkModel)
    RunConfig(model_provider=provider)
    SdkAgent(name="a", model=AgentsModel("m", broker_url=["http://a", "http://b"]))
    SdkAgent(name="a", model=ConServeResponsesModel("m", conserve=conserve))
    assert_type(conserve.idle("c"), int)


def openai_agents_wrong() -> None:
    ConServeModelProvider(default_model=3)  # type: ignore[arg-type]
    ConServeModelProvider("http://a", "m")  # type: ignore[call-arg, arg-type]
    AgentsModel()  # type: ignore[call-arg]
    ConServeResponsesModel("m", conserve="http://a")  # type: ignore[arg-type]


async def pydantic_ai() -> None:
    model = ConServeModel("m", broker_url="http://127.0.0.1:7070", api="responses", settings={"temperature": 0.5})
    as_model: Model = model
    assert_type(model.conserve, ConServe)
    agent = Agent(as_model, output_type=int)
    assert_type((await agent.run("Hello", conversation_id="c")).output, int)
    OpenAIResponsesModel("m", provider=ConServeProvider(conserve=model.conserve))


def pydantic_ai_wrong() -> None:
    ConServeModel("m", api="batch")  # type: ignore[arg-type]
    ConServeModel("m", "http://a")  # type: ignore[call-arg]
    ConServeModel("m", tiemout=3)  # type: ignore[call-arg]
    ConServeProvider(conserve=3)  # type: ignore[arg-type]
