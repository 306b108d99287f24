"""Checksums that travel with the state, so that what was damaged or mixed up since it was saved is known by name.

[Note: checksums] Each unit of the plan has one more entry, `sums`, which whoever holds the unit makes when the state is
saved and compares when it is loaded: no rank needs another's part for it, at either end and in any layout.

A matrix is held whole. Each of its tensors has a number,

    h = salt + T t + sum_i w_i b_i  mod 2^64,

b_i the 64-bit words of its memory and w_i odd weights that look random: one changed bit changes h for certain, since an
odd number divides nothing of 2^64; any other damage does but for one chance in 2^60 or so. What AdamW keeps is cut
anywhere between elements, so there each element has a byte of its own, the highest of

    h_i = salt + T t + S step + A m_i + B v_i + P i  mod 2^32 (2^64 for float64),

m_i and v_i the bits of its two moments, i its place in the parameter. A, B and S are such that one changed bit of them
changes that byte for certain; of what is damaged otherwise one element in 256 is not noticed, and hardly ever two.

The salt is a hash of the parameter's name and the key, so that two matrices do not change places, and t the number of
steps that the optimizer had made, so that parts of two checkpoints do not pass for one: see kl_dist.checkpoint.seals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kl_dist.checkpoint.holdings import Holding
from kl_dist.checkpoint.inventory import Entry
from kl_dist.planning.boxes import Box, in_boxes

SUMS = "sums"

COLUMNS = 1024
IN_CACHE = 1 << 19
"""Elements that are looked at together."""
AT_ONCE = 64
"""Small tensors, 8 KiB each at most, that are copied to be looked at together."""
A, B, P = 0x9E3779B185EBCA6B, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
S, T = 0x1027C4D1C386BBC5, 0xC2CE6F447ED4D57B


# -- of tensors --------------------------------------------------------------------------------------------------------


def totals(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """sum_i w_i b_i mod 2^64 over the words of each tensor's memory, int64 (tensors,); the same on every device.

    A tensor is looked at as a matrix of COLUMNS columns and a last row, which is not full. Its product by the weights
    across is made where it lies, all others of the tensors of one shape together.

    Args:
        tensors: of any shapes and dtypes.
        device: of the result.
    """
    found = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    alike: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
    for place, x in enumerate(tensors):
        if x.numel():
            alike.setdefault((x.device, x.dtype, x.shape), []).append(place)
    for places in alike.values():
        for some in (places[first : first + AT_ONCE] for first in range(0, len(places), AT_ONCE)):
            found[some] = _of_one_shape([tensors[place] for place in some]).to(device)
    return found


def _of_one_shape(tensors: Sequence[Tensor]) -> Tensor:
    """The same of tensors of one shape and dtype on one device, there."""
    one = tensors[0]
    rows, over = divmod(-(-one.nbytes // 8), COLUMNS)
    across, down = _weights(COLUMNS, one.device), _weights(_power_above(rows), one.device)
    if not rows:
        small = torch.stack(list(tensors)).view(len(tensors), one.numel())
        return _product(_words(small), across[:over]) * down[0]
    in_rows = []
    for words in (_words(x.reshape(-1)) for x in tensors):
        made = [_product(words[: rows * COLUMNS].view(rows, COLUMNS), across)]
        if over:
            made.append(_product(words[None, rows * COLUMNS :], across[:over]))
        in_rows.append(torch.cat(made))
    return _product(torch.stack(in_rows), down[: rows + bool(over)])


def _product(x: Tensor, weights: Tensor) -> Tensor:
    """sum_j x_ij w_j; only CPUs multiply matrices of whole numbers."""
    return torch.mv(x, weights) if x.device.type == "cpu" else (x * weights).sum(-1)


def _words(x: Tensor) -> Tensor:
    """The memory of each row of x, whose elements lie end to end, in words of 64 bits, zeros added at the end."""
    raw = x.detach().view(torch.uint8)
    missing = -raw.shape[-1] % 8
    if missing or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(*raw.shape[:-1], missing)], -1)
    return raw.view(torch.int64)


@lru_cache(maxsize=64)
def _weights(count: int, device: torch.device) -> Tensor:
    """Odd numbers that look random: SplitMix64 (Steele, Lea and Flood, 2014) of 1, 2, .."""
    with torch.no_grad(), torch.inference_mode(False):
        z = torch.arange(1, count + 1) * _signed(0x9E3779B97F4A7C15)
        z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
        return (z ^ ((z >> 31) & (2**33 - 1)) | 1).to(device)


def _power_above(count: int) -> int:
    return 1 << count.bit_length()


def check_bytes(first: Tensor, second: Tensor, boxes: Sequence[Box], shape: Sequence[int], base: int) -> Tensor:
    """The byte of each element of AdamW's moments, uint8 (elements,), from what is held of them end to end in boxes."""
    found = torch.empty(first.numel(), dtype=torch.uint8, device=first.device)
    for place, made in _high_bytes(first, second, found, boxes, shape, base):
        place.copy_(made)
    return found


