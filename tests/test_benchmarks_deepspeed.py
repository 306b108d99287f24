"""The benchmark of DeepSpeed's stages runs, and sends what the plan says. How long it takes is asserted nowhere."""

import functools
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import deepspeed
from kl_dist.planning.plan import Plan
from tests.deepspeed_runs import deepspeed_here
from tests.jobs import text_in
from tests.world import World
from tests.zero_plans import zero_plan

WIDTH, LAYERS = 16, 1
SIZES = f"--layers {LAYERS} --width {WIDTH} --steps 3 --warmup 1 --repeats 2 --contenders KLShampoo".split()


def measured(
    group: dist.ProcessGroup, contender: str, stage: int, draw: int | None, args: Namespace
) -> deepspeed.Found:
    with deepspeed_here(group):
        return deepspeed.measure(contender, stage, draw, args)


def run_on(world: World, contender: str, stage: int, draw: int | None, args: Namespace) -> deepspeed.Found:
    return deepspeed.together(world.run(measured, args.ranks, contender, stage, draw, args))


def planned(stage: int, ranks: int) -> Plan:
    """What the optimizer plans for the benchmark's model."""
    model = deepspeed.model_of(Namespace(width=WIDTH, layers=LAYERS))
    elementwise = ["tokens.embed.weight", "positions.embed.weight", "head.lm_head.weight"]
    return zero_plan({name: tuple(p.shape) for name, p in model.named_parameters()}, ranks, stage, elementwise)


@pytest.mark.parametrize(
    ("ranks", "stages", "where"),
    [
        (2, (1, 3), "ranks that are there"),
        (1, (0,), "processes"),
        pytest.param(2, (1, 3), "processes", marks=pytest.mark.full),
    ],
)
def test_every_stage_has_a_row_and_a_line(
    ranks: int,
    stages: tuple[int, ...],
    where: str,
    worlds: dict[int, World],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = deepspeed.run if where == "processes" else functools.partial(run_on, worlds[ranks])
    sizes, out = [*SIZES, "--ranks", str(ranks), "--repeats", str(ranks)], tmp_path / "deepspeed.jsonl"
    deepspeed.main([*sizes, "--stages", *map(str, stages), "--data", str(text_in(tmp_path)), "--out", str(out)], run)
    said, lines = capsys.readouterr().out, [json.loads(line) for line in out.read_text().splitlines()]
    expected = [*((stage, False) for stage in stages), (stages[0], True)]
    assert [(line["stage"], line["noise"] > 0) for line in lines] == expected
    assert lines[0]["difference"] == 0 and lines[-1]["difference"] > 0 and f"| KLShampoo | {stages[0]}, noise |" in said
    for line in lines:
        found = planned(line["stage"], ranks)
        assert line["sent"] == max(found.comm_bytes) and line["state"] == max(found.state_bytes)
        assert line["difference"] <= 1e-4 and line["seconds"] > 0 and len(line["seconds_of_runs"]) == ranks
        assert f" | {line['difference']:.1e} | " in said


def test_what_fails_is_a_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deepspeed.jsonl"
    missing = ["--ranks", "1", "--stages", "1", "--repeats", "1", "--data", str(tmp_path / "missing.txt")]
    deepspeed.main([*SIZES, *missing, "--out", str(out)])
    said, lines = capsys.readouterr().out, [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["stage"], line["noise"] > 0) for line in lines] == [(1, False), (1, True)]
    for line in lines:
        assert "missing.txt" in line["error"] and line["error"] in said
