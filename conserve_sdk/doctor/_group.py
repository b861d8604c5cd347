"""What must be the same on engines that move KV between each other, and which pairs of them to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from conserve_sdk.doctor._finding import Finding, fail, note, ok
from conserve_sdk.doctor._look import EngineFacts

__all__ = ["check_groups", "groups_of", "pairs_of"]


def groups_of(engines: Sequence[EngineFacts]) -> list[list[EngineFacts]]:
    """Engines by transfer group and model, in the order in which they were named."""

    def key(facts: EngineFacts) -> tuple[str, str]:
        return (facts.target.group, facts.target.model)

    return [list(members) for _, members in groupby(sorted(engines, key=key), key)]


def check_groups(engines: Sequence[EngineFacts]) -> Iterator[Finding]:
    """Compare the engines of each group that can move KV."""
    for group in groups_of(engines):
        members = [facts for facts in group if facts.has_connector]
        if len(members) < 2:
            continue
        name = members[0].target.group
        subject = f"group {name}" if name else "engines"
        same = "vLLM compares it before each transfer and refuses"
        yield _same(
            *(subject, "same_model", members),
            what="the model's path",
            value=_root,
            fix=f"serve it from one path on all: {same}",
        )
        yield _same(
            *(subject, "same_version", members),
            what="vLLM",
            value=lambda facts: facts.version,
            fix=f"upgrade the older: {same}",
        )
        yield _same(
            *(subject, "same_block_size", members),
            what="blocks of",
            value=lambda facts: str(facts.block_size or ""),
            fix="give all the same --block-size: a decoder with smaller blocks may die of a transfer",
        )


def pairs_of(engines: Sequence[EngineFacts]) -> list[tuple[EngineFacts, EngineFacts]]:
    """Pairs of prefiller and decoder to try: every decoder once, every prefiller once.

    Engines whose role nobody told take the role that is missing; if none is told, the first is the prefiller.
    """
    pairs: list[tuple[EngineFacts, EngineFacts]] = []
    for group in groups_of(engines):
        prefillers = [facts for facts in group if facts.role == "prefiller"]
        decoders = [facts for facts in group if facts.role == "decoder"]
        others = [facts for facts in group if facts not in prefillers and facts not in decoders]
        if not prefillers:
            prefillers, others = others[:1], others[1:]
        decoders = decoders or others
        if prefillers and decoders:
            longest = max(len(prefillers), len(decoders))
            pairs += [(prefillers[n % len(prefillers)], decoders[n % len(decoders)]) for n in range(longest)]
    return [pair for pair in pairs if _may_move(*pair)]


def _may_move(prefiller: EngineFacts, decoder: EngineFacts) -> bool:
    """Only between engines that agree: a transfer between others is refused, or worse."""
    return (
        prefiller.has_connector
        and decoder.has_connector
        and prefiller.block_size == decoder.block_size
        and prefiller.version == decoder.version
        and prefiller.model == decoder.model
        and _root(prefiller) == _root(decoder)
    )


def _root(facts: EngineFacts) -> str:
    return facts.models.get(facts.model, "")


def _same(
    subject: str,
    check: str,
    members: Sequence[EngineFacts],
    *,
    what: str,
    value: Callable[[EngineFacts], str],
    fix: str,
) -> Finding:
    values = {facts.name: value(facts) for facts in members}
    distinct = sorted(set(values.values()))
    if "" in distinct:
        return note(
            subject, check, f"{what}: not told by {', '.join(name for name, told in values.items() if not told)}"
        )
    if len(distinct) == 1:
        return ok(subject, check, f"{what} {distinct[0]} on all {len(members)}")
    shown = "; ".join(f"{told} on {', '.join(n for n, other in values.items() if other == told)}" for told in distinct)
    return fail(subject, check, f"{what} differs: {shown}", fix=fix)
