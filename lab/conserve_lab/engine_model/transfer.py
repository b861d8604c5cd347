"""The link KV leaves an engine by."""

from __future__ import annotations

from conserve_lab.engine_model.config import TransferCost


class TransferLink:
    """A serialised link: transfers queue behind each other at the source.

    Args:
        cost: What a transfer takes.
    """

    def __init__(self, cost: TransferCost) -> None:
        self._cost = cost
        self._busy_until_us = 0

    @property
    def cost(self) -> TransferCost:
        """What a transfer takes."""
        return self._cost

    def reserve(self, tokens: int, *, now_us: int) -> int:
        """Book a transfer of `tokens` and return the instant it is done, in microseconds."""
        start_us = max(now_us, self._busy_until_us)
        self._busy_until_us = start_us + self._cost.transfer_us(tokens)
        return self._busy_until_us