def are_check_bytes(
    given: Tensor, first: Tensor, second: Tensor, boxes: Sequence[Box], shape: Sequence[int], base: int
) -> bool:
    """Whether `given` is what `check_bytes` makes of the others; in cache, a part after the other."""
    parts = _high_bytes(first, second, given, boxes, shape, base)
    return all(torch.equal(_words(place.reshape(-1)), _words(made.view(-1))) for place, made in parts)


def _high_bytes(
    first: Tensor, second: Tensor, places: Tensor, boxes: Sequence[Box], shape: Sequence[int], base: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of `places`, an element for each of the moments, and the bytes of these, until the next are made."""
    bits = 8 * first.element_size()
    words = torch.int32 if bits == 32 else torch.int64
    a, b = (_signed(factor >> (64 - bits) | 1, bits) for factor in (A, B))
    strides = torch.empty(tuple(shape), device="meta").stride()
    triples = zip(in_boxes(first, boxes), in_boxes(second, boxes), in_boxes(places, boxes), strict=True)
    for (box, m), (_, v), (_, out) in triples:
        if not m.numel():
            continue
        along = [
            (torch.arange(start, stop, device=first.device) * stride * _signed(P) >> (64 - bits)).to(words)
            for (start, stop), stride in zip(box, strides, strict=True)
        ]
        columns = along.pop() if along else torch.zeros(1, dtype=words, device=first.device)
        rows = torch.full((1,), _signed(base >> (64 - bits), bits), dtype=words, device=first.device)
        for one in along:
            rows = (rows[:, None] + one).view(-1)
        size = max(1, IN_CACHE // len(columns))
        parts = [x.reshape(len(rows), len(columns)).split(size) for x in (m.view(words), v.view(words), out)]
        hashes, made = (torch.empty_like(x[0]) for x in parts[1:])
        for row, of_first, of_second, place in zip(rows[:, None].split(size), *parts, strict=True):
            h = torch.add(columns, of_first, alpha=a, out=hashes[: len(row)])
            h.add_(of_second, alpha=b).add_(row).bitwise_right_shift_(bits - 8)
            yield place, made[: len(row)].copy_(h)


def _signed(value: int, bits: int = 64) -> int:
    """A number mod 2^bits as torch's integers have it."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


@lru_cache(maxsize=65536)
def _salt(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


# -- of units ----------------------------------------------------------------------------------------------------------


def by_unit(held: Sequence[Holding]) -> Iterator[list[Holding]]:
    """The holdings of each unit's tensors, in order."""
    found: dict[int, list[Holding]] = {}
    for holding in held:
        if holding.entry.unit is not None:
            found.setdefault(holding.entry.unit, []).append(holding)
    yield from found.values()


def entry_of(unit: Sequence[Holding]) -> Entry:
    """The entry `sums` beside a unit's tensors."""
    last = unit[-1].entry
    assert last.unit is not None
    key = last.key.removesuffix(last.field) + SUMS
    if _is_elementwise(last):
        return Entry(last.parameter, key, SUMS, last.shape, torch.uint8, last.unit, last.plan)
    return Entry(last.parameter, key, SUMS, (len(unit),), torch.int64, last.unit, last.plan)


class AtHand(NamedTuple):
    """What there is of a unit, of which `sums` are made."""

    unit: Sequence[Holding]
    tensors: Sequence[Tensor]
    boxes: Sequence[Box]  # of the last, end to end in it
    name: str  # of its parameter in what is saved

    @property
    def elementwise(self) -> bool:
        return _is_elementwise(self.unit[-1].entry)

    @property
    def device(self) -> torch.device:
        return self.tensors[-1].device

    def salts(self, steps: int) -> list[int]:
        return [_signed(_salt(f"{self.name} {one.entry.key}") + T * steps) for one in self.unit]

    def moments(self, steps: int) -> tuple[Tensor, Tensor, Sequence[Box], Sequence[int], int]:
        """As `check_bytes` takes them."""
        step, first, second = self.tensors
        base = self.salts(steps)[1] + S * int(step.view(-1)[0])
        return first.contiguous(), second.contiguous(), self.boxes, self.unit[1].entry.shape, base


def _is_elementwise(entry: Entry) -> bool:
    return entry.plan.units[entry.unit].elementwise  # type: ignore[index]


def sums_of(found: Sequence[AtHand], steps: int) -> list[Tensor]:
    """What `sums` has of each of these units, on its device."""
    numbers = _numbers([one for one in found if not one.elementwise], steps)
    return [check_bytes(*one.moments(steps)) if one.elementwise else next(numbers) for one in found]


def are_sums_of(given: Sequence[Tensor], found: Sequence[AtHand], steps: int) -> Iterator[bool]:
    """Whether each of `given`, on the units' devices, is what `sums_of` makes of them."""
    numbers = _numbers([one for one in found if not one.elementwise], steps)
    for sums, one in zip(given, found, strict=True):
        if one.elementwise:
            fits = sums.dtype is torch.uint8 and sums.shape == (one.tensors[1].numel(),)
            yield fits and are_check_bytes(sums, *one.moments(steps))
        else:
            wanted = next(numbers)
            yield sums.dtype == wanted.dtype and torch.equal(sums, wanted)


def _numbers(found: Sequence[AtHand], steps: int) -> Iterator[Tensor]:
    """The sums of matrices, of all together."""
    if not found:
        return
    made = totals([tensor for one in found for tensor in one.tensors], found[0].device)
    made += torch.tensor([salt for one in found for salt in one.salts(steps)]).to(made.device)
    for one, sums in zip(found, made.split([len(one.tensors) for one in found]), strict=True):
        yield sums.to(one.device, copy=True)


def with_sums(held: Sequence[Holding], steps: int, rank: int) -> list[Holding]:
    """Holdings, and beside each unit's its `sums`, made of what the memory has now."""
    units = [(unit, entry_of(unit)) for unit in by_unit(held)]
    here = [
        AtHand(unit, [one.memory for one in unit], unit[-1].boxes, unit[0].name)
        for unit, entry in units
        if entry.boxes(rank)
    ]
    made = iter(sums_of(here, steps))
    found: dict[int, Holding] = {}
    for unit, entry in units:
        boxes = entry.boxes(rank)
        memory = torch.empty(0, dtype=entry.dtype, device=unit[-1].memory.device)
        if boxes:
            memory = next(made).data  # with a count of writes of its own, which is 0: `verify` asks
        found[id(unit[-1])] = Holding(unit[0].name, entry, boxes, memory)
    return [one for holding in held for one in (holding, found.get(id(holding))) if one is not None]
