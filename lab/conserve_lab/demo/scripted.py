"""The agent's model node for a model that cannot decide anything: real vLLM with random weights.

The server still makes every tool call itself: `tool_choice="required"` with strict tools binds its grammar to the
tools' schemas, and a bias ends an answer as soon as the grammar allows. Only how many turns there are comes from the
task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.tools import BaseTool
from langchain_openai.chat_models.base import BaseChatOpenAI

CALL_TOKENS_MAX = 320
"""Room for any call that the grammar allows: 40 characters of free text may be 6 tokens each (`\\uXXXX`)."""

State = dict[str, Any]


def scripted_node(
    model: BaseChatOpenAI,
    tools: Sequence[BaseTool],
    *,
    turns: int,
    call_bias: Mapping[str, int],
    answer_tokens: int,
) -> Runnable[Any, Any]:
    """Return a node that calls a tool in all turns but the last, and answers in words in that one.

    Args:
        model: chat model to bind.
        tools: tools of the agent, the same in every turn, since they are the beginning of the prompt.
        turns: turns of the conversation.
        call_bias: `logit_bias` of the turns that call.
        answer_tokens: length of the last answer.
    """
    caller = calling(model, tools, call_bias=call_bias)
    speaker = answering(model, tools, answer_tokens=answer_tokens)

    async def agent(state: State, config: RunnableConfig) -> State:
        chosen = caller if must_call(state["messages"], turns=turns) else speaker
        return {"messages": [await chosen.ainvoke(state["messages"], config)]}

    return RunnableLambda(agent)


def must_call(history: Sequence[AnyMessage], *, turns: int) -> bool:
    """Return whether the turn that follows this history calls a tool: all do but the last."""
    return sum(isinstance(message, AIMessage) for message in history) < turns - 1


def calling(
    model: BaseChatOpenAI, tools: Sequence[BaseTool], *, call_bias: Mapping[str, int]
) -> Runnable[Any, AIMessage]:
    """Bind the model so that it must call exactly one tool with arguments that satisfy its schema."""
    return model.bind_tools(
        tools,
        tool_choice="required",
        strict=True,
        logit_bias=dict(call_bias),
        max_tokens=CALL_TOKENS_MAX,
        temperature=0,
    )


def answering(model: BaseChatOpenAI, tools: Sequence[BaseTool], *, answer_tokens: int) -> Runnable[Any, AIMessage]:
    """Bind the model so that it answers in words, with the same tools in its prompt."""
    return model.bind_tools(tools, tool_choice="none", strict=True, max_tokens=answer_tokens, temperature=0)
