"""Which method serves which parameter: by dimension, by module where the modules are known, by what the user says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kl_dist import modules, options, ranges
from kl_dist.methods import ELEMENTWISE
from kl_dist.planning.boxes import fully_sharded
from kl_dist.planning.making import make_plan
from kl_dist.planning.matrices import names_of
from kl_dist.planning.partition import FEWEST, Partition
from kl_dist.planning.plan import Plan
from kl_dist.planning.units import Parameter


def checked(
    given: Mapping[str, Any], defaults: Mapping[str, Any], before: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A parameter group as the optimizer keeps it: its parameters named, its options checked and filled.

    Args:
        given: as the user has it.
        defaults: of what it leaves out.
        before: the groups that are there already.

    Raises:
        TypeError, ValueError: a bad option or parameter, by name.
    """
    taken = [pair for group in before for pair in pairs_of(group)]
    own = {key: value for key, value in given.items() if not options.is_declined(key, value)}
    names = own.pop("param_names", None)
    if isinstance(own.get("params"), Iterator):
        own["params"] = list(own["params"])
    if names is not None:
        own["params"] = _with_names(own.get("params", ()), names, len(before))
    group = {**defaults, **own, "params": named_parameters_of(own, len(before), taken)}
    options.resolve(group)
    names_now = renaming(own["params"], group["params"])
    if group["adamw_names"]:
        group["adamw_names"] = tuple(names_now.get(name, name) for name in group["adamw_names"])
    if names_of(group["matrices"]):
        group["matrices"] = {names_now.get(name, name): x for name, x in group["matrices"].items()}
    if not group["params"]:
        group["param_names"] = []  # torch wants all groups named or none
    return group


def _with_names(params: Any, names: Sequence[str], number: int) -> list[tuple[str, Tensor]]:
    """The parameters of a group with its `param_names`, as torch.optim writes them."""
    entries = [params] if isinstance(params, Tensor) else list(params)
    unnamed = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    if len(names) != len(unnamed):
        raise ValueError(f"parameter group {number} has {len(unnamed)} parameters and {len(names)} param_names")
    return list(zip(map(str, names), unnamed, strict=True))


