"""The cache of fixed size: attention sinks, anchors of the pictures that were shown, and a ring of the newest tokens.

Slots are `[text sinks | picture anchors | ring]`. The token at absolute position p goes

    p <  sinks:  into slot p, for ever
    p >= sinks:  into ring slot kept + (p - sinks) mod ring, over the token that is `ring` older

A picture leaves the ring as a whole, when the next token would take the place of its first one: a few of its first and
last tokens, its anchors, are promoted to the anchors' place, and the rest of it is hidden (SEED-Story, arXiv
2407.08683, section 3.3). Where there is no room for one more picture, another's anchors make room (`CacheConfig`).

Every token thus sees the sinks, the anchors, and the `ring` newest tokens, itself included, at the positions they have
INSIDE the cache (StreamingLLM, arXiv 2309.17453, section 3.2). StreamingLLM reaches that by rotating all keys anew at
every step. Here each key is rotated once, an anchor's once more on promotion, and the query twice: at p for the ring,
whose keys are rotated at their absolute positions, and at p's place inside the cache for the kept slots, whose keys are
rotated at their slots' indices. Scores depend on differences of positions only, so the two ways are equal.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from seed_story.backends.base import Array, aligned_zeros
from seed_story.block import Block
from seed_story.config import CacheConfig, LlamaConfig, rope_frequencies
from seed_story.contract import MASKED, PLACE, key_cache, value_cache
from seed_story.errors import ConfigError, UsageError
from seed_story.policies import ATTENTION_MASS, FIRST_AND_LAST
from seed_story.rotations import Rotations
from seed_story.rows import Rows
from seed_story.snapshot import State

EMPTY = -1
"""The position of a slot that holds nothing yet."""

ATTENTION_EVERY = 16
"""One token of so many is asked what it looks at: several answers a page, for some 0.3 % of a token's time
(`benchmarks/cache.py`)."""

ATTENTION_HALF_LIFE = 256
"""Tokens after which an answer counts half: about three pages, so that a page without a picture doesn't cost it its
place, and a story that moved on lets go of it."""

MASS_DECAY = 0.5 ** (ATTENTION_EVERY / ATTENTION_HALF_LIFE)
"""What a picture's mass is multiplied by at each answer."""

Positions = npt.NDArray[np.int64]


@functools.lru_cache(maxsize=4)
def _causal(count: int) -> npt.NDArray[np.float32]:
    """What the mask says of a chunk's own tokens, `[count, count]`: each sees itself and those before it."""
    return np.where(np.tri(count, dtype=np.bool_), 0, MASKED).astype(np.float32)


@dataclass
class _Shown:
    """A picture of the story.

    Args:
        tokens: its absolute positions, without those among the sinks.
        group: its anchors' place among the kept slots; None while the ring has it, or is yet to have it.
        mass: the attention that its anchors got, of each answer a share of 1, decayed.
    """

    tokens: range
    group: int | None = None
    mass: float = 0.0


