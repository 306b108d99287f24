"""A profile of a step names its phases, as often as the plan has them, and the picture is of these."""

from argparse import Namespace
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import trace
from kl_dist import plan
from tests.world import World

STEPS = 2


def recorded(group: dist.ProcessGroup, args: Namespace) -> list[trace.Span]:
    return trace.record(args)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_every_phase_is_named_as_often_as_it_happens(
    layout: str, worlds: dict[int, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[list[trace.Span]] = []

    def run(args: Namespace) -> list[list[trace.Span]]:
        found.extend(worlds[2].run(recorded, 2, args))
        return found

    sizes = ["--width", "64", "--blocks", "1", "--warmup", "1", "--steps", str(STEPS)]
    trace.main(["--ranks", "2", "--layout", layout, "--out", str(tmp_path), *sizes], run)
    shapes = {str(i): shape for i, shape in enumerate(trace.gpt_shapes(64, 1))}
    buckets = len(plan(shapes, 2, shard_size=2 if layout == "fsdp" else 1).buckets)
    packs, exchanges = (2, 4) if layout == "fsdp" else (0, 2)  # launched and waited for; of a trip among one no wait
    for spans in found:
        counts = Counter(span.phase for span in spans)
        assert counts["agree"] == STEPS
        assert {counts[phase] for phase in ("update", "refresh", "apply")} == {STEPS * buckets}
        assert counts["pack"] == packs * STEPS * buckets and counts["exchange"] >= exchanges * STEPS * buckets
        for one, other in pairwise(spans):
            assert one.start <= one.stop <= other.start + 1e-6, "phases do not overlap: their times add up"
    said = capsys.readouterr().out
    assert all(f"| {phase} |" in said for phase in trace.COLOURS)
    assert (tmp_path / "trace.png").stat().st_size > 10_000
    for rank in (0, 1):
        text = (tmp_path / f"rank{rank}.json").read_text()
        assert all(f'"{trace.PREFIX}{phase}"' in text for phase in trace.COLOURS if packs or phase != "pack")
