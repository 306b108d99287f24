"""The benchmark of a refresh's parts runs, and what it measures is what it says."""

import json
from pathlib import Path

import pytest

from benchmarks import refresh


def test_every_way_has_a_line_and_gives_rotations_or_roots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "refresh.jsonl"
    refresh.main(["--shapes", "2x6", "3x20", "--gpu-shapes", "2x6", "--repeats", "2", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    on_cpu = [line for line in lines if line["device"] == "cpu"]
    ways = [*refresh.ROTATIONS, *refresh.ROOTS]
    assert [(line["matrices"], line["way"]) for line in on_cpu] == [(m, w) for m in ("2x6x6", "3x20x20") for w in ways]
    assert all(len(line["seconds"]) == 2 for line in lines)
    assert all(line["off"]["near"] < 1e-4 for line in lines)
    assert all(line["off"]["far"] < 1e-2 for line in lines if line["way"] in refresh.ROOTS)
    said = capsys.readouterr().out
    assert all(f"| {way} |" in said for way in ways)