def pairs_of(group: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """(name, parameter) of a group as the optimizer keeps it.

    Raises:
        ValueError: it was changed so that it is no such group.
    """
    names, parameters = group.get("param_names", ()), group.get("params", ())
    if len(names) != len(parameters):
        raise ValueError(f"a parameter group has {len(parameters)} parameters and {len(names)} param_names")
    return zip(names, parameters, strict=True)


def by_name(groups: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """All parameters of the optimizer's groups."""
    return {name: parameter for group in groups for name, parameter in pairs_of(group)}


Named = list[list[tuple[str, Tensor]]]
"""By group the parameters that stand in it, with their names."""


def follow(groups: Sequence[dict[str, Any]], before: Named) -> Named:
    """Name what stands in the groups' lists now, which some libraries edit or exchange in place; what was there then.

    A parameter that was there keeps its name, in whichever group it is. Another one takes the name of that in whose
    place it stands where that is gone and had its shape (sharded by FSDP2, say), else a name of its own: that in
    `param_names` where there are as many as parameters, or `group0.param3`.

    Args:
        groups: the optimizer's; their `param_names` are changed.
        before: what this returned last.

    Raises:
        TypeError: something among them is no tensor.
    """
    if not are_changed(groups, before):
        return before
    names = {id(p): name for pairs in before for name, p in pairs}
    for number, group in enumerate(groups):
        for p in group.setdefault("params", []):
            if not isinstance(p, Tensor):
                raise TypeError(f"parameter group {number} has a {type(p).__name__} among its parameters, not a tensor")
    stays = {id(p) for group in groups for p in group["params"]}
    taken = set(names.values())
    found: Named = []
    for number, group in enumerate(groups):
        old = before[number] if number < len(before) else []
        given = list(group.get("param_names", ()))
        pairs = []
        for i, p in enumerate(group["params"]):
            name = names.get(id(p))
            if name is None and i < len(old) and id(old[i][1]) not in stays and old[i][1].shape == p.shape:
                name = old[i][0]
            if name is None:
                name = given[i] if len(given) == len(group["params"]) else f"group{number}.param{i}"
                while name in taken:
                    name += "'"
                taken.add(name)
            pairs.append((name, p))
        group["param_names"] = [name for name, _ in pairs]
        found.append(pairs)
    return found


NOT_FOLLOWED = (
    "the parameters in param_groups are not those of the last step: call follow_groups() on all ranks before saving or"
    " loading the optimizer's state"
)


def are_changed(groups: Sequence[Mapping[str, Any]], before: Named) -> bool:
    """Whether other parameters stand in the groups than `before`."""
    now = [[id(p) for p in group.get("params", ())] for group in groups]
    return now != [[id(p) for _, p in pairs] for pairs in before]


class Trained(NamedTuple):
    """A parameter that the optimizer is to update."""

    name: str
    parameter: Tensor
    group: int


def trained(groups: Iterable[Mapping[str, Any]], before: Collection[str]) -> list[Trained]:
    """What is trained: all but what is frozen, unless it was trained `before`."""
    return [
        Trained(name, parameter, index)
        for index, group in enumerate(groups)
        for name, parameter in pairs_of(group)
        if parameter.requires_grad or name in before
    ]


def frozen_names(groups: Iterable[Mapping[str, Any]]) -> set[str]:
    """The names of parameters that are frozen now."""
    return {name for name, parameter in by_name(groups).items() if not parameter.requires_grad}


def signature(trained: Iterable[Trained]) -> list[tuple[Any, ...]]:
    """What a plan's buckets and state were made for, and what exchanging, freezing, moving or casting changes."""
    return [(one.name, id(p := one.parameter), tuple(p.shape), p.dtype, p.device, one.group) for one in trained]


def check_group_names(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where a group's `adamw_names` or `matrices` has a name of no parameter."""
    known = by_name(groups)
    for group in groups:
        check_names("adamw_names", group["adamw_names"] or (), known)
        check_names("matrices", names_of(group["matrices"]), known)


def check_names(option: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError where one is not among those that parameters have."""
    for name in names:
        if name not in known:
            raise ValueError(f"{option} has {name!r}, but no parameter has this name")


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


def renaming(given: Any, named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """What `named_parameters_of` has made of the names that were given."""
    pairs = () if isinstance(given, Tensor) else zip(given, named, strict=False)
    return {entry[0]: name for entry, (name, _) in pairs if isinstance(entry, tuple)}


def _unwrapped(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """With the names that the parameters have within torch.compile, checkpointed activations, DistributedDataParallel.

    torch.distributed.checkpoint has them so too.
    """
    for wrapping in ("_orig_mod.", "_checkpoint_wrapped_module."):
        named = [(str(name).replace(wrapping, ""), parameter) for name, parameter in named]
    while named and all(name.startswith("module.") for name, _ in named):
        named = [(name.removeprefix("module."), parameter) for name, parameter in named]
    return named


def _check_parameter(name: str, parameter: Any) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"parameter {name!r} is a {type(parameter).__name__}, not a tensor")
    if not parameter.is_floating_point() and parameter.requires_grad:
        raise TypeError(f"parameter {name!r} is {parameter.dtype}; KLShampoo takes real floating-point parameters")
    if parameter.layout is not torch.strided:
        raise TypeError(f"parameter {name!r} is sparse ({parameter.layout}); KLShampoo takes dense parameters")
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
    `get_output_embeddings()` of the model or a part of it, or one whose weight is an Embedding's; where there is none
    of these, the only nn.Linear outside of the blocks that has as many outputs as an Embedding has rows, of which the
    log tells; never just the last Linear. Norms, biases and other parameters of fewer than two dimensions are not
    decayed. Stacked experts and fused weights of known libraries are read as the matrices that they hold; other
    parameters of three dimensions or more, but for convolutions, go to AdamW with a warning, unless `matrices` says
    what they are: see kl_dist.modules.

    Args:
        model: on its own or within torch.compile or DistributedDataParallel; the names are its own.
        lr: of all groups; None leaves it to the optimizer.
        weight_decay: of what is decayed.
        output_head: name of a module, as in `model.named_modules()`; "" where none is one.
        group_options: any option of a parameter group, for all of them.

    Returns:
        Up to three groups with named parameters, frozen ones included: matrices, AdamW decayed, AdamW not decayed.

    Raises:
        TypeError: an option that KLShampoo does not have.
        ValueError: no module has the name `output_head`, no parameter one in `matrices`.
    """
    options.check_known(group_options)
    given = group_options.pop("matrices", None)
    named = dict(_unwrapped(list(model.named_parameters())))
    check_names("matrices", names_of(given), named)
    said = modules.look_up(model, output_head)
    served = said.serve(named.items(), given, group_options.get("adamw_names"))
    matrices: list[tuple[str, Tensor]] = []
    decayed: list[tuple[str, Tensor]] = []
    undecayed: list[tuple[str, Tensor]] = []
    for name, parameter in named.items():
        if parameter.ndim < 2 or (name in served.adamw and id(parameter) in said.vectors):
            undecayed.append((name, parameter))
        elif name in served.adamw:
            decayed.append((name, parameter))
        else:
            matrices.append((name, parameter))
    shared = {**group_options, **({} if lr is None else {"lr": lr})}
    groups = [
        {**shared, "params": matrices, "weight_decay": weight_decay, **served.option},
        {**shared, "params": decayed, "weight_decay": weight_decay, "method": ELEMENTWISE},
        {**shared, "params": undecayed, "weight_decay": 0.0, "method": ELEMENTWISE},
    ]
    return [group for group in groups if group["params"]]


def plan(
    model_or_named_shapes: nn.Module | Mapping[str, Iterable[int]],
    world_size: int,
    *,
    shard_size: int = 1,
    dtype: torch.dtype = torch.float32,
    partition_size: int | None = None,
    max_state_bytes: int | None = None,
    ranks_per_node: int = FEWEST,
    **group_options: Any,
) -> Plan:
    """The plan KLShampoo would make at any world size, without a process group.

    Args:
        model_or_named_shapes: a model, on the meta device if it does not fit (routed as `param_groups` does), or a
            mapping of names to shapes (routed by dimension alone).
        world_size: number of ranks.
        shard_size: how many of them share a replica of the parameters: 1 for DDP, world_size for FSDP2, else HSDP.
        dtype: of the parameters, where only shapes are given.
        partition_size, max_state_bytes: as of KLShampoo.
        ranks_per_node: which partition groups fill, where the plan chooses their size.
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
        options.check_known(group_options)
        groups = [dict(group_options)]
        found = [Parameter(name, tuple(shape), dtype, 0) for name, shape in model_or_named_shapes.items()]
    resolved = [{**options.DEFAULTS, **group} for group in groups]
    for group in resolved:
        options.resolve(group)
    if shard_size > 1:
        found = [replace(one, sharding=fully_sharded(one.shape, world_size, shard_size)) for one in found]
    for name, value in (("partition_size", partition_size), ("max_state_bytes", max_state_bytes)):
        ranges.check_count(name, value)
    partition = Partition(partition_size, max_state_bytes, ranks_per_node)
    return make_plan(found, resolved, world_size, partition=partition)
