"""State dicts on one process: what is loaded is what was saved, and what does not fit changes nothing."""

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kl_dist import KLShampoo, full_state_dict, load_full_state_dict
from kl_dist.checkpoint.inventory import inventory
from kl_dist.planning.boxes import boxes_of_range
from tests.checkpoints import SHAPES, make, options_of, state_of
from tests.models import METHODS, same_bits, small_buckets


def plain(optimizer: KLShampoo) -> dict[str, Any]:
    """The state dict as a file gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


FORMS: dict[str, tuple[Callable[[KLShampoo], Any], Callable[[KLShampoo, Any], Any]]] = {
    "local": (plain, KLShampoo.load_state_dict),
    "full": (full_state_dict, load_full_state_dict),
}


def test_every_trained_parameter_has_a_step_from_the_start():
    optimizer = make(steps=0)
    for name in SHAPES:
        assert any(key.startswith(f"{name} ") and key.endswith("step") for key in state_of(optimizer))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_loaded_is_what_was_saved(form, method):
    save, load = FORMS[form]
    optimizer, other = make(method=method), make(method=method, steps=1)
    load(other, save(optimizer))
    assert same_bits(state_of(other), state_of(optimizer))


def test_the_inventory_has_every_tensor_in_its_place():
    optimizer = make()
    states = state_of(optimizer)
    held = [entry for entry in inventory(optimizer.plan) if not entry.is_form]
    entries = {f"{optimizer.plan.parameters[entry.parameter].name} {entry.key}": entry for entry in held}
    assert entries.keys() == states.keys()
    for name, entry in entries.items():
        assert (entry.shape, entry.dtype) == (tuple(states[name].shape), states[name].dtype)


@given(st.data())
def test_a_range_of_elements_is_its_boxes_in_order(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    elements = torch.arange(torch.Size(shape).numel()).view(shape)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, elements.numel())] * 2)))
    boxes = [elements[tuple(slice(*ends) for ends in box)] for box in boxes_of_range(shape, start, stop)]
    assert [i for box in boxes for i in box.flatten().tolist()] == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1


# -- mutations ---------------------------------------------------------------------------------------------------------


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested state dict."""
    found = [at]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths_of(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += paths_of(inner, (*at, index))
    return found


def changed(value: Any, how: str) -> Any:
    """Something else in the place of a value, or the same in another guise."""
    if how == "renamed keys" and isinstance(value, dict):
        return {f"{key}x": inner for key, inner in value.items()}
    if how == "shorter" and isinstance(value, (list, tuple, str)):
        return value[:-1]
    if how == "longer" and isinstance(value, (list, tuple)):
        return [*value, *value[:1]]
    if how == "transposed" and isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] != value.shape[1]:
        return value.T
    if how == "cut" and isinstance(value, Tensor):
        return value.flatten()[:-1]
    if how == "cast" and isinstance(value, Tensor):
        return value.to(torch.bfloat16)
    if how == "a copy":
        return copy.deepcopy(value)
    if how == "a tuple" and isinstance(value, list):
        return tuple(value)
    if how == "reordered" and isinstance(value, dict):
        return dict(reversed(list(value.items())))
    if how == "none":
        return None
    return f"not {how}"


HOWS = [
    "renamed keys",
    "shorter",
    "longer",
    "transposed",
    "cut",
    "cast",
    "a copy",
    "a tuple",
    "reordered",
    "none",
    "text",
]
SAVED = {form: save(make()) for form, (save, _) in FORMS.items()}
LOADED = state_of(make())
BEGUN = make(steps=1)


