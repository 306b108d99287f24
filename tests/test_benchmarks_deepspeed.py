"""The benchmark of DeepSpeed's stages runs, and sends what the plan says. How long it takes is asserted nowhere."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import deepspeed
from kl_dist.partition import Plan
from tests.zero_plans import zero_plan

WIDTH, LAYERS = 16, 1
SIZES = f"--layers {LAYERS} --width {WIDTH} --steps 3 --warmup 1 --repeats 2 --contenders KLShampoo".split()


def planned(stage: int) -> Plan:
    """What the optimizer plans for the benchmark's model on two ranks."""
    model = deepspeed.model_of(Namespace(width=WIDTH, layers=LAYERS))
    elementwise = ["tokens.embed.weight", "positions.embed.weight", "head.lm_head.weight"]
    return zero_plan({name: tuple(p.shape) for name, p in model.named_parameters()}, 2, stage, elementwise)


def test_every_stage_has_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "deepspeed.jsonl"
    text.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(200)))
    deepspeed.main([*SIZES, "--stages", "1", "3", "--data", str(text), "--out", str(out)])
    said, lines = capsys.readouterr().out, [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["stage"], line["noise"] > 0) for line in lines] == [(1, False), (3, False), (1, True)]
    assert lines[0]["difference"] == 0 and "| KLShampoo | 1, noise |" in said
    for line in lines:
        found = planned(line["stage"])
        assert line["sent"] == max(found.comm_bytes) and line["state"] == max(found.state_bytes)
        assert line["difference"] <= 1e-4 and line["seconds"] > 0
        assert f" | {line['difference']:.1e} | " in said


def test_what_fails_is_a_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deepspeed.jsonl"
    deepspeed.main([*SIZES, "--stages", "1", "--data", str(tmp_path / "missing.txt"), "--out", str(out)])
    said = capsys.readouterr().out
    for line in map(json.loads, out.read_text().splitlines()):
        assert "missing.txt" in line["error"] and line["error"] in said
