"""Do the answers that came through a migration equal those of one plain server? Greedy, turn by turn.

Each turn is asked again with the very same messages of an aggregated server without a connector. Where that server
does not even agree with itself when asked twice, the turn says nothing about migrations and is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.runnables import Runnable

from conserve_lab.demo.agent import AgentRun
from conserve_lab.demo.scripted import must_call

_ASKED_AT_ONCE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Equality:
    """Turns compared.

    Attributes:
        equal: turns whose answer was the same.
        compared: turns for which the reference agreed with itself.
        unstable: turns for which it did not.
        differences: the first few, in one line each.
    """

    equal: int
    compared: int
    unstable: int
    differences: tuple[str, ...]


async def compare_with_reference(
    runs: Sequence[AgentRun], *, caller: Runnable[object, AIMessage], speaker: Runnable[object, AIMessage]
) -> Equality:
    """Ask the reference server for every turn of the runs again.

    Args:
        runs: finished conversations.
        caller: the reference model, bound as the agent's was for tool calls.
        speaker: the reference model, bound as the agent's was for words.
    """
    gate = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def verdict(run: AgentRun, position: int) -> str:
        given = run.messages[position]
        assert isinstance(given, AIMessage)
        history = list(run.messages[:position])
        reference = caller if must_call(history, turns=run.task.turns) else speaker
        async with gate:
            first = await reference.ainvoke(history)
            if _content(first) == _content(given):
                return ""
            again = await reference.ainvoke(history)
        if _content(first) != _content(again):
            return "unstable"
        got, wanted = f"{_content(given)!r:.80}", f"{_content(first)!r:.80}"
        return f"{run.task.conversation_id}, message {position}: {got} instead of {wanted}"

    asked = [verdict(run, position) for run in runs for position in _answers(run.messages)]
    verdicts = await asyncio.gather(*asked)
    unstable = verdicts.count("unstable")
    differences = [verdict for verdict in verdicts if verdict not in ("", "unstable")]
    return Equality(
        equal=verdicts.count(""),
        compared=len(verdicts) - unstable,
        unstable=unstable,
        differences=tuple(differences[:5]),
    )


def _answers(messages: Sequence[AnyMessage]) -> list[int]:
    return [position for position, message in enumerate(messages) if isinstance(message, AIMessage)]


def _content(message: AIMessage) -> tuple[str, tuple[tuple[str, str], ...]]:
    """What the model said, without the ids that a server draws at random."""
    return message.text, tuple((call["name"], repr(sorted(call["args"].items()))) for call in message.tool_calls)
