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
steps that the optimizer had made, so that parts of two checkpoints do not pass for one. `t` and a checksum of the
options stand in each group of the saved state.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kl_dist.checkpoint.holdings import Holding
from kl_dist.checkpoint.inventory import Entry
from kl_dist.planning.boxes import Box, in_boxes

SUMS = "sums"
SAVED = "saved"
"""The entry of a saved group with the steps made and the checksum of its options."""

COLUMNS = 1024
IN_CACHE = 1 << 17
"""Elements that are looked at together."""
A, B, P = 0x9E3779B185EBCA6B, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
S, T = 0x1027C4D1C386BBC5, 0xC2CE6F447ED4D57B

Parts = Sequence[tuple[Tensor, Sequence[Box]]]
"""What is at hand of a unit's tensors, each with its boxes, end to end in it."""


# -- of tensors --------------------------------------------------------------------------------------------------------


def total(x: Tensor) -> Tensor:
    """sum_i w_i b_i mod 2^64 over the words of x's memory, as a 0-d int64 tensor; the same on every device."""
    words = _words(x)
    rows, over = divmod(words.numel(), COLUMNS)
    across = _weights(COLUMNS if rows else _power_above(over), x.device)
    down = _weights(_power_above(rows), x.device)
    if not rows:
        return (words * across[:over]).sum() * down[0]
    body = words[: rows * COLUMNS].view(rows, COLUMNS)
    # only CPUs multiply matrices of whole numbers
    in_rows = torch.mv(body, across) if x.device.type == "cpu" else (body * across).sum(-1)
    found = (in_rows * down[:rows]).sum()
    if over:
        found = (words[rows * COLUMNS :] * across[:over]).sum() * down[rows] + found
    return found


def _words(x: Tensor) -> Tensor:
    """The memory of x in words of 64 bits, zeros added at the end."""
    raw = x.detach().contiguous().view(-1).view(torch.uint8)
    missing = -len(raw) % 8
    if missing or raw.storage_offset() % 8:
        raw = torch.cat([raw, raw.new_zeros(missing)])
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
    for place, high in _high_bytes(first, second, found, boxes, shape, base):
        place.copy_(high)
    return found


def are_check_bytes(
    given: Tensor, first: Tensor, second: Tensor, boxes: Sequence[Box], shape: Sequence[int], base: int
) -> bool:
    """Whether `given` is what `check_bytes` makes of the others; in cache, a part after the other."""
    parts = _high_bytes(first, second, given, boxes, shape, base)
    return all(torch.equal(_words(place), _words(high.to(torch.uint8))) for place, high in parts)


