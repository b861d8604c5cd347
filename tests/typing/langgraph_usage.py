"""Only type-checked: what a program with strict types writes against the LangGraph adapter."""

from __future__ import annotations

from typing import assert_type

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, AgentState
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langgraph.graph import MessagesState, StateGraph

from conserve_langgraph import ChatConServe, ConServeCallbackHandler, ConServeChat, ConServeMiddleware
from conserve_sdk import ConServe, connect


def models() -> None:
    llm = ConServeChat(model="m", broker_url=["http://a", "http://b"], conversation_id="c", temperature=0.1)
    as_model: BaseChatModel = llm
    assert_type(ChatConServe(model="m", conserve=connect("http://a")), ConServeChat)
    assert_type(connect("http://a").idle("c"), int)
    builder = StateGraph(MessagesState)
    builder.add_node("agent", llm)  # type: ignore[type-var]  # LangChain's base class fixes what a model may be given
    builder.add_node("with_tools", llm.bind_tools([str.upper], strict=True))
    create_agent(as_model, [], middleware=[ConServeMiddleware(), ConServeMiddleware("http://a")])


def handlers(conserve: ConServe) -> None:
    handler: BaseCallbackHandler = ConServeCallbackHandler()
    middleware: AgentMiddleware[AgentState[object]] = ConServeMiddleware(conserve)
    create_agent("m", [], middleware=[middleware])
    ConServeChat(model="m").invoke("hello", {"callbacks": [handler]})


def langgraph_wrong() -> None:
    ConServeChat(model="m").conversation_id = 3  # type: ignore[assignment]
    ChatConServe("m")  # type: ignore[call-arg]
    ConServeChat(model="m").bind_tools(3)  # type: ignore[arg-type]
    ConServeMiddleware(3)  # type: ignore[arg-type]
    ConServeMiddleware(broker_url="http://a")  # type: ignore[call-arg]
    ConServeCallbackHandler("http://a")  # type: ignore[call-arg]
