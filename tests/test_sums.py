"""Checksums of the state: each as its equation says, and one changed bit of anything is refused by name."""

import copy
import io
import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from kl_dist import KLShampoo, full_state_dict, load_full_state_dict
from kl_dist.checkpoint import sums
from kl_dist.checkpoint.verify import is_sums
from kl_dist.planning.boxes import boxes_of_range, whole
from tests.checkpoints import make, options_of, state_of
from tests.models import METHODS, same_bits
from tests.test_checkpoint import plain

WORD = 1 << 64


def weight(n: int) -> int:
    z = n * 0x9E3779B97F4A7C15 % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31) | 1


def bytes_of(x: Tensor) -> bytes:
    return bytes(x.contiguous().view(-1).view(torch.uint8).tolist())


def total(x: Tensor) -> int:
    """The sum by the equation, in Python's whole numbers."""
    raw = bytes_of(x)
    raw += bytes(-len(raw) % 8)
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
    return sum(weight(i // 1024 + 1) * weight(i % 1024 + 1) * word for i, word in enumerate(words)) % WORD


def test_a_sum_is_that_of_its_equation_whatever_is_looked_at_with_it():
    """Of every dtype and shape, transposed, beginning between two words, several alike and none."""
    torch.manual_seed(0)
    tensors = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8):
        for shape in ((), (1,), (0, 3), (3, 5), (3, 5), (37, 71), (5000,), (32, 64), (32, 64)):
            x = (100 * torch.randn(shape)).to(dtype)
            tensors += [x, x.t()] if x.ndim == 2 else [x]
            tensors += [x.view(-1)[1:]] if x.numel() > 2 else []
    found = sums.totals(tensors, torch.device("cpu"))
    assert found.dtype == torch.int64 and [int(x) % WORD for x in found] == [total(x) for x in tensors]
    for x, number in zip(tensors, found, strict=True):
        assert torch.equal(sums.totals([x], torch.device("cpu")), number[None])
    assert sums.totals([], torch.device("cpu")).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_byte_is_that_of_its_equation_wherever_the_tensor_is_cut(dtype):
    torch.manual_seed(0)
    shape, bits = (7, 5, 3), torch.finfo(dtype).bits
    first, second, base = torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype), 0x123456789ABCDEF012
    found = sums.check_bytes(first, second, [whole(shape)], shape, base)
    for i, (m, v) in enumerate(zip(first.view(-1), second.view(-1), strict=True)):
        a, b = (int.from_bytes(bytes_of(x), "little") for x in (m, v))
        high = WORD.bit_length() - 1 - bits
        h = a * (sums.A >> high | 1) + b * (sums.B >> high | 1) + (base % WORD >> high) + (i * sums.P % WORD >> high)
        assert int(found[i]) == h % (1 << bits) >> (bits - 8)
    for start, stop in ((0, 1), (4, 61), (15, 30), (17, 105)):
        boxes = list(boxes_of_range(shape, start, stop))
        parts = [x.view(-1)[start:stop].clone() for x in (first, second)]
        assert torch.equal(sums.check_bytes(*parts, boxes, shape, base), found[start:stop])


@pytest.mark.parametrize("shape", [(37, 8), (37, 5), (4, 5, 3), (61,), ()])
def test_bytes_are_the_same_whatever_is_looked_at_together(shape, monkeypatch):
    """And compared as they are made: one that differs is noticed in every part."""
    torch.manual_seed(0)
    arguments = torch.randn(shape).view(-1), torch.rand(shape).view(-1), [whole(shape)], shape, 12345
    found = sums.check_bytes(*arguments)
    for together in (1, 7, 16, 1 << 19):
        monkeypatch.setattr(sums, "IN_CACHE", together)
        assert torch.equal(sums.check_bytes(*arguments), found) and sums.are_check_bytes(found, *arguments)
        for place in range(0, found.numel(), 12):
            other = found.clone()
            other[place] += 1
            assert not sums.are_check_bytes(other, *arguments), (together, place)


