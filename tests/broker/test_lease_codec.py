"""Rows of the journal: no field is lost, older rows are read, others refused."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_broker._lease_codec import ShelvedReceipt, decode, encode, encode_candidates, take_down
from conserve_sdk.core.lease import Activity, EngineBinding, Lease, LeaseKey, Mode
from conserve_sdk.core.receipt import CandidateView, Receipt
from conserve_sdk.core.units import LeaseId, Ms, Tokens

from .journal_writer import LEASE as WRITTEN

texts = st.text(min_size=1, max_size=12)
counts = st.integers(min_value=0, max_value=2**53)
bindings = st.builds(EngineBinding, engine_id=texts, url=texts, incarnation=texts)
receipts = st.builds(
    Receipt,
    preset=texts,
    rule=texts,
    prefill_rule=texts,
    need_tokens=counts,
    waited_ms=counts,
    candidates=st.lists(
        st.builds(
            CandidateView,
            engine_id=texts,
            role=texts,
            verdict=texts,
            score_us=st.integers(min_value=-1),
            **dict.fromkeys(
                ["capacity_tokens", "leased_tokens", "used_tokens", "backlog_tokens", "running", "rate_tokens_per_s"],
                counts,
            ),
        ),
        max_size=3,
    ).map(tuple),
)
leases = st.builds(
    Lease,
    lease_id=texts,
    key=st.builds(LeaseKey, tenant=texts, conversation_id=texts, lineage=texts, model=texts),
    mode=st.sampled_from(Mode),
    activity=st.sampled_from(Activity),
    prefiller=st.none() | bindings,
    decoder=bindings,
    supersedes=st.none() | texts,
    receipt=receipts,
    **dict.fromkeys(
        [
            "epoch",
            "granted_at_ms",
            "ttl_ms",
            "expires_at_ms",
            "ledger_tokens",
            "hold_ms",
            "append_threshold_tokens",
            "activity_since_ms",
            "turns",
            "migrations",
        ],
        counts,
    ),
)

CANDIDATE = CandidateView(
    engine_id="d0",
    role="decoder",
    verdict="chosen",
    capacity_tokens=9,
    leased_tokens=8,
    used_tokens=7,
    backlog_tokens=6,
    running=5,
    rate_tokens_per_s=4,
    score_us=3,
)
LEASE = replace(WRITTEN, receipt=replace(WRITTEN.receipt, candidates=(CANDIDATE, CANDIDATE)))


def whole(lease: Lease) -> Lease:
    """A lease as it comes back, receipt and all."""
    again = decode(encode(lease))
    take_down(again.receipt, encode_candidates(lease.receipt))
    return again


@given(leases)
def test_no_field_is_lost(lease: Lease) -> None:
    again = whole(lease)
    assert again == lease
    assert hash(again) == hash(lease)
    assert all(isinstance(getattr(again, field.name), type(getattr(lease, field.name))) for field in fields(lease))


def test_numbers_that_many_leases_have_are_one_object() -> None:
    long = replace(LEASE, ttl_ms=Ms(60_001), hold_ms=Ms(10_001), append_threshold_tokens=Tokens(4_001))
    one, other = decode(encode(long)), decode(encode(replace(long, lease_id=LeaseId("another"))))
    assert one.ttl_ms is other.ttl_ms
    assert one.hold_ms is other.hold_ms
    assert one.append_threshold_tokens is other.append_threshold_tokens


@given(leases)
def test_a_receipt_is_without_candidates_until_somebody_asks(lease: Lease) -> None:
    again = decode(encode(lease))
    bare = replace(lease.receipt, candidates=())
    assert type(again.receipt) is ShelvedReceipt
    assert (again.receipt, hash(again.receipt)) == (bare, hash(bare))
    assert again.receipt != "something else"
    assert (again.receipt == lease.receipt) is (lease.receipt.candidates == ())
    assert encode_candidates(again.receipt) is None  # what was written stays
    assert encode(again) == encode(lease)
    held_by_others = again.until(Ms(7)).receipt
    take_down(again.receipt, encode_candidates(lease.receipt))
    assert held_by_others == lease.receipt == again.receipt
    assert encode(again) == encode(lease)


def test_what_is_whole_or_lost_stays_as_it_is() -> None:
    take_down(LEASE.receipt, "[]")
    assert LEASE.receipt.candidates == (CANDIDATE, CANDIDATE)
    again = decode(encode(LEASE))
    take_down(again.receipt, None)
    assert type(again.receipt) is ShelvedReceipt
    with pytest.raises(ValueError, match="expected"):
        take_down(again.receipt, "no JSON")


ROW = encode(LEASE)


@pytest.mark.parametrize(
    "row",
    [
        "",
        "[]",
        "5",
        "{}",
        "[1,2]",
        ROW[:-1],
        f"{ROW[:-1]},7]",
        ROW + "\n[]",
        ROW.replace("local", "remote"),
        ROW + "\n" + "x",
    ],
)
def test_other_rows_are_refused(row: str) -> None:
    with pytest.raises(ValueError):
        decode(row)


def _old(lease: Lease) -> tuple[list[Any], list[Any]]:
    """The two parts of a row in formats before the fourth."""
    *head, summary = json.loads(encode(lease))
    return head, [*summary, json.loads(encode_candidates(lease.receipt) or "[]")]


def _one_line(lease: Lease, candidate_fields: int) -> str:
    """The row as formats 1 (ten fields a candidate) and 2 (thirteen) had it."""
    head, receipt = _old(lease)
    receipt[-1] = [entry[:candidate_fields] for entry in receipt[-1]]
    return json.dumps([*head[:6], receipt, *head[6:]])


@pytest.mark.parametrize("lease", [LEASE, WRITTEN])
def test_rows_of_two_lines_are_read(lease: Lease) -> None:
    head, receipt = _old(lease)
    again = decode(f"{json.dumps(head)}\n{json.dumps(receipt)}")
    assert again == lease
    assert encode_candidates(again.receipt) == encode_candidates(lease.receipt)


@pytest.mark.parametrize("candidate_fields", [10, 13])
def test_rows_of_the_first_formats_are_read(candidate_fields: int) -> None:
    """What candidates gained with the second format has its default."""
    assert decode(_one_line(LEASE, candidate_fields)) == LEASE


def test_a_candidate_that_lacks_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="missing"):
        decode(_one_line(LEASE, 8))


def test_a_lease_that_changed_is_written_with_the_receipt_it_had() -> None:
    changed = replace(whole(LEASE), ledger_tokens=11)
    assert whole(changed) == replace(LEASE, ledger_tokens=11)
