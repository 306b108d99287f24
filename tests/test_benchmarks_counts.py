"""What is counted of a step is what it does."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kl_dist
from benchmarks import contenders, counts, step
from benchmarks.checkouts import package_of
from tests.pages import ROOT


def test_calls_views_and_elements_are_told_apart() -> None:
    x, y = torch.ones(2, 4, 4), torch.ones(2, 4, 4)
    with counts.Calls() as counted:
        z: Tensor = x.mT  # a view
        torch.bmm(z, y, out=x)  # a product: a call, no pass
        x.add_(y)  # reads two, writes one
        torch.mul(x, 2.0, out=y)  # reads one, writes one
        torch.empty_like(x)  # writes nothing
    assert (counted.calls, counted.views, counted.elements) == (4, 1, 5 * 32)


@pytest.mark.parametrize(("method", "copies"), [("kl_shampoo", 2), ("soap", 2), ("shampoo", 2), ("muon", 3)])
def test_a_plain_step_has_the_flops_and_the_temporaries_of_its_plan(method: str, copies: int) -> None:
    shapes = [(48, 48)] * 6  # too small to be halved
    [contender] = contenders.ours([method])
    found = counts.count(contender, shapes)["plain"]
    plan = kl_dist.plan({f"W{i}": shape for i, shape in enumerate(shapes)}, 1, method=method)
    assert found["temporaries"] == pytest.approx(copies, rel=0.1)
    if method != "muon":
        unit = plan.units[0]
        flops = kl_dist.METHODS[method].rules["fresh"].flops((48, 48), unit.block.sides)
        sums = 2 * 48**2 if method == "kl_shampoo" else 0  # of squares, along the rows
        assert found["flops"] == 6 * (flops.update + sums)


def test_another_checkout_is_timed_beside_under_its_folders_name(tmp_path: Path) -> None:
    """And this process's own modules stay what they are."""
    copy = tmp_path / "older"
    copy.mkdir()
    (copy / "kl_dist").symlink_to(ROOT / "kl_dist")
    own = kl_dist.KLShampoo
    assert package_of(copy).KLShampoo is not own
    out = tmp_path / "step.jsonl"
    less = ["--shapes", "6x4", "--no-peers", "--repeats", "1", "--warmup", "1", "--gpu", "none", "--out", str(out)]
    step.main([*less, "--methods", "soap", "--only", "soap", "--beside", str(copy)])
    assert [json.loads(line)["contender"] for line in out.read_text().splitlines()] == ["soap", "soap (older)"]
    import kl_dist as still

    assert still.KLShampoo is own
    with pytest.raises(ModuleNotFoundError, match="give the root of a checkout"):
        package_of(tmp_path)


def test_every_contender_has_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "counts.jsonl"
    counts.main(["--width", "8", "--methods", "kl_shampoo", "muon", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    said = capsys.readouterr().out
    assert {"kl_shampoo", "muon", "AdamW (torch)"} <= {line["contender"] for line in lines}
    for line in lines:
        for kind in line["counts"]:
            assert f"| {line['contender']} | {kind} |" in said
