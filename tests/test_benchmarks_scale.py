"""The benchmark of large worlds runs, and what it replaces is what a rank would have exchanged. No time is asserted."""

import json
from pathlib import Path

import pytest

from benchmarks import scale


def test_a_case_is_planned_and_stepped_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = scale.Case("gpt2", 32, 4)
    monkeypatch.setattr(scale, "CASES", (case, scale.Case("gpt2", 8, 1)))
    out = tmp_path / "scale.jsonl"
    scale.main(["--models", "gpt2", "--ranks", "32", "--steps", "1", "--commit", "this", "--out", str(out)])
    (line,) = (json.loads(line) for line in out.read_text().splitlines())
    assert (line["layout"], line["commit"], line["units"]) == ("HSDP 8 x 4", "this", 144 + 100)
    assert line["partition_size"] == 16
    assert line["host_agree_seconds"] > 0 and line["host_run_seconds"] > 0
    assert f"| {line['balance']:.2f} |" in capsys.readouterr().out
    assert "error" in scale.measured(case, 1, limit=0.01)
