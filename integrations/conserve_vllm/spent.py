"""Which transfers were used: each once, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict

from conserve_sdk.core.units import Ms
from conserve_vllm.refusal import Refusal

__all__ = ["SpentTransfers"]

REMEMBERED_MAX = 65_536


class SpentTransfers:
    """Remembers a transfer until it would be refused for its age anyway.

    Full memory refuses what is new instead of forgetting what may come again: a second use answers wrong text, a
    refusal costs one prefill.
    """

    def __init__(self, *, at_most: int = REMEMBERED_MAX) -> None:
        self._at_most = at_most
        self._until: OrderedDict[tuple[str, str], Ms] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def spend(self, transfer: tuple[str, str], *, until_ms: Ms, now_ms: Ms) -> None:
        """Use a transfer.

        Args:
            transfer: prefiller's connector id and its request id.
            until_ms: from then on its age alone refuses it.
            now_ms: now, on the same clock.

        Raises:
            Refusal: used before, or too many are remembered.
        """
        self._forget(now_ms)
        if transfer in self._until:
            raise Refusal(
                409, "transfer_used", "these kv_transfer_params were used before; each set serves one request"
            )
        if len(self._until) >= self._at_most:
            raise Refusal(409, "too_many_transfers", "too many transfers at once; send the request without params")
        self._until[transfer] = until_ms

    def _forget(self, now_ms: Ms) -> None:
        # Lives are about equally long, so the oldest end first; a shorter one behind a longer waits with it.
        while self._until and next(iter(self._until.values())) <= now_ms:
            self._until.popitem(last=False)
