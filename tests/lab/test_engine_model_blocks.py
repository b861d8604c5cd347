"""The block pool moves runs and spans; it equals one that looks at every block, down to the order of eviction."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_lab.engine_model import BlockPool


@dataclass
class Plain:
    """The pool as it is meant: each block has its references, its place among the free ones, its key."""

    blocks: int
    references: dict[int, int] = field(default_factory=dict)
    block_of: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(self.blocks))

    def lookup(self, keys: list[int]) -> list[int]:
        found: list[int] = []
        for key in keys:
            if key not in self.block_of:
                break
            found.append(self.block_of[key])
        return found

    def reference(self, blocks: list[int]) -> None:
        for block in blocks:
            if block in self.free:
                self.free.remove(block)
            self.references[block] = self.references.get(block, 0) + 1

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        self.block_of = {key: block for key, block in self.block_of.items() if block not in taken}
        self.references |= dict.fromkeys(taken, 1)
        return taken

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.references[block] -= 1
            if not self.references[block]:
                self.free.append(block)

    def publish(self, blocks: list[int], keys: list[int]) -> None:
        for block, key in zip(blocks, keys, strict=True):
            if key not in self.block_of and block not in self.block_of.values():
                self.block_of[key] = block


@dataclass
class Holder:
    """A sequence: the keys of its line, the blocks it has, and how many of them it has published."""

    keys: list[int]
    blocks: list[int]
    published: int


def line(branch: tuple[int, int, int], blocks: int) -> list[int]:
    """Keys that branch off after three blocks, and again after six: equal ones have equal ones before them."""
    levels = (branch[:1], branch[:2], branch)
    return [hash((levels[min(index // 3, 2)], index)) for index in range(blocks)]


branches = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 2))
starts = st.tuples(st.just("start"), branches, st.integers(1, 12), st.integers(0, 4))
changes = st.tuples(
    st.sampled_from(["grow", "publish", "end", "look"]), branches, st.integers(0, 12), st.integers(0, 7)
)


@given(st.integers(4, 40), st.lists(st.one_of(starts, changes), max_size=60))
@settings(max_examples=300, deadline=None)
def test_the_pool_equals_one_that_looks_at_every_block(
    blocks: int, moves: list[tuple[str, tuple[int, int, int], int, int]]
) -> None:
    pool, plain = BlockPool(blocks), Plain(blocks)
    holders: list[Holder] = []
    for move, branch, count, which in moves:
        keys = line(branch, 14)
        holder = holders[which % len(holders)] if holders else None
        if move == "start":
            hits = pool.lookup(keys[:count])
            assert hits == plain.lookup(keys[:count])
            cost = which + sum(block in plain.free for block in hits)
            assert pool.cost_of(hits, which) == cost
            if cost <= pool.free:
                pool.reference(hits)
                plain.reference(hits)
                new = pool.allocate(which)
                assert new == plain.allocate(which)
                holders.append(Holder(keys, hits + (new or []), len(hits)))
        elif move == "look":
            assert pool.lookup(keys[count:]) == plain.lookup(keys[count:])
        elif move == "grow" and holder is not None:
            new = pool.allocate(1)
            assert new == plain.allocate(1)
            holder.blocks += new or []
        elif move == "publish" and holder is not None:
            start, end = holder.published, min(holder.published + count, len(holder.blocks), len(holder.keys))
            behind = holder.blocks[start - 1] if start else None
            pool.publish(holder.blocks[start:end], holder.keys[start:end], behind=behind)
            plain.publish(holder.blocks[start:end], holder.keys[start:end])
            holder.published = max(start, end)
        elif move == "end" and holder is not None:
            holders.remove(holder)
            pool.release(holder.blocks)
            plain.release(holder.blocks)
        pool.check([each.blocks for each in holders])
        assert pool.free == len(plain.free)
    everything = {*plain.block_of}
    for holder in holders:
        pool.release(holder.blocks)
        plain.release(holder.blocks)
    assert {key: pool.lookup([key]) for key in everything} == {key: [block] for key, block in plain.block_of.items()}
    assert pool.allocate(blocks) == plain.allocate(blocks), "the same blocks were free in the same order"
