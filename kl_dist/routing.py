"""Which method serves which parameter: by dimension, by module where the modules are known, by what the user says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kl_dist import options
from kl_dist.partition import Plan, make_plan
from kl_dist.shards import fully_sharded
from kl_dist.units import Parameter


def named_parameters_of(
    group: Mapping[str, Any], number: int, taken: Iterable[tuple[str, Tensor]]
) -> list[tuple[str, Tensor]]:
    """The parameters of a group with names that no other has: those given, or `group0.param3`.

    Args:
        group: as the user gave it.
        number: of the group.
        taken: names and parameters of the groups before it. Two models may use the same names; the second's become
            `group1.name`, since plan and state go by name.

    Raises:
        TypeError, ValueError: something in it is not a parameter this optimizer can serve, by name.
    """
    if "params" not in group:
        raise ValueError(f"parameter group {number} has no 'params'")
    params = group["params"]
    if isinstance(params, (set, frozenset)):
        raise TypeError("parameters in a set have no fixed order, and ranks would disagree: give a list")
    entries = [params] if isinstance(params, Tensor) else list(params)
    named = [
        entry if isinstance(entry, tuple) else (f"group{number}.param{i}", entry) for i, entry in enumerate(entries)
    ]
    named = _unwrapped(named)
    first_names = {id(parameter): name for name, parameter in taken}
    names = set(first_names.values())
    for name, parameter in named:
        _check_parameter(name, parameter)
        if id(parameter) in first_names:
            first = first_names[id(parameter)]
            also = f" (as {first!r})" if first != name else ""
            raise ValueError(f"parameter {name!r} is given twice{also}: each belongs to one group, once")
        if name in first_names.values() and name not in names:
            raise ValueError(f"two parameters of one group are called {name!r}")
        first_names[id(parameter)] = name
    return [(f"group{number}.{name}" if name in names else name, parameter) for name, parameter in named]


def renamed(
    names: Iterable[str] | None, given: Iterable[Any], named: Iterable[tuple[str, Tensor]]
) -> tuple[str, ...] | None:
    """Names of parameters as `named_parameters_of` has made them of those that were given."""
    pairs = zip(given, named, strict=False) if names else ()
    found = {entry[0]: name for entry, (name, _) in pairs if isinstance(entry, tuple)}
    return tuple(found.get(name, name) for name in names) if names else None


def _unwrapped(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """With the names that the parameters have within torch.compile and DistributedDataParallel.

    torch.distributed.checkpoint has them so too.
    """
    named = [(str(name).replace("_orig_mod.", ""), parameter) for name, parameter in named]
    while named and all(name.startswith("module.") for name, _ in named):
        named = [(name.removeprefix("module."), parameter) for name, parameter in named]
    return named


def _check_parameter(name: str, parameter: Any) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"parameter {name!r} is a {type(parameter).__name__}, not a tensor")
    if not parameter.is_floating_point():
        raise TypeError(f"parameter {name!r} is {parameter.dtype}; KLShampoo takes real floating-point parameters")
    if not (parameter.is_leaf or parameter.retains_grad):
        raise ValueError(f"parameter {name!r} is not a leaf: only what has a .grad can be optimized")


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float = 0.01,
    output_head: str | None = None,
    **group_options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups of a model whose modules are known, for `KLShampoo(param_groups(model, ..), ..)`.

    nn.Embedding and the output head go to AdamW. An output head is the module named `output_head`, the
    `get_output_embeddings()` of the model or a part of it, or one whose weight is an Embedding's; never just the last
    Linear. Norms, biases and other parameters of fewer than two dimensions are not decayed.

    Args:
        model: unwrapped, so that the names are its own.
        lr: of all groups; None leaves it to the optimizer.
        weight_decay: of what is decayed.
        output_head: name of a module, as in `model.named_modules()`.
        group_options: any option of a parameter group, for all of them.

    Returns:
        Up to three groups with named parameters, frozen ones included: matrices, AdamW decayed, AdamW not decayed.

    Raises:
        ValueError: no module has the name `output_head`.
    """
    elementwise = embeddings_and_head(model, output_head)
    matrices: list[tuple[str, Tensor]] = []
    decayed: list[tuple[str, Tensor]] = []
    undecayed: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            undecayed.append((name, parameter))
        elif id(parameter) in elementwise:
            decayed.append((name, parameter))
        else:
            matrices.append((name, parameter))
    shared = {**group_options, **({} if lr is None else {"lr": lr})}
    groups = [
        {**shared, "params": matrices, "weight_decay": weight_decay},
        {**shared, "params": decayed, "weight_decay": weight_decay, "method": "adamw"},
        {**shared, "params": undecayed, "weight_decay": 0.0, "method": "adamw"},
    ]
    return [group for group in groups if group["params"]]


