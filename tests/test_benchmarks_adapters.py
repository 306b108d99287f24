"""The benchmarks of adapters run. How long a step takes, or who learns best, is asserted nowhere."""

import json
from pathlib import Path

import pytest

from benchmarks import adapters
from tests.jobs import as_started, text_in


def test_every_route_has_a_line_and_less_is_kept_of_a_long_side_that_is_not_whitened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adapters.jsonl"
    sizes = ["--ranks", "4", "8", "--repeats", "2", "--warmup", "1"]
    monkeypatch.setattr(adapters, "adapter_shapes", lambda size, rank: [(rank, 64), (192, rank)])
    adapters.main([*sizes, "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    said = capsys.readouterr().out
    names = [*adapters.routes(8), "AdamW (torch)"]
    assert [(line["rank"], line["contender"]) for line in lines] == [(rank, name) for rank in (4, 8) for name in names]
    assert all(f"| {name} |" in said for name in names)
    for rank in (4, 8):
        kept = {line["contender"]: line["state_ratio"] for line in lines if line["rank"] == rank}
        assert kept["kl_shampoo, identity"] < kept["kl_shampoo, diagonal"] < kept["AdamW (torch)"]
        assert kept["AdamW (torch)"] < kept["kl_shampoo, square blocks"] < kept["kl_shampoo, blocks"]


def test_a_comparison_of_adapters_is_one_of_launch_compare(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from benchmarks import finetuning

    sizes = "--layers 1 --width 32 --heads 2 --context 32 --tokens-per-step 96 --base-steps 2 --steps 4 --eval-every 2"
    where = f"--data {text_in(tmp_path)} --base {tmp_path / 'base'} --results {tmp_path / 'found.jsonl'}"
    runs = ["--run", "--optimizer adamw --rank 2", "--run", "--long-side diagonal", "--grid", "b_ratio=1,4"]
    with as_started(None, "benchmarks.finetuning"):
        assert finetuning.main([*sizes.split(), *where.split(), *runs]) == 0
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [(run["settings"]["rank"], run["settings"]["b_ratio"]) for run in found] == [(2, 1), (2, 4), (8, 1), (8, 4)]
    assert all(run["status"] == "done" and run["settings"]["task"] == "finetuning" for run in found)
    assert found[0]["state_bytes"] / 4 / found[0]["parameters"] == pytest.approx(2, abs=0.05)
    assert (tmp_path / "found.md").read_text().startswith("| setting |")
