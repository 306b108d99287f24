"""The benchmark of the watch runs."""

import json
from pathlib import Path

from benchmarks import watch


def test_the_cost_of_a_sign_is_measured(tmp_path: Path) -> None:
    watch.main(["--ranks", "2", "--calls", "3", "--rounds", "1", "--out", str(tmp_path / "watch.jsonl")])
    record = json.loads((tmp_path / "watch.jsonl").read_text())
    assert record["ranks"] == 2 and record["sign"] > record["doing"] > 0
