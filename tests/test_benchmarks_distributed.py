"""The benchmark of the division over ranks runs, and says what the plan says. How long it takes is asserted nowhere."""

import json
from pathlib import Path

import pytest

from benchmarks import distributed
from kl_dist import plan


def test_every_layout_has_a_row_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "distributed.jsonl"
    sizes = ["--width", "64", "--blocks", "1", "--repeats", "2", "--warmup", "1"]
    distributed.main([*sizes, "--ranks", "2", "--out", str(out)])
    said = capsys.readouterr().out
    ddp, fsdp, meta = (json.loads(line) for line in out.read_text().splitlines())
    assert (ddp["layout"], fsdp["layout"]) == ("ddp", "fsdp")
    shapes = {str(i): shape for i, shape in enumerate(distributed.gpt_shapes(64, 1))}
    assert ddp["sent"] == plan(shapes, 2).comm_bytes[0]
    assert fsdp["sent"] == plan(shapes, 2, shard_size=2).comm_bytes[0]
    for line in (ddp, fsdp):
        assert 0 <= line["hidden"] <= 1 and line["cpu_most"] >= line["cpu"] > 0
        assert line["state"] == max(plan(shapes, 2).state_bytes)
        assert f"| kl_shampoo | {line['layout']} | 2 |" in said
    assert "cpu" in meta or meta["contender"] in said  # measured, or its absence is named
