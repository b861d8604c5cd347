"""A lease as one line of compact JSON and back, and what its receipt says of other engines as a second one.

Arrays instead of objects: a row is half as long. The order of the fields below, and of `CandidateView`, is the format
of the journal; changing it means another `SCHEMA_VERSION` in `_journal_file.py`. The candidates stand apart: they are
two thirds of a lease, never change, and are hardly ever read. They are written once, with the lease, and a broker that
recovers leaves them where they are until somebody asks.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import Any

from pydantic_core import from_json, to_json

from conserve_sdk.core._quick import quick_make
from conserve_sdk.core.lease import Activity, Lease, LeaseKey, Mode, binding_of
from conserve_sdk.core.receipt import CandidateView, Receipt

_LEASE = (
    "lease_id", "key", "epoch", "mode", "prefiller", "decoder", "activity", "granted_at_ms", "ttl_ms", "expires_at_ms",
    "ledger_tokens", "hold_ms", "append_threshold_tokens", "supersedes", "activity_since_ms", "turns", "migrations",
    "receipt",
)  # fmt: skip
_KEY = ("tenant", "conversation_id", "lineage", "model")
_BINDING = ("engine_id", "url", "incarnation")
_RECEIPT = ("preset", "rule", "prefill_rule", "need_tokens", "waited_ms")
_RECEIPT_AT = 6
"""Where the whole receipt stood in rows of formats 1 and 2; in those of format 3 it was a second line."""


class ShelvedReceipt(Receipt):
    """A receipt whose candidates lie in the journal; `take_down` makes it whole. Till then it equals one without."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Receipt):
            return NotImplemented
        return (_receipt_values(self), self.candidates) == (_receipt_values(other), other.candidates)

    def __hash__(self) -> int:
        return hash((*_receipt_values(self), self.candidates))


def encode(lease: Lease) -> str:
    """One row of the journal: all but the receipt's candidates."""
    lease_id, key, epoch, mode, prefiller, decoder, *rest, receipt = _lease_values(lease)
    return to_json(
        [
            lease_id,
            _key_values(key),
            epoch,
            mode,
            prefiller and _binding_values(prefiller),
            _binding_values(decoder),
            *rest,
            _receipt_values(receipt),
        ]
    ).decode()


def encode_candidates(receipt: Receipt) -> str | None:
    """What `take_down` reads; None where there is nothing to write, or it is written already."""
    if not receipt.candidates:  # a shelved receipt shows none
        return None
    return to_json(list(map(tuple, receipt.candidates))).decode()


def decode(row: str) -> Lease:
    """The lease of a row.

    Raises:
        ValueError: the row was not written by `encode`, of this version or of an earlier one.
    """
    try:
        head, _, receipt_line = row.partition("\n")
        values = from_json(head)
        if receipt_line:
            values.append(from_json(receipt_line))
        elif isinstance(values[_RECEIPT_AT], list):
            values.append(values.pop(_RECEIPT_AT))
        lease_id, key, epoch, mode, prefiller, decoder, activity, granted_at_ms, ttl_ms, *rest, receipt = values
        expires_at_ms, ledger_tokens, hold_ms, append_threshold_tokens, *rest = rest
        return _lease(
            lease_id,
            _key(*key),
            epoch,
            _MODES[mode],
            prefiller and binding_of(*prefiller),
            binding_of(*decoder),
            _ACTIVITIES[activity],
            granted_at_ms,
            _same(ttl_ms),
            expires_at_ms,
            ledger_tokens,
            _same(hold_ms),
            _same(append_threshold_tokens),
            *rest,
            _shelved(*receipt, ()) if len(receipt) == len(_RECEIPT) else _whole(*receipt),
        )
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"not a lease: {error!r}") from error


@lru_cache(maxsize=4_096, typed=True)
def _same(number: int) -> int:
    """One object for all leases with this number: from JSON each is a new one, of 32 bytes where it is over 256."""
    return number


def take_down(receipt: Receipt, text: str | None) -> None:
    """Make a shelved receipt whole, for everybody who has it. Others, and whose text is lost, stay as they are.

    Raises:
        ValueError: the text was not written by `encode_candidates`.
    """
    if text is None or type(receipt) is not ShelvedReceipt:
        return
    whole = _whole(*_receipt_values(receipt), from_json(text))
    object.__setattr__(receipt, "candidates", whole.candidates)
    object.__setattr__(receipt, "__class__", Receipt)


def _whole(*values: Any) -> Receipt:
    *summary, candidates = values
    fields = dict(zip(_RECEIPT, summary, strict=True))
    return Receipt(**fields, candidates=tuple([CandidateView(*candidate) for candidate in candidates]))


_lease_values = attrgetter(*_LEASE)
_key_values = attrgetter(*_KEY)
_binding_values = attrgetter(*_BINDING)
_receipt_values = attrgetter(*_RECEIPT)
_MODES = {mode.value: mode for mode in Mode}
_ACTIVITIES = {activity.value: activity for activity in Activity}
_shelved = quick_make(ShelvedReceipt, *_RECEIPT, "candidates")
_lease = quick_make(Lease, *_LEASE)
_key = quick_make(LeaseKey, *_KEY)
