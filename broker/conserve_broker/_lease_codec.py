"""A lease as two lines of compact JSON arrays and back, without loss: first the lease, then its receipt.

Arrays instead of objects: a row is half as long. The order of the fields below, and of `CandidateView`, is the format
of the journal; changing it means another `SCHEMA_VERSION` in `_journal_file.py`. The receipt stands apart because it is
most of the row and hardly ever read: a broker that recovers leaves it as text until somebody asks.
"""

from __future__ import annotations

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
_RECEIPT = ("preset", "rule", "prefill_rule", "need_tokens", "waited_ms", "candidates")
_RECEIPT_AT = 6
"""Where the receipt stood in rows of formats 1 and 2, which are of one line."""


def encode(lease: Lease) -> str:
    """One row of the journal."""
    lease_id, key, epoch, mode, prefiller, decoder, *rest, receipt = _lease_values(lease)
    head = [
        lease_id,
        _key_values(key),
        epoch,
        mode,
        prefiller and _binding_values(prefiller),
        _binding_values(decoder),
        *rest,
    ]
    return f"{to_json(head).decode()}\n{_receipt_text(receipt)}"


def decode(row: str) -> Lease:
    """The lease of a row.

    Raises:
        ValueError: the row was not written by `encode`.
    """
    try:
        head, _, receipt_text = row.partition("\n")
        values = from_json(head)
        if receipt_text:
            receipt: Receipt = _StoredReceipt(receipt_text)
        else:
            receipt = _receipt(values.pop(_RECEIPT_AT))
        lease_id, key, epoch, mode, prefiller, decoder, activity, *rest = values
        return _lease(
            lease_id,
            _key(*key),
            epoch,
            _MODES[mode],
            prefiller and binding_of(*prefiller),
            binding_of(*decoder),
            _ACTIVITIES[activity],
            *rest,
            receipt,
        )
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"not a lease: {error!r}") from error


class _StoredReceipt(Receipt):
    """A receipt as it lies in the journal, decoded when one of its fields is first read."""

    __slots__ = ("_text",)

    _text: str

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "_text", text)

    def __getattr__(self, name: str) -> Any:
        """Called for a field only while it is empty."""
        if name not in _RECEIPT:
            raise AttributeError(name)
        decoded = _receipt(from_json(self._text))
        for each in _RECEIPT:
            object.__setattr__(self, each, getattr(decoded, each))
        return getattr(decoded, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Receipt) and _receipt_values(self) == _receipt_values(other)

    def __hash__(self) -> int:
        return hash(_receipt_values(self))


def _receipt_text(receipt: Receipt) -> str:
    if isinstance(receipt, _StoredReceipt):
        return receipt._text  # noqa: SLF001  # this module's own class
    *head, candidates = _receipt_values(receipt)
    return to_json([*head, list(map(tuple, candidates))]).decode()


def _receipt(values: list[Any]) -> Receipt:
    preset, rule, prefill_rule, need_tokens, waited_ms, candidates = values
    return Receipt(
        preset=preset,
        rule=rule,
        prefill_rule=prefill_rule,
        need_tokens=need_tokens,
        waited_ms=waited_ms,
        candidates=tuple([CandidateView(*candidate) for candidate in candidates]),
    )


_lease_values = attrgetter(*_LEASE)
_key_values = attrgetter(*_KEY)
_binding_values = attrgetter(*_BINDING)
_receipt_values = attrgetter(*_RECEIPT)
_MODES = {mode.value: mode for mode in Mode}
_ACTIVITIES = {activity.value: activity for activity in Activity}
_lease = quick_make(Lease, *_LEASE)
_key = quick_make(LeaseKey, *_KEY)
