"""The benchmark of the division over ranks runs, and says what the plan says. How long it takes is asserted nowhere."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks import distributed, report
from kl_dist import plan
from tests.world import World

SHAPES = {str(i): shape for i, shape in enumerate(distributed.gpt_shapes(64, 1))}


def measured(group: dist.ProcessGroup, layout: str, contender: str, args: Namespace) -> dict[str, Any]:
    return distributed.measure(layout, contender, args)


@pytest.mark.parametrize("where", ["ranks that are there", pytest.param("processes", marks=pytest.mark.full)])
def test_every_layout_has_a_row_and_a_line(
    where: str, worlds: dict[int, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rank, and the contender that is not ours, are measured in processes of their own in any case."""

    def run(ranks: int, layout: str, contender: str, args: Namespace) -> report.Line:
        if where == "processes" or ranks == 1 or contender != distributed.OURS:
            return distributed.run(ranks, layout, contender, args)
        found = worlds[ranks].run(measured, ranks, layout, contender, args)
        return distributed.together(layout, contender, found)

    out = tmp_path / "distributed.jsonl"
    sizes = ["--width", "64", "--blocks", "1", "--repeats", "2", "--warmup", "1"]
    distributed.main([*sizes, "--ranks", "2", "--out", str(out)], run)
    distributed.main([*sizes, "--ranks", "1", "--layouts", "ddp", "--no-peers", "--out", str(out)], run)
    said = capsys.readouterr().out
    ddp, fsdp, meta, alone = (json.loads(line) for line in out.read_text().splitlines())
    assert (ddp["layout"], fsdp["layout"], meta["contender"]) == ("ddp", "fsdp", distributed.META)
    assert ddp["sent"] == plan(SHAPES, 2).comm_bytes[0]
    assert fsdp["sent"] == plan(SHAPES, 2, shard_size=2).comm_bytes[0]
    assert alone["sent"] == 0 and "hidden" not in alone
    for line in (ddp, fsdp):
        assert 0 <= line["hidden"] <= 1
    for line in (ddp, fsdp, alone):
        assert line["cpu_most"] >= line["cpu"] > 0
        assert line["state"] == max(plan(SHAPES, line["ranks"]).state_bytes)
        assert f"| kl_shampoo | {line['layout']} | {line['ranks']} |" in said
    measured_or_named = f"| {distributed.META} | ddp | 2 |" if "cpu" in meta else f"on 2 ranks: {meta['error']}"
    assert measured_or_named in said
