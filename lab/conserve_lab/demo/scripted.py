"""The agent's model node for a model that cannot decide anything: real vLLM with random weights.

The server still makes every tool call itself: `tool_choice="required"` with strict tools binds its grammar to the
tools' schemas, and a bias on the end-of-sequence token ends an answer as soon as the grammar allows. Only how many
turns there are comes from the task.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.tools import BaseTool
from langchain_openai.chat_models.base import BaseChatOpenAI

CALL_TOKENS_MAX = 200
"""Room for any call that the grammar allows."""

State = dict[str, Any]
Node = Callable[[State, RunnableConfig], Awaitable[State]]


def scripted_node(
    model: BaseChatOpenAI, tools: Sequence[BaseTool], *, turns: int, eos_token_id: int, answer_tokens: int
) -> Runnable[Any, Any]:
    """Return a node that calls a tool in all turns but the last, and answers in words in that one.

    Args:
        model: chat model to bind.
        tools: tools of the agent, the same in every turn, since they are the beginning of the prompt.
        turns: turns of the conversation.
        eos_token_id: of the served model.
        answer_tokens: length of the last answer.
    """
    caller = calling(model, tools, eos_token_id=eos_token_id)
    speaker = answering(model, tools, answer_tokens=answer_tokens)

    async def agent(state: State, config: RunnableConfig) -> State:
        answered = sum(isinstance(message, AIMessage) for message in state["messages"])
        chosen = caller if answered < turns - 1 else speaker
        return {"messages": [await chosen.ainvoke(state["messages"], config)]}

    return RunnableLambda(agent)


def calling(model: BaseChatOpenAI, tools: Sequence[BaseTool], *, eos_token_id: int) -> Runnable[Any, AIMessage]:
    """Bind the model so that it must call exactly one tool with arguments that satisfy its schema."""
    return model.bind_tools(
        tools,
        tool_choice="required",
        strict=True,
        logit_bias={str(eos_token_id): 100},
        max_tokens=CALL_TOKENS_MAX,
        temperature=0,
    )


def answering(model: BaseChatOpenAI, tools: Sequence[BaseTool], *, answer_tokens: int) -> Runnable[Any, AIMessage]:
    """Bind the model so that it answers in words, with the same tools in its prompt."""
    return model.bind_tools(tools, tool_choice="none", strict=True, max_tokens=answer_tokens, temperature=0)
