"""`KLShampoo.state`: this rank's state as torch.optim shows it, and what becomes of what is put there.

The tensors are views of the engine's memory. What a user puts in the place of one is copied there before the next step
(tensors that were on the host meanwhile, say); a parameter whose entries are gone, or all of whose are, starts anew.
What stands under a key that is no parameter is the user's own: it stays, is saved by `state_dict` and loaded again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from kl_dist.checkpoint.holdings import Holding


class Watched:
    """Mixin of a dict: whether anything was put into it or taken out; a copy of it is a plain one."""

    touched = False


def _watching(name: str) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        self.touched = True
        return getattr(super(Watched, self), name)(*arguments, **named)

    return method


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(Watched, _name, _watching(_name))


class Entries(Watched, dict):
    """Of one parameter, by key."""

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class State(Watched, defaultdict):
    """By parameter."""

    def __reduce__(self) -> Any:
        return defaultdict, (dict, dict(self))


def own(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """What stands there under keys that are no parameters."""
    return {key: value for key, value in state.items() if not isinstance(key, Tensor)}


def show(held: Sequence[Holding], by_name: Mapping[str, Tensor], before: Mapping[Any, Any]) -> State:
    """What this rank holds of every parameter, by its keys in a checkpoint, and of `before` what is the user's own."""
    state = State(dict)
    dict.update(state, own(before))
    for name, entries in _by_parameter(held):
        dict.__setitem__(state, by_name[name], Entries({one.entry.key: one.value for one in entries}))
    return state


def settled(state: Any, held: Sequence[Holding], named: Iterable[Iterable[tuple[str, Tensor]]]) -> State:
    """The state as `show` has it, what was put there since taken up; itself where nothing was.

    Raises:
        ValueError: as `take_up`.
    """
    if isinstance(state, State) and not state.touched:
        entries = (value for key, value in state.items() if isinstance(key, Tensor))
        if not any(getattr(x, "touched", True) for x in entries):
            return state
    by_name = {name: parameter for pairs in named for name, parameter in pairs}
    take_up(state, held, by_name)
    return show(held, by_name, state)


def take_up(state: Mapping[Tensor, Any], held: Sequence[Holding], by_name: Mapping[str, Tensor]) -> None:
    """Copy what stands there into what this rank holds.

    Raises:
        ValueError: an entry is missing beside others, or has another number of elements; nothing is changed then.
    """
    found: list[tuple[Holding, Tensor | None]] = []
    for name, entries in _by_parameter(held):
        given = state.get(by_name[name]) or {}
        if not isinstance(given, Mapping):
            raise ValueError(
                f"the state of parameter {name!r} was replaced by {given!r}: put back the dict that was there, or clear"
                " it to start the state anew"
            )
        for holding in entries:
            tensor = given.get(holding.entry.key)
            wanted = holding.value
            if given and (not isinstance(tensor, Tensor) or tensor.numel() != wanted.numel()):
                what = f"state {holding.entry.key!r} of parameter {name!r}"
                said = "is gone" if tensor is None else f"was replaced by {getattr(tensor, 'shape', tensor)}"
                raise ValueError(
                    f"{what} {said}, where {tuple(wanted.shape)} is wanted: put back what was there, or clear all of"
                    " the parameter's state to start it anew"
                )
            found.append((holding, tensor))
    for holding, tensor in found:
        if tensor is None:
            holding.memory.zero_()
        elif holding.memory.numel():
            holding.fill(tensor)


def _by_parameter(held: Sequence[Holding]) -> Iterator[tuple[str, list[Holding]]]:
    """The holdings of every parameter, without those that are no state."""
    found: dict[str, list[Holding]] = {}
    for holding in held:
        if not holding.entry.is_form:
            found.setdefault(holding.name, []).append(holding)
    yield from found.items()
