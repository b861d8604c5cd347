"""The demo's workload: what each agent is asked, and when it arrives. The same seed gives the same workload."""

from __future__ import annotations

import random
from dataclasses import dataclass

SYSTEM_PROMPT = (
    "You maintain the billing code of a small shop. Work on the reported issue step by step: use the tools to read "
    "files, query the database and calculate. Use one tool at a time. When you know the answer, say it in a few words."
)

_PARTS = ("billing", "catalog", "checkout", "customers", "export", "imports", "ledger", "orders", "parcels", "pricing",
          "refunds", "reports", "search", "stock", "tax", "users")  # fmt: skip
_KINDS = ("adapter", "cache", "client", "form", "index", "job", "model", "parser", "queue", "rules", "schema", "view")
_FAULTS = (
    "The total of {part} {number} is off by {cents} cents after a refund.",
    "Rounding in {part}/{kind} differs between the export and the invoice {number}.",
    "Customers from York see the rate of {part} applied twice on order {number}.",
    "The {kind} of {part} drops the last line when there are more than {cents} of them.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One conversation to come.

    Attributes:
        conversation_id: LangGraph's thread id.
        arrival_s: when it arrives, in seconds after the start.
        prompt: the user's message: an issue and the repository's listing, which no other task shares.
        seed: of the workspace.
        turns: turns that the agent is told to take where the model cannot decide that itself.
    """

    conversation_id: str
    arrival_s: float
    prompt: str
    seed: int
    turns: int


def make_tasks(
    count: int, *, seed: int, prompt_chars: tuple[int, int], arrivals_s: float, turns: tuple[int, int] = (3, 12)
) -> list[Task]:
    """Make the workload of one run.

    Args:
        count: conversations.
        seed: of everything random in it.
        prompt_chars: shortest and longest first user message.
        arrivals_s: the arrivals are spread at random over this time.
        turns: fewest and most turns.
    """
    chance = random.Random(seed)  # noqa: S311 - a workload, not a secret
    arrivals = sorted(chance.uniform(0, arrivals_s) for _ in range(count))
    return [
        Task(
            conversation_id=f"task-{seed}-{number:03}",
            arrival_s=arrival,
            prompt=_prompt(chance, number=number, chars=chance.randint(*prompt_chars)),
            seed=chance.randrange(2**31),
            turns=chance.randint(*turns),
        )
        for number, arrival in enumerate(arrivals)
    ]


def _prompt(chance: random.Random, *, number: int, chars: int) -> str:
    fault = chance.choice(_FAULTS).format(
        part=chance.choice(_PARTS),
        kind=chance.choice(_KINDS),
        number=chance.randint(1_000, 9_999),
        cents=chance.randint(1, 60),
    )
    lines = [f"Issue {number}-{chance.randint(10_000, 99_999)}: {fault}", "", "Listing of the repository:"]
    length = sum(map(len, lines))
    while length < chars:
        line = (
            f"{chance.choice(_PARTS)}/{chance.choice(_KINDS)}_{chance.randint(0, 999)}.py "
            f"{chance.randint(200, 90_000)} bytes, last changed in release {chance.randint(1, 40)}"
        )
        lines.append(line)
        length += len(line) + 1
    return "\n".join([*lines, "", "Find the cause and name the file."])
