"""A step on a device that is not the host never waits for it, and what it asks of it is counted."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import launches
from tests.reference import METHODS


@pytest.mark.parametrize(("method", "recipe"), [*sorted(METHODS), ("kl_shampoo", "compact")])
def test_neither_update_nor_refresh_of_any_rule_waits_for_the_device(method: str, recipe: str) -> None:
    """On tensors without memory nothing can be read; the tests would know of it, as a branch on one raises."""
    counts = launches.count(method, recipe, 4, 96)
    assert counts["plain step"]["launches"] > 10 and counts["plain step"]["passes"] > 10
    with pytest.raises(RuntimeError):
        bool(torch.ones(1, device="meta") > 0)


def test_launches_of_a_stack_do_not_grow_with_its_matrices() -> None:
    few, many = (launches.count("kl_shampoo", "fresh", matrices, 96) for matrices in (4, 24))
    assert [part["launches"] for part in many.values()] == [part["launches"] for part in few.values()]


def test_every_method_has_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "launches.jsonl"
    launches.main(["--matrices", "2x48", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    said = capsys.readouterr().out
    assert [(line["method"], line["recipe"]) for line in lines] == launches.RULES
    assert all(f"| {line['method']} | {line['counts']['plain step']['launches']} |" in said for line in lines)