class SinkCache:
    """Keys, values, and the positions they stand for. Allocated once; no call makes it larger.

    Args:
        llama: sizes of the decoder.
        config: geometry of the slots.
        sink_rows: float32 rows for the kept slots beside an int8 cache; None for a float32 cache.
        verify: K where the decoder has a `verify_K`, else 0.

    Attributes:
        keys, values: what is in the slots; the graphs read it in place.
        region: float32 `[2, slots]`: 1 where a slot belongs to the ring (row 0) or is kept (row 1).
        slot_positions: int64 `[slots]`: absolute position of each slot's token, or EMPTY.
        position: the absolute position that the next token will get.
        tail: the ring shows no token before this position, though some may still lie there.
        block: the tokens that came one by one lately, if there is a `verify_K`.
    """

    def __init__(self, llama: LlamaConfig, config: CacheConfig, sink_rows: int | None = None, verify: int = 0) -> None:
        self.keys, self.values = (Rows(llama, config.slots, sink_rows) for _ in "kv")
        self.sink_rows = sink_rows
        self.block = Block(llama, verify) if verify else None
        self._layers = llama.num_layers
        self.region = aligned_zeros((2, config.slots))
        self.slot_positions: Positions = np.empty(config.slots, np.int64)
        self._frequencies = np.array(rope_frequencies(llama), np.float64)
        self._rotations = Rotations(self._frequencies)
        self.config = config
        self._seen = np.empty(self.columns, np.float32)  # the mask of the next token, if it comes alone
        self.reset()

    def reset(self, config: CacheConfig | None = None) -> None:
        """Forgets everything.

        Args:
            config: the geometry from now on, of as many slots; by default the one there is.

        Raises:
            UsageError: another number of slots.
            ConfigError: more kept slots than the decoder has room for, or a ring smaller than a block.
        """
        config = config or self.config
        if config.slots != self.config.slots:
            raise UsageError("the cache's slots are fixed", got=config.slots, expected=self.config.slots)
        config.check_kept(self.sink_rows)
        if self.block and config.ring < self.block.size:
            raise ConfigError("the ring is smaller than the block of tokens that the decoder verifies",
                              got=f"{config.ring} slots ({config.policy})", expected=f"{self.block.size} or more",
                              hint="Keep less, or export the bundle without --verify.")  # fmt: skip
        self.config = config
        self.region[0] = np.arange(config.slots) >= config.kept
        np.subtract(1, self.region[0], out=self.region[1])
        self.keys.clear(config.kept)
        self.values.clear(config.kept)
        self.slot_positions.fill(EMPTY)
        self.position, self.tail = 0, config.sinks
        if self.block:
            self.block.restart(0)
        self._pictures: deque[_Shown] = deque()  # those in the ring and those to come
        self._kept: list[_Shown] = []  # those that left it, the oldest first
        self._look()

    def state(self) -> State:
        """A copy of all that `restore` needs: what is in the used slots, and whose they are."""
        used = np.flatnonzero(self.slot_positions != EMPTY)
        values = {
            "config": self.config.to_dict(),
            "position": self.position,
            "tail": self.tail,
            "pictures": [[p.tokens.start, p.tokens.stop, p.group, p.mass] for p in (*self._kept, *self._pictures)],
            "used": used.tolist(),
        }
        rows = {"keys": self.keys.state(used), "values": self.values.state(used)}
        arrays = {f"{kind}{part}": array for kind, parts in rows.items() for part, array in parts.items()}
        block = self.block.state() if self.block else {}
        return State(values, {**arrays, **block, "slot_positions": self.slot_positions.copy()})

    def restore(self, state: State) -> None:
        """Goes on where the cache of the same decoder that gave this `state` was.

        Raises:
            UsageError: another number of slots.
        """
        values, arrays = state.values, state.arrays
        self.reset(CacheConfig.from_dict(values["config"]))
        used = np.array(values["used"], np.int64)
        for kind, rows in (("keys", self.keys), ("values", self.values)):
            rows.restore(used, {name.removeprefix(kind): a for name, a in arrays.items() if name.startswith(kind)})
        self.slot_positions[:] = arrays["slot_positions"]
        self.position, self.tail = values["position"], values["tail"]
        if self.block:
            self.block.restore(self.position, arrays)
        for start, stop, group, mass in values["pictures"]:
            (self._pictures if group is None else self._kept).append(_Shown(range(start, stop), group, mass))
        self._look()

    @property
    def max_chunk(self) -> int:
        """The most tokens that the next `fill` and `store` may take, at least 1.

        Two of them must not share a ring slot (those that become sinks need none), and none but the last may push a
        picture out.
        """
        most = self.config.ring + max(self.config.sinks - self.position, 0)
        if not self._pictures:
            return most
        return min(most, self._pictures[0].tokens.start + self.config.ring - self.position)

    @property
    def max_ahead(self) -> int:
        """The most tokens that may be computed before it is known whether they come: 1 for none but the next.

        None beyond its block; none that is asked for its attention, which comes alone.
        """
        if not self.block or self.asks_attention:
            return 1
        most = min(self.max_chunk, self.block.size - self.block.count)
        return min(most, -self.position % ATTENTION_EVERY) if self.config.needs_attention else most

    def memory(self) -> dict[str, Array]:
        """The graph inputs that live here, by contract name, without the block's."""
        memory = {"region": self.region} if self.sink_rows is None else {}
        for layer in range(self._layers):
            memory |= self.keys.memory(layer, key_cache(layer)) | self.values.memory(layer, value_cache(layer))
        return memory

    @property
    def columns(self) -> int:
        """Columns of the mask and of an answer about attention, without those of the chunk itself."""
        return self.config.slots + (self.sink_rows or 0)

    @property
    def _kept_columns(self) -> slice:
        """Of these, the columns of the kept slots: an int8 cache's sink rows come after all slots."""
        first = 0 if self.sink_rows is None else self.config.slots
        return slice(first, first + self.config.kept)

    def slot_of(self, position: int) -> int:
        """Where the token at this absolute position goes."""
        sinks = self.config.sinks
        return position if position < sinks else self.config.kept + (position - sinks) % self.config.ring

    def slots_of(self, positions: Iterable[int]) -> Positions:
        """Where tokens go: absolute positions to slots `[n]`."""
        return np.array([self.slot_of(position) for position in positions], np.int64)

    def expect_picture(self, positions: range) -> None:
        """Says that tokens to come are a picture's, the two tokens around it included.

        The part of it that is among the sinks stays anyway; if what is left is less than a picture's anchors, it
        leaves the ring like text.

        Raises:
            UsageError: some of them are there already or another picture's, or the picture doesn't fit the cache.
        """
        config = self.config
        if not config.pictures:
            return
        config.check_picture(len(positions))
        first = self._pictures[-1].tokens.stop if self._pictures else 0
        if positions.start < max(first, self.position):
            raise UsageError("a picture comes too late", got=positions, expected=f"from {max(first, self.position)} on")
        in_ring = range(max(positions.start, config.sinks), positions.stop)
        if len(in_ring) >= config.picture_anchors:
            self._pictures.append(_Shown(in_ring))

    def fill(self, inputs: Mapping[str, Array], count: int) -> slice:
        """Writes `cos`, `sin`, `mask` and `place` for the next `count` tokens.

        Args:
            inputs: of a `begin_N`, `prefill_N`, `decode` or `verify_K` signature; N >= count.

        Returns:
            The tokens' rows: the graph's last, or their places in the block.

        Raises:
            UsageError: more tokens than `max_chunk` or N, or none; or a `begin_N` when there are some already.
        """
        size = len(inputs["cos"])
        if not 1 <= count <= min(size, self.max_chunk):
            raise UsageError("a chunk has no such size", got=count, expected=f"1 to {min(size, self.max_chunk)}")
        block = self.block if PLACE in inputs else None
        first = min(size - count, block.count) if block else size - count
        rows, positions = slice(first, first + count), range(self.position, self.position + count)
        oldest = [self._oldest(position) for position in positions]
        self._fill_rotations(inputs["cos"][rows], inputs["sin"][rows], positions, oldest)
        mask = inputs["mask"]
        alone = size == 1 and not block
        if not alone:
            mask.fill(MASKED)
        if not block:
            mask[rows, mask.shape[1] - count :] = _causal(count)
        if mask.shape[1] == size:  # of `begin_N`
            if self.position:
                raise UsageError("a graph that reads no cache can't go on", got=self.position, expected="no token yet")
        elif alone:
            mask[0, : self.columns] = self._seen
        else:
            self._mask_slots(mask[rows], oldest, block)
        if block:
            self._fill_block(block, inputs[PLACE], mask[rows, self.columns :], oldest)
        return rows

    def _oldest(self, position: int) -> int:
        """The oldest token that the one at this position may see in the ring."""
        return max(position - self.config.ring + 1, self.tail)

    def _mask_slots(self, mask: Array, oldest: Sequence[int], block: Block | None = None) -> None:
        """Shows all slots in rows `[n, columns]` but empty ones, and those of tokens before each row's oldest."""
        config = self.config
        ring = slice(config.kept, config.slots)
        hidden = self.slot_positions[ring] < np.array(oldest)[:, None]
        empty = self.slot_positions[: config.kept] == EMPTY
        if block:  # its tokens have columns of their own
            hidden |= self.slot_positions[ring] >= block.begin
            empty[block.begin : config.sinks] = True
        np.multiply(hidden, MASKED, out=mask[:, ring])
        np.multiply(empty, MASKED, out=mask[:, self._kept_columns])

    def _look(self) -> None:
        """Sees anew what the next token sees."""
        self._seen.fill(MASKED)
        self._mask_slots(self._seen[None], [self._oldest(self.position)])

    def _column_of(self, slot: int) -> int:
        """A slot's column of the mask."""
        return slot if slot >= self.config.kept else self._kept_columns.start + slot

    def _fill_block(self, block: Block, place: Array, mask: Array, oldest: Sequence[int]) -> None:
        """Where the next tokens are in their block, and what they see of it."""
        count, tokens = len(oldest), block.begin + np.arange(block.size)
        place.fill(0)
        place[block.count : block.count + count] = 1
        seen = (tokens >= np.array(oldest)[:, None]) | (tokens < self.config.sinks)
        mask[seen & (tokens <= self.position + np.arange(count)[:, None])] = 0

    def _fill_rotations(self, cos: Array, sin: Array, positions: Sequence[int], oldest: Sequence[int]) -> None:
        kept = self.config.sinks + len(self._kept) * self.config.picture_anchors
        for row, (position, first) in enumerate(zip(positions, oldest, strict=True)):
            places = (position, kept + position - first)  # absolute, in the cache
            for turn in range(cos.shape[1]):  # `begin_N` has one rotation, for both are the same
                cos[row, turn], sin[row, turn] = self._rotations.at(places[turn])

    def store(self, keys: Array, values: Array, count: int) -> None:
        """Puts the last `count` of a graph's new keys and values, `[layers, kv_heads, N, head_dim]`, in their slots."""
        if count == 1:
            slot = self.slot_of(self.position)
            self.keys.put(slot, keys[:, :, -1])
            self.values.put(slot, values[:, :, -1])
            self.slot_positions[slot] = self.position
            self._seen[self._column_of(slot)] = 0
            self._seen[self._column_of(self.slot_of(self.position + 1))] = MASKED  # empty, or the oldest of the ring
        else:
            positions = range(self.position, self.position + count)
            slots = self.slots_of(positions)
            self.keys.write(slots, keys[:, :, -count:])
            self.values.write(slots, values[:, :, -count:])
            self.slot_positions[slots] = positions
        self.position += count
        if self.block and count == 1:
            self.block.put(keys[:, :, -1], values[:, :, -1])
        elif self.block:
            self.block.restart(self.position)
        if self._pictures and self._pictures[0].tokens.start + self.config.ring == self.position:
            self._evict(self._pictures.popleft())
            self._look()
        elif count > 1:
            self._look()

    @property
    def asks_attention(self) -> bool:
        """Whether the next token, if it comes alone, is to be asked what it looks at, for `observe`."""
        return self.config.needs_attention and self.position % ATTENTION_EVERY == 0

    def by_slot(self, attention: Array) -> Array:
        """An answer of `decode_attention`, as `[slots + 1]`: each slot's, and the token's own; a view, or a copy."""
        kept, slots = self.config.kept, self.config.slots
        own = attention[self.columns :]
        if self.sink_rows is not None:
            attention = np.concatenate([attention[self._kept_columns], attention[kept:slots], own])
        if self.block is None:
            return attention
        begin, count = self.block.begin, self.block.count
        attention = np.append(attention[:slots], own[count])
        attention[self.slots_of(begin + np.arange(count))] += own[:count]
        return attention

    def observe(self, attention: Array) -> None:
        """Learns what the next token looks at, before `store` puts it in its slot.

        Args:
            attention: float32 `[slots + 1]`, of `by_slot`.
        """
        for picture in (*self._kept, *self._pictures):
            if picture.tokens.stop <= self.position:
                seen = float(attention[self._anchor_slots(picture)].sum(dtype=np.float64))
                picture.mass = MASS_DECAY * picture.mass + seen

    def _anchor_slots(self, picture: _Shown) -> Positions:
        """Where a picture's anchors are now: in the ring, or among the kept."""
        count = self.config.picture_anchors
        if picture.group is None:
            return self.slots_of(self._anchors(picture))
        return self.config.sinks + picture.group * count + np.arange(count)

    def _anchors(self, picture: _Shown) -> Positions:
        """The positions of its first and last tokens."""
        tokens, config = picture.tokens, self.config
        return np.array([*tokens[: config.picture_begin], *tokens[len(tokens) - config.picture_end :]], np.int64)

    def _evict(self, picture: _Shown) -> None:
        """A picture leaves the ring; its anchors are promoted if the policy has a place for them."""
        self.tail = picture.tokens.stop
        group = self._next_group()
        if group is None:
            return
        anchors, old = self._anchors(picture), self._anchor_slots(picture)
        picture.group = group
        slots = self._anchor_slots(picture)
        self.keys.write(slots, self._turned(self.keys.read(old), slots - anchors))
        self.values.write(slots, self.values.read(old))
        self.slot_positions[slots] = anchors
        self._kept.append(picture)

    def _next_group(self) -> int | None:
        """The group of slots for one more picture's anchors; None if the newcomer itself is the one to go."""
        kept = self._kept
        if len(kept) < self.config.pictures:
            return len(kept)
        leaves = 1 if self.config.picture_eviction == FIRST_AND_LAST else 0
        if self.config.picture_eviction == ATTENTION_MASS:
            leaves = min(range(len(kept)), key=lambda i: kept[i].mass)  # of equals the oldest
        return kept.pop(leaves).group if leaves < len(kept) else None

    def _turned(self, keys: Array, by: Positions) -> npt.NDArray[np.float32]:
        """Keys `[layers, kv_heads, n, head_dim]`, rotated by so many positions `[n]` more, in float64."""
        angles = by[:, None] * self._frequencies
        left, right = np.split(keys.astype(np.float64), 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(np.float32)