@settings(max_examples=500, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.sampled_from([*HOWS, "gone"]), st.data())
def test_a_mutated_state_dict_loads_to_the_same_or_is_refused_with_nothing_changed(form, how, data):
    saved = copy.deepcopy(SAVED[form])
    *above, last = data.draw(st.sampled_from([path for path in paths_of(saved) if path]))
    holder = saved
    for key in above:
        holder = holder[key]
    if how == "gone":
        del holder[last]
    else:
        holder[last] = changed(holder[last], how)
    optimizer = copy.deepcopy(BEGUN)
    before, options = state_of(optimizer), options_of(optimizer)
    try:
        FORMS[form][1](optimizer, saved)
    except ValueError as error:
        assert same_bits(state_of(optimizer), before) and options_of(optimizer) == options
        assert str(error)
    else:
        assert same_bits(state_of(optimizer), LOADED)


# -- strangers ---------------------------------------------------------------------------------------------------------


def test_a_format_of_the_future_is_refused():
    saved = plain(make())
    entries = saved["state"][0]
    (form,) = (key for key in entries if key.startswith("form1."))
    entries[form.replace("form1.", "form99.")] = entries.pop(form)
    with pytest.raises(ValueError, match=r"'wide' was saved as 'form99\..* here it is 'form1\."):
        make().load_state_dict(saved)


@pytest.mark.parametrize("method", METHODS)
def test_the_moments_of_an_eigenbasis_are_not_taken_for_adamws(method):
    saved, other = full_state_dict(make({"square": (5, 5)}, method=method)), make({"square": (5, 5)}, 0, method="adamw")
    left = load_full_state_dict(other, saved, strict=False)
    assert "'square' was saved as" in left[0]
    assert not any(x.any() for x in state_of(other).values())


def test_options_that_cut_a_matrix_alike_do_not_matter_to_what_fits():
    saved = full_state_dict(make())
    other = make(steps=0, max_preconditioner_dim=300)
    load_full_state_dict(other, saved, strict=False)
    assert same_bits(state_of(other), LOADED)


def test_what_is_written_into_a_state_dict_changes_no_constants_and_nothing_frozen():
    optimizer = make()
    (group,) = optimizer.param_groups
    group["params"][1].requires_grad_(False)
    before = state_of(optimizer)
    for number, entries in optimizer.state_dict()["state"].items():
        for key, x in entries.items():
            if number == 1 or key.startswith("form"):
                x.zero_()
    assert same_bits(state_of(optimizer), before)
    make(steps=0).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "given", [{"method": "kl_soap"}, {"recipe": "paper"}, {"matrices": {"rows": (1,), "columns": (0,)}}]
)
def test_what_only_looks_as_if_it_fitted_is_left(given):
    """Tensors of the same names and shapes, which mean something else."""
    shapes = {"square": (5, 5), "vector": (6,)}
    saved, other = full_state_dict(make(shapes, **given)), make(shapes, steps=0)
    with pytest.raises(ValueError):
        load_full_state_dict(other, saved)
    assert not any(x.any() for name, x in state_of(other).items() if "exp_avg" in name)
    load_full_state_dict(other, saved, strict=False)
    states = state_of(other)
    assert not states["square step"].any() and states["vector step"].item() == 3


def test_the_file_of_one_process_may_be_loaded_in_part():
    assert load_full_state_dict(make(steps=0), plain(make()), strict=False) == []


def test_what_fits_is_loaded_and_the_rest_is_new_and_named(caplog):
    saved = full_state_dict(make())
    other = make({**SHAPES, "square": (5, 6), "late": (3, 3)}, steps=0)
    fresh = state_of(other)
    with pytest.raises(ValueError, match="strict=False"):
        load_full_state_dict(other, saved)
    assert same_bits(state_of(other), fresh)
    with caplog.at_level(logging.WARNING, logger="kl_dist"):
        left = load_full_state_dict(other, saved, strict=False)
    assert "parameter 'square' has shape" in caplog.text and "'late' is missing" in caplog.text
    assert all("'square'" in what or "'late'" in what or "options" in what for what in left)
    for name, x in state_of(other).items():
        anew = name.startswith(("square ", "late "))
        assert torch.equal(x, fresh[name] if anew else LOADED[name]), name