def embeddings_and_head(model: nn.Module, output_head: str | None = None) -> set[int]:
    """The ids of the parameters of every nn.Embedding and of the output head; see `param_groups`.

    Raises:
        ValueError: no module has the name `output_head`.
    """
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, embeddings)]
    if output_head is not None:
        named = dict(model.named_modules())
        if output_head not in named:
            raise ValueError(f"the model has no module named {output_head!r} to be its output head")
        modules.append(named[output_head])
    for module in model.modules():  # a model of a library is often a part of the user's
        get_head = getattr(module, "get_output_embeddings", None)
        if callable(get_head) and isinstance(head := get_head(), nn.Module):
            modules.append(head)
    # a head tied to an Embedding has its very parameter, so it needs no look-up of its own
    return {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}


def plan(
    model_or_named_shapes: nn.Module | Mapping[str, Iterable[int]],
    world_size: int,
    *,
    shard_size: int = 1,
    dtype: torch.dtype = torch.float32,
    **group_options: Any,
) -> Plan:
    """The plan KLShampoo would make at any world size, without a process group.

    Args:
        model_or_named_shapes: a model, on the meta device if it does not fit (routed as `param_groups` does), or a
            mapping of names to shapes (routed by dimension alone).
        world_size: number of ranks.
        shard_size: how many of them share a replica of the parameters: 1 for DDP, world_size for FSDP2, else HSDP.
        dtype: of the parameters, where only shapes are given.
        group_options: options of KLShampoo, `output_head` included for a model.

    Raises:
        ValueError, TypeError: a bad option.
    """
    if not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size must be a whole number, at least 1, not {world_size!r}")
    if not isinstance(shard_size, int) or shard_size < 1 or world_size % shard_size:
        raise ValueError(f"shard_size must divide world_size {world_size}, not {shard_size!r}")
    if isinstance(model_or_named_shapes, nn.Module):
        groups = param_groups(model_or_named_shapes, **group_options)
        found = [
            Parameter(name, tuple(p.shape), p.dtype, index)
            for index, group in enumerate(groups)
            for name, p in group["params"]
            if p.requires_grad
        ]
    else:
        groups = [dict(group_options)]
        found = [Parameter(name, tuple(shape), dtype, 0) for name, shape in model_or_named_shapes.items()]
    resolved = [{**options.DEFAULTS, **group} for group in groups]
    for group in resolved:
        options.resolve(group)
    if shard_size > 1:
        found = [replace(one, sharding=fully_sharded(one.shape, world_size, shard_size)) for one in found]
    return make_plan(found, resolved, world_size)


def routing_table(plan: Plan) -> str:
    """A line per parameter: name, shape, method, how it is read, and the ranks that own a part of it."""
    by_parameter: dict[int, list[int]] = {}
    for index, unit in enumerate(plan.units):
        by_parameter.setdefault(unit.parameter, []).append(index)
    rows = [("parameter", "shape", "method", "as", "ranks")]
    for number, parameter in enumerate(plan.parameters):
        members = by_parameter.get(number, [])
        if not members:
            rows.append((parameter.name, str(parameter.shape), "none", "empty", ""))
            continue
        units = [plan.units[i] for i in members]
        shapes = {"x".join(map(str, unit.block.shape)) for unit in units}
        what = "flat" if units[0].method == "adamw" else " or ".join(sorted(shapes))
        read_as = f"{len(units)} of {what}" if units[0].method != "adamw" else f"flat, {math.prod(parameter.shape)}"
        owners = sorted({plan.owners[i] for i in members})
        ranks = ", ".join(map(str, owners)) if len(owners) <= 4 else f"{owners[0]} to {owners[-1]} ({len(owners)})"
        rows.append((parameter.name, str(parameter.shape), units[0].method, read_as, ranks))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
