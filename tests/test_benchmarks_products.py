"""The benchmark of products runs, and has a line for each way that operands lie in memory."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import products


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has the older switches alone"
)
def test_every_layout_has_a_line_with_the_time_of_each_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "products.jsonl"
    products.main(["--shapes", "2x6", "1x20", "--repeats", "3", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    layouts = [("rows", "rows"), ("rows", "columns"), ("columns", "rows"), ("columns", "columns")]
    said = [(line["matrices"], line["left"], line["right"]) for line in lines]
    assert said == [(matrices, *layout) for matrices in ("2x6x6", "1x20x20") for layout in layouts]
    for line in lines:
        assert set(line["seconds"]) == {"BLAS", "oneDNN"}
        assert all(len(each) == 3 and min(each) > 0 for each in line["seconds"].values())
    assert capsys.readouterr().out.count("| 2x6x6 |") == 4