def _high_bytes(
    first: Tensor, second: Tensor, places: Tensor, boxes: Sequence[Box], shape: Sequence[int], base: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of `places`, an element for each of the moments, and the bytes of their elements as integers."""
    bits = 8 * first.element_size()
    words = torch.int32 if bits == 32 else torch.int64
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
        parts = [x.reshape(len(rows), len(columns)).split(max(1, IN_CACHE // len(columns))) for x in (m, v, out)]
        for row, of_first, of_second, place in zip(rows.split(len(parts[0][0])), *parts, strict=True):
            h = torch.add(columns, of_first.view(words), alpha=_signed(A >> (64 - bits) | 1, bits))
            h.add_(of_second.view(words), alpha=_signed(B >> (64 - bits) | 1, bits)).add_(row[:, None])
            yield place, h.bitwise_right_shift_(bits - 8)


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
    if last.plan.units[last.unit].elementwise:
        return Entry(last.parameter, key, SUMS, last.shape, torch.uint8, last.unit, last.plan)
    return Entry(last.parameter, key, SUMS, (len(unit),), torch.int64, last.unit, last.plan)


def sums_of(unit: Sequence[Holding], parts: Parts, steps: int, name: str) -> Tensor:
    """What `sums` has of some boxes of a unit, whose parameter has this name in what is saved."""
    salts = _salts(unit, steps, name)
    if entry_of(unit).dtype is torch.uint8:
        return check_bytes(*_moments(parts), unit[1].entry.shape, _base(parts, salts))
    totals = [total(tensor).to(parts[-1][0].device) for tensor, _ in parts]
    return torch.stack(totals) + torch.tensor([_signed(salt) for salt in salts]).to(totals[0].device)


def are_sums_of(given: Tensor, unit: Sequence[Holding], parts: Parts, steps: int, name: str) -> bool:
    """Whether `given`, on the device of the parts, is what `sums_of` makes of them."""
    if entry_of(unit).dtype is torch.uint8 and given.dtype is torch.uint8 and given.shape == (parts[1][0].numel(),):
        base = _base(parts, _salts(unit, steps, name))
        return are_check_bytes(given, *_moments(parts), unit[1].entry.shape, base)
    wanted = sums_of(unit, parts, steps, name)
    return given.dtype == wanted.dtype and torch.equal(given, wanted)


def _salts(unit: Sequence[Holding], steps: int, name: str) -> list[int]:
    return [_salt(f"{name} {holding.entry.key}") + T * steps for holding in unit]


def _moments(parts: Parts) -> tuple[Tensor, Tensor, Sequence[Box]]:
    _, (first, boxes), (second, _) = parts
    return first.contiguous(), second.contiguous(), boxes


def _base(parts: Parts, salts: Sequence[int]) -> int:
    return salts[1] + S * int(parts[0][0].view(-1)[0])


def with_sums(held: Sequence[Holding], steps: int, rank: int) -> list[Holding]:
    """Holdings, and beside each unit's its `sums`, made of what the memory has now."""
    found: dict[int, Holding] = {}
    for unit in by_unit(held):
        entry = entry_of(unit)
        boxes = entry.boxes(rank)
        memory = torch.empty(0, dtype=entry.dtype, device=unit[-1].memory.device)
        if boxes:
            made = sums_of(unit, [(one.memory, one.boxes) for one in unit], steps, unit[0].name)
            memory = made.data  # with a count of writes of its own, which is 0: `verify` asks
        found[id(unit[-1])] = Holding(unit[0].name, entry, boxes, memory)
    return [one for holding in held for one in (holding, found.get(id(holding))) if one is not None]


# -- of groups ---------------------------------------------------------------------------------------------------------


def sealed(group: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A group as it is saved: with the steps made, and a CRC-32 of each option by its name, as one text."""
    kept = {key: _kept(x) for key, x in group.items()}
    return {**kept, SAVED: {"steps": steps, "options": json.dumps(_digests(kept))}}


def _kept(value: Any) -> Any:
    """An option as it is now: a schedule may write into its tensor, or leave numpy's float there."""
    if isinstance(value, Tensor):
        return value.clone()
    return float(value) if isinstance(value, float) else value


def resealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose groups somebody was asked to change before it is saved."""
    groups = [sealed(group, group[SAVED]["steps"]) if SAVED in group else group for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def changed_option(group: Mapping[str, Any]) -> str | None:
    """Which option of a saved group is another than it was sealed with; what is not there any more counts for none.

    Raises:
        ValueError: the seal itself is damaged.
    """
    digests = json.loads(group[SAVED]["options"])
    if not isinstance(digests, dict):
        raise ValueError("no digests")
    return next((key for key, digest in _digests(group).items() if digests.get(key) != digest), None)


def _digests(group: Mapping[str, Any]) -> dict[str, int]:
    """Of what parameters are called torch makes other lists."""
    kept = {str(key): x for key, x in group.items() if key not in ("params", "param_names", SAVED)}
    return {key: zlib.crc32(_said(as_read(x)).encode()) for key, x in kept.items()}


def as_read(value: Any) -> Any:
    """An option with lists for tuples and strings for keys, as torch.distributed.checkpoint hands things back.

    It puts those keys beside what is read into: of 1 and "1" the latter, which was read, comes last and is meant.
    """
    if isinstance(value, Mapping):
        return {str(key): as_read(x) for key, x in value.items()}
    return [as_read(x) for x in value] if isinstance(value, (list, tuple)) else value


def _said(value: Any) -> str:
    """A plain value `as_read`, in the same words whatever became of its scalar tensors; of others nothing."""
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{key}:{_said(x)}" for key, x in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_said, value)) + "]"
    if isinstance(value, Tensor):
        return _said(value.tolist())
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else "?"