@pytest.mark.parametrize("bits", [32, 64])
def test_one_changed_bit_of_a_moment_or_a_step_count_changes_every_byte_for_certain(bits):
    """A change of h by 2^(bits - 8) to 2^bits - 2^(bits - 8) is one of its highest byte; rounding takes one at most."""
    for factor, width, spare in ((sums.A, bits, 0), (sums.B, bits, 0), (sums.S, 64, 1), (sums.T, 64, 1)):
        multiplier = factor >> (64 - width) | 1
        least = 1 << (width - 8 + spare)
        changes = [(multiplier << bit) % (1 << width) for bit in range(width)]
        assert all(least <= change <= (1 << width) - least for change in changes)


def flipped(x: Tensor, bit: int) -> Tensor:
    raw = x.contiguous().view(-1).view(torch.uint8).clone()
    raw[bit // 8] ^= 1 << bit % 8
    return raw.view(x.dtype).view(x.shape)


SHAPES = {"wide": (9, 17), "square": (5, 5), "vector": (6,), "scalar": ()}


@pytest.mark.parametrize("method", METHODS)
def test_every_flipped_bit_of_every_tensor_is_refused_by_name_and_changes_nothing(method):
    """In the local and in the full form; of large tensors some of the bits."""
    optimizer, target = make(SHAPES, method=method), make(SHAPES, steps=1, method=method)
    before, options = state_of(target), options_of(target)
    for saved, load in (
        (plain(optimizer), target.load_state_dict),
        (full_state_dict(optimizer), lambda state: load_full_state_dict(target, state)),
    ):
        names = [name for group in saved["param_groups"] for name in group["param_names"]]
        for identifier, entries in saved["state"].items():
            name = names[identifier] if isinstance(identifier, int) else identifier
            for key, x in list(entries.items()):
                bits = 8 * x.nbytes
                for bit in range(0, bits, max(1, bits // 12 | 1)) if not key.startswith("form") else ():
                    entries[key] = flipped(x, bit)
                    with pytest.raises(ValueError, match=rf"parameter '{name}'") as refused:
                        load(saved)
                    assert is_sums(key) or repr(key) in str(refused.value), (key, str(refused.value))
                entries[key] = x
    assert same_bits(state_of(target), before) and options_of(target) == options


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_two_saves_are_refused(method):
    earlier, later = (full_state_dict(make(SHAPES, steps, method=method)) for steps in (2, 3))
    for name in SHAPES:
        mixed = copy.deepcopy(later)
        mixed["state"][name] = earlier["state"][name]
        with pytest.raises(ValueError, match=rf"'{name}'.*(several saves|another save)"):
            load_full_state_dict(make(SHAPES, 0, method=method), mixed)
    groups = {**later, "param_groups": earlier["param_groups"]}
    with pytest.raises(ValueError, match=r"several saves|another save"):
        make(SHAPES, 0, method=method).load_state_dict(groups)


def test_matrices_that_have_changed_places_are_refused():
    saved = full_state_dict(make({"a": (5, 5), "b": (5, 5), "c": (4,), "d": (4,)}))
    for one, other in (("a", "b"), ("c", "d")):
        entries = saved["state"]
        exchanged = {**entries, one: entries[other], other: entries[one]}
        with pytest.raises(ValueError, match=f"'{one}'"):
            load_full_state_dict(
                make({"a": (5, 5), "b": (5, 5), "c": (4,), "d": (4,)}, 0), {**saved, "state": exchanged}
            )


def test_an_option_that_is_not_as_it_was_saved_is_named():
    for state in (plain(make()), full_state_dict(make())):
        for key, value in (("lr", math.nextafter(1e-2, 1)), ("betas", (0.9, 0.91)), ("stagger", False), ("of", "mine")):
            state["param_groups"][0] |= {key: value}
            with pytest.raises(ValueError, match=f"option '{key}' .* change options after the load"):
                make(steps=0).load_state_dict(state)
            del state["param_groups"][0][key]
            if key != "of":
                state["param_groups"][0][key] = plain(make())["param_groups"][0][key]
        make(steps=0).load_state_dict(state)


FUSED = {
    "of all": {"parts": {0: 3}},
    "by name": {"fused": {"parts": {0: 3}}, "experts": {"batch": (0,), "parts": {1: 2}}},
}


@pytest.mark.parametrize("declared", FUSED)
def test_an_option_with_whole_numbers_for_keys_is_as_it_was_saved_also_where_it_is_read_in_place(declared, tmp_path):
    """torch.distributed.checkpoint puts "0" back, beside the 0 that is there: of fused and stacked weights."""
    shapes = {"fused": (12, 4), **({"experts": (2, 8, 4)} if declared == "by name" else {})}

    def made() -> tuple[KLShampoo, dict[str, nn.Parameter]]:
        parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
        return KLShampoo([{"params": list(parameters.items()), "matrices": FUSED[declared]}], lr=1e-2), parameters

    def step(optimizer: KLShampoo, parameters: dict[str, nn.Parameter], number: int) -> None:
        for parameter in parameters.values():
            parameter.grad = torch.arange(float(parameter.numel())).add(number).sin().view(parameter.shape)
        optimizer.step()

    one, of_one = made()
    step(one, of_one, 0)
    dcp.save({"optimizer": one.state_dict()}, checkpoint_id=tmp_path)
    other, of_other = made()
    read = {"optimizer": other.state_dict()}
    dcp.load(read, checkpoint_id=tmp_path)
    other.load_state_dict(read["optimizer"])
    assert other.param_groups[0]["matrices"] == FUSED[declared]
    for name, parameter in of_other.items():
        parameter.data.copy_(of_one[name])
    step(one, of_one, 1)
    step(other, of_other, 1)
    assert all(torch.equal(of_one[name], of_other[name]) for name in shapes)


def test_a_state_without_checksums_is_taken_with_one_line_and_what_has_some_must_have_all(caplog):
    saved = full_state_dict(make())
    half = copy.deepcopy(saved)
    del half["state"]["square"]["sums"]
    with pytest.raises(ValueError, match="'sums' of parameter 'square' is missing"):
        load_full_state_dict(make(steps=0), half)
    for group in saved["param_groups"]:
        del group["saved"]
    with pytest.raises(ValueError, match="it has checksums, and its groups no 'saved'"):
        load_full_state_dict(make(steps=0), saved)
    for entries in saved["state"].values():
        for key in list(filter(is_sums, entries)):
            del entries[key]
    other = make(steps=0)
    with caplog.at_level("WARNING", logger="kl_dist"):
        load_full_state_dict(other, saved)
    assert len(caplog.records) == 1 and same_bits(state_of(other), state_of(make()))


def test_without_strict_a_damaged_block_is_left_new_and_named():
    saved = full_state_dict(make())
    saved["state"]["square"]["factors.0"][2, 3] += 1
    other = make(steps=0)
    new = state_of(other)
    (left,) = load_full_state_dict(other, saved, strict=False)
    assert "'factors.0' of parameter 'square'" in left
    for name, x in state_of(other).items():
        assert torch.equal(x, new[name] if name.startswith("square ") else state_of(make())[name]), name


def test_the_steps_made_go_on_where_they_were():
    optimizer, other = make(steps=5), make(steps=0)
    load_full_state_dict(other, full_state_dict(optimizer))
    assert other.state_dict()["param_groups"][0]["saved"] == optimizer.state_dict()["param_groups"][0]["saved"]


def test_a_state_dict_of_the_live_state_loads_after_further_steps_as_ever():
    """It is what is there: nothing was read from anywhere."""
    optimizer = make()
    live = optimizer.state_dict()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.load_state_dict(live)
    file = io.BytesIO()
    torch.save(live, file)  # but in a file the checksums are of another moment than the state
    file.seek(0)
    with pytest.raises(ValueError, match="not as it was saved"):
        KLShampoo.load_state_dict(make(steps=0), torch.load(file, weights_only=True))
