"""A lease's receipt in sentences, for people: what the dashboard and `conserve explain` show above the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from conserve_sdk.protocol import CandidateInfo, LeaseExplanation

_DECODER = {
    "most_free_kv": "it had the lowest load of the decoders with room",
    "hint": "the conversation was there before and its KV may still be cached",
    "parent": "the conversation it branched off is there",
    "append": "the conversation stays where it is",
    "re_lease_draining": "the decoder before it is being drained",
    "re_lease_load": "the decoder before it was much more loaded",
    "readopted": "its token says so: the broker had lost its state, and with it the numbers of the placement",
}
_HERE = {
    "score": "there it was expected to be ready first",
    "below_minimum": "it is too short for a move to pay",
    "never": "the preset moves nothing",
    "hosted_on_prefiller": "the engine is a prefiller that hosts",
    "cannot_move": "its KV could not be moved here",
    "no_prefiller": "the fleet has no prefiller for this model",
    "no_usable_prefiller": "no prefiller could be used",
    "readopted": "",
}
_THERE = {
    "score": "it was expected to be ready there first",
    "always_prefiller": "the preset always uses a prefiller",
    "old_decoder": "the KV is on that engine already",
}
_VERDICTS = {
    "failed": "the holder could not use it",
    "unknown": "not seen yet",
    "suspect": "not answering",
    "gone": "gone",
    "misfit": "serving something else",
    "draining": "draining",
    "stale": "not seen lately",
    "capacity_unknown": "of unknown KV capacity",
    "prompt_too_long": "unable to take so long a prompt",
    "prefilling": "busy with prefill",
    "over_watermark": "above its KV watermark",
    "oversubscribed": "promised to too many leases",
    "no_common_transfer_group": "in another transfer group",
    "block_size_differs": "of another block size",
    "extra_work": "bound to compute too much of it again",
}


def in_words(lease: LeaseExplanation) -> tuple[str, ...]:
    """The receipt, one sentence or two to an element: whose, where, why there, where prefilled, how it is now."""
    return tuple(
        filter(None, (_whose(lease), _decoder(lease), _left_out(lease, "decoder"), _prefill(lease), _now(lease)))
    )


def span(ms: int) -> str:
    """A time span for people, in at most two units."""
    seconds = max(ms, 0) / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _whose(lease: LeaseExplanation) -> str:
    waited_ms = lease.decision.waited_ms
    waited = f"after waiting {span(waited_ms)} for room" if waited_ms else "at once"
    replaced = f" It took the place of lease {lease.supersedes}." if lease.supersedes else ""
    return (
        f"Conversation {lease.conversation_id} (lineage {lease.lineage}, tenant {lease.tenant}, model {lease.model}) "
        f"asked for {lease.decision.need_tokens:,} tokens and got this lease {waited}, "
        f"{span(lease.granted_ago_ms)} ago.{replaced}"
    )


def _decoder(lease: LeaseExplanation) -> str:
    rule = lease.decision.rule
    why = _DECODER.get(rule, f"the rule {rule} chose it")
    numbers = ""
    chosen = _chosen(lease, "decoder")
    if chosen is not None and chosen.capacity_tokens:
        share = 100 * chosen.leased_tokens / chosen.capacity_tokens
        numbers = (
            f" At that moment {chosen.leased_tokens:,} of its {chosen.capacity_tokens:,} KV tokens were leased"
            f" ({share:.0f} %)."
        )
    return f"Its decoder is {lease.decoder.engine_id}, because {why}.{numbers}"


def _left_out(lease: LeaseExplanation, role: str) -> str:
    out = [line for line in _of_role(lease, role) if line.verdict not in {"chosen", "fits"}]
    named = [f"{line.engine_id} ({_VERDICTS.get(line.verdict, line.verdict)})" for line in out]
    return f"Not considered: {', '.join(named)}." if named else ""


def _prefill(lease: LeaseExplanation) -> str:
    rule, decoder = lease.decision.prefill_rule, lease.decoder.engine_id
    if lease.prefiller is None:
        why = _HERE.get(rule, f"the prefillers were {_VERDICTS[rule]}" if rule in _VERDICTS else f"rule {rule}")
        because = f", because {why}" if why else ""
        text = f"The prompt is prefilled on {decoder} itself{because}.{_scores(lease)}"
        return f"{text} {_left_out(lease, 'prefiller')}".strip()
    why = _THERE.get(rule, f"the rule {rule} chose it")
    return (
        f"The prompt is prefilled on {lease.prefiller.engine_id}, because {why}; then its KV moves to {decoder} once."
        f"{_scores(lease)}"
    )


def _scores(lease: LeaseExplanation) -> str:
    """The estimates that the rule compared, best first."""
    scored = [*_of_role(lease, "prefiller"), *_of_role(lease, "decoder")]
    estimates = sorted((line.score_us, line.engine_id) for line in scored if line.score_us >= 0)
    told = ", ".join(f"{engine_id} {score_us / 1000:,.0f} ms" for score_us, engine_id in estimates)
    return f" Estimates: {told}." if len(estimates) > 1 else ""


def _now(lease: LeaseExplanation) -> str:
    turns = "1 turn" if lease.turns == 1 else f"{lease.turns} turns"
    moved = "moved its KV once" if lease.migrations else "moved no KV"
    text = (
        f"It has been {lease.activity} for {span(lease.activity_for_ms)}, after {turns}; it {moved}, holds "
        f"{lease.ledger_tokens:,} tokens and ends in {span(lease.expires_in_ms)} unless renewed."
    )
    engine = lease.decoder_now
    if engine is None:
        return f"{text} Its decoder has left the fleet."
    detail = f" ({engine.detail})" if engine.detail else ""
    return text if engine.state == "ready" else f"{text} Its decoder is {engine.state}{detail}."


def _chosen(lease: LeaseExplanation, role: str) -> CandidateInfo | None:
    return next((line for line in _of_role(lease, role) if line.verdict == "chosen"), None)


def _of_role(lease: LeaseExplanation, role: str) -> Sequence[CandidateInfo]:
    return [line for line in lease.decision.candidates if line.role == role]
