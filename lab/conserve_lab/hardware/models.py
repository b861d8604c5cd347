"""Models by name: what they weigh and what a token of their KV cache does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A dense transformer with grouped-query attention, in bf16.

    Attributes:
        parameters: all of them.
        hidden: query heads times head size, what attention multiplies.
        kv_heads, head_size: of the KV cache.
    """

    name: str
    parameters: int
    layers: int
    hidden: int
    kv_heads: int
    head_size: int

    @property
    def weight_bytes(self) -> int:
        """Bytes read once a step."""
        return 2 * self.parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * 2


MODELS: dict[str, Model] = {
    model.name: model
    for model in (  # their published config.json
        Model(name="qwen3-0.6b", parameters=600_000_000, layers=28, hidden=2048, kv_heads=8, head_size=128),
        Model(name="llama-3.1-8b", parameters=8_030_000_000, layers=32, hidden=4096, kv_heads=8, head_size=128),
        Model(name="qwen3-32b", parameters=32_800_000_000, layers=64, hidden=8192, kv_heads=8, head_size=128),
    )
}
