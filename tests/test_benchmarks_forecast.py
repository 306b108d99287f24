"""benchmarks/forecast.py measures steps of real ranks and puts the forecast beside them. No time is asserted."""

import json
from pathlib import Path

import pytest

from benchmarks import forecast


def test_a_line_has_what_was_measured_and_what_was_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "forecast.jsonl"
    forecast.main(["--widths", "32", "--layouts", "fsdp", "--ranks", "2", "--repeats", "1", "--out", str(out)])
    (line,) = (json.loads(text) for text in out.read_text().splitlines())
    assert (line["width"], line["layout"], line["ranks"]) == (32, "fsdp", 2)
    assert all(line[key] > 0 for key in ("cpu", "forecast_cpu", "wall", "forecast_wall", "flops", "latency"))
    assert f"{1e3 * line['cpu']:.1f} | {1e3 * line['forecast_cpu']:.1f}" in capsys.readouterr().out
