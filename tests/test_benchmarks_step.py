"""The benchmark of the step runs, and leaves no contender out. How long anything takes is asserted nowhere."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, step, timing
from kl_dist import METHODS, KLShampoo

TINY = ["--shapes", "6x4", "4x4", "--repeats", "2", "--warmup", "1", "--gpu", "none"]


@pytest.mark.parametrize("peers", [[], ["--no-peers"]])
def test_every_contender_has_a_row_and_a_line(
    peers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step.jsonl"
    step.main([*TINY, *peers, "--out", str(out)])
    cpu, wall = capsys.readouterr().out.split("Wall time")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = [line["contender"] for line in lines]
    timed = [line for line in lines if "error" not in line]
    assert {*METHODS, "AdamW (torch)"} <= {line["contender"] for line in timed}
    assert ("KL-Shampoo (authors)" in names) == (not peers)  # timed, or listed as not installed
    for name in names:
        assert f"| {name} |" in cpu
        assert f"| {name} |" in wall
    for line in timed:
        assert {len(seconds) for seconds in line["cpu"].values()} == {2}
        assert line["torch"] and line["threads"] == 1 and line["shapes"] == [[6, 4], [4, 4]]


def test_the_kind_asked_for_is_the_kind_of_step_that_is_timed() -> None:
    [contender] = contenders.ours(["kl_shampoo"])
    runner = timing.Runner(contender, [(6, 4), (4, 4)], torch.device("cpu"))
    optimizer = runner.optimizer
    assert isinstance(optimizer, KLShampoo)
    counts = []
    for kind in ("plain", "refresh", "plain", "refresh"):
        runner.step(kind, keep=True)
        counts.append(optimizer.stats()["refreshes"])
    assert counts[0] == 0 and counts[1] == counts[2] > 0 and counts[3] == 2 * counts[1]


def test_state_is_counted_once_however_many_views_it_has() -> None:
    parameter = torch.nn.Parameter(torch.zeros(8, 4))
    parameter.grad = torch.ones(8, 4)
    adamw = torch.optim.AdamW([parameter])
    adamw.step()
    assert contenders.state_bytes(adamw) == 2 * parameter.nbytes + 4  # and the step count
    adamw.state[parameter]["view"] = adamw.state[parameter]["exp_avg"][:2]
    assert contenders.state_bytes(adamw) == 2 * parameter.nbytes + 4


@pytest.mark.parametrize("every", [1, 2, 10])
def test_a_refresh_is_shared_by_the_steps_between_two_of_them(every: int) -> None:
    assert timing.amortised({"plain": [1.0, 1.0], "refresh": [3.0, 3.0]}, every) == 1 + 2 / every
    assert timing.amortised({"refresh": [3.0]}, every) == 3
    assert timing.amortised({"plain": [1.0]}, every) == 1


def test_a_shape_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--shapes", "384"])
    assert "a shape is written like 1152x384" in capsys.readouterr().err
