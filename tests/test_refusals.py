"""Every row of docs/compatibility.md's table of refusals raises the error that it names, and changes nothing."""

import builtins
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kl_dist import KLShampoo
from tests.pages import ROOT


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (4, 3)))


def step_after(change: Callable[[KLShampoo, nn.Parameter], object]) -> None:
    """A step on what was made well and changed then."""
    p = weight()
    opt = KLShampoo([p])
    p.grad = torch.ones_like(p)
    change(opt, p)
    before = p.detach().clone()
    try:
        opt.step()
    finally:
        assert torch.equal(p, before)


def give(grad: Tensor) -> Callable[[KLShampoo, nn.Parameter], None]:
    def change(opt: KLShampoo, p: nn.Parameter) -> None:
        p.grad = grad

    return change


def reshape(opt: KLShampoo, p: nn.Parameter) -> None:
    p.data = torch.ones(3, 4)
    p.grad = torch.ones(3, 4)


def of_adamw() -> None:
    p = weight()
    adamw = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    adamw.step()
    KLShampoo([p]).load_state_dict(adamw.state_dict())


def with_option(name: str) -> Callable[[], object]:
    return lambda: KLShampoo([weight()], **{name: True})


REFUSED: dict[str, list[Callable[[], object]]] = {
    "a sparse parameter": [lambda: KLShampoo([torch.ones(4, 3).to_sparse().requires_grad_()])],
    "a sparse gradient": [lambda: step_after(give(torch.ones(4, 3).to_sparse()))],
    "a complex parameter": [lambda: KLShampoo([nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))])],
    "a parameter twice": [
        lambda: KLShampoo(2 * [weight()]),
        lambda: KLShampoo([{"params": (p := weight())}, {"params": p}]),
        lambda: KLShampoo([p := weight()]).add_param_group({"params": p}),
    ],
    "a parameter twice, in `param_groups` later": [
        lambda: step_after(lambda opt, p: opt.param_groups[0]["params"].append(p)),
        lambda: step_after(lambda opt, p: opt.param_groups.extend(opt.param_groups) or opt.follow_groups()),
    ],
    "a group appended to `param_groups`": [
        lambda: step_after(lambda opt, p: opt.param_groups.append({**opt.param_groups[0], "params": [weight()]}))
    ],
    "parameters in a set": [lambda: KLShampoo({weight()}), lambda: KLShampoo([{"params": {weight()}}])],
    "parameters on two devices": [lambda: KLShampoo([weight(), nn.Parameter(torch.ones(4, 3, device="meta"))])],
    "a parameter of another shape than before": [lambda: step_after(reshape)],
    "a tensor that is no leaf": [lambda: KLShampoo([2 * weight()])],
    "`lr` as a tensor of several elements": [lambda: KLShampoo([weight()], lr=torch.tensor([0.1, 0.1]))],
    **{f"`{name}=True`": [with_option(name)] for name in ("amsgrad", "maximize", "capturable", "differentiable")},
    "`foreach=True`, `fused=True`": [with_option("foreach"), with_option("fused")],
    "the state of another optimizer": [of_adamw],
}


def said() -> dict[str, str]:
    """By what is given, the error: the first two columns of the table."""
    text = (ROOT / "docs/compatibility.md").read_text()
    table = text.partition("## What is refused")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("|")]
    return {what.strip(): error.strip() for what, error in rows[2:]}


def test_the_table_has_a_row_for_every_case_and_a_case_for_every_row():
    assert said().keys() == REFUSED.keys()


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_table_says_is_refused_is_refused(what):
    for case in REFUSED[what]:
        with pytest.raises(getattr(builtins, said()[what])):
            case()


def test_torch_warns_of_what_it_takes_twice():
    p = weight()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        torch.optim.AdamW([p, p])


@pytest.mark.parametrize("declined", [None, False])
def test_torchs_options_are_taken_where_they_are_not_asked_for(declined):
    names = ("amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable")
    opt = KLShampoo([{"params": [weight()], **dict.fromkeys(names, declined)}], **dict.fromkeys(names, declined))
    assert not set(names) & opt.param_groups[0].keys()
