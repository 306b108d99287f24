"""The fit of the Newton-Schulz steps is the best there is on its range, and the look at a run's spectra runs."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import polar
from kl_dist import methods

SMALL = "--layers 1 --width 16 --heads 2 --context 16 --tokens-per-step 64 --steps 4"


@pytest.mark.parametrize("low", [0.5, 0.1, 0.01])
def test_a_quintic_misses_one_equally_at_four_points_of_its_range_and_nowhere_more(low: float) -> None:
    """By Chebyshev's theorem no odd quintic, which has three coefficients, misses by less."""
    triple, error = polar.best_quintic(low, 1.0)
    x = np.linspace(low, 1, 100_001)
    missed = 1 - polar.applied(x, [triple])
    assert np.abs(missed).max() == pytest.approx(error)
    ends = missed[np.abs(missed) > error * (1 - 1e-6)]
    assert np.count_nonzero(np.diff(np.sign(ends))) == 3


def test_more_steps_miss_by_less() -> None:
    x = np.linspace(0.05, 1, 1001)
    missed = [np.abs(1 - polar.applied(x, polar.composition(0.05, steps))).max() for steps in range(1, 7)]
    assert all(after < before / 2 for before, after in pairwise(missed)) and missed[-1] < 1e-12


def test_a_run_is_looked_at_and_becomes_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(polar, "RESULTS", tmp_path / "spectra.jsonl")
    monkeypatch.setitem(methods._METHODS, "kl_shampoo", methods.METHODS["kl_shampoo"])  # its recipe goes afterwards
    polar.main(SMALL.split())
    (line,) = map(json.loads, (tmp_path / "spectra.jsonl").read_text().splitlines())
    assert line["torch"] and line["job"] == SMALL.split()
    assert 0 < line["quantiles"]["0.5"] < line["quantiles"]["1"] <= 1
    assert line["alignments"]["0.025"]["3"] > line["alignments"]["none"]["0"]
    assert "l Muon" in capsys.readouterr().out