def test_a_matrix_of_whose_state_a_part_is_missing_begins_anew_as_a_whole():
    saved = full_state_dict(make())
    del saved["state"]["square"]["bases.0"]
    other = make(steps=0)
    fresh = state_of(other)
    (left,) = load_full_state_dict(other, saved, strict=False)
    assert "'bases.0' of parameter 'square' is missing" in left
    for name, x in state_of(other).items():
        assert torch.equal(x, fresh[name] if name.startswith("square ") else LOADED[name]), name


def test_a_frozen_parameter_that_was_trained_is_named():
    saved = full_state_dict(make())
    named = [(name, nn.Parameter(torch.ones(shape), requires_grad=name != "square")) for name, shape in SHAPES.items()]
    other = KLShampoo(named)
    with pytest.raises(ValueError, match="'square' was saved, but here it is frozen or not there"):
        load_full_state_dict(other, saved)
    left = load_full_state_dict(other, saved, strict=False)
    assert left and all("'square'" in what for what in left)
    named[1][1].requires_grad_(True)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    other.step()
    assert int(other.state[named[1][1]]["step"]) == 1 and int(other.state[named[2][1]]["step"]) == 4


def test_options_may_be_changed_after_a_load_but_not_what_shapes_the_state():
    other = make(steps=0)
    other.load_state_dict(make().state_dict())
    (group,) = other.param_groups
    group.update(precondition_frequency=5, lr=1e-3, weight_decay=0.2)
    for parameter in group["params"]:
        parameter.grad = torch.ones_like(parameter)
    other.step()
    group["max_preconditioner_dim"] = 3
    with pytest.raises(ValueError, match=r"max_preconditioner_dim.* construct a new KLShampoo"):
        other.step()
    with pytest.raises(ValueError, match="saved with max_preconditioner_dim=8192, here it is 3"):
        make(steps=0, max_preconditioner_dim=3).load_state_dict(plain(make()))


def test_a_consolidated_state_dict_is_given_once():
    optimizer = make()
    optimizer.consolidate_state_dict()
    whole, part = optimizer.state_dict(), optimizer.state_dict()
    assert set(whole["state"]) == set(SHAPES) and set(part["state"]) == set(range(len(SHAPES)))
    for saved in (whole, part):
        other = make(steps=0)
        other.load_state_dict(saved)
        assert same_bits(state_of(other), LOADED)


def test_a_state_that_was_consolidated_before_a_group_was_added_is_not_given():
    """Its groups would be today's, and the state of before."""
    optimizer = make()
    optimizer.consolidate_state_dict()
    optimizer.add_param_group({"params": [("late", torch.nn.Parameter(torch.ones(3, 2)))]})
    assert not optimizer.is_consolidated
    other = make(steps=0)
    other.add_param_group({"params": [("late", torch.nn.Parameter(torch.ones(3, 2)))]})
    other.load_state_dict(plain(optimizer))
    assert same_bits(state_of(other), state_of(optimizer))


@pytest.mark.parametrize("bucket_bytes", [64, 700])
@pytest.mark.parametrize("form", FORMS)
def test_what_lies_in_several_buckets_is_saved_as_one(form, bucket_bytes):
    """GPT-2's embedding does: then a rank has several slices of it, each with a step count."""
    with small_buckets(bucket_bytes):
        optimizers = [make({"table": (10, 40), "vector": (9,)}, steps=n, method="adamw") for n in (3, 1)]
    slices = sum(map(len, optimizers[0].plan.members(0)))
    assert slices > 2
    expected = state_of(make({"table": (10, 40), "vector": (9,)}, method="adamw"))
    assert same_bits(state_of(optimizers[0]), expected)
    save, load = FORMS[form]
    load(optimizers[1], save(optimizers[0]))
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    for optimizer in (*optimizers, copy.deepcopy(optimizers[0])):
        assert same_bits(state_of(optimizer), expected)
        steps = torch.cat([stack.state.step for bucket in optimizer.parts.engine.stacks for stack in bucket])
        assert steps.tolist() == [3] * slices
