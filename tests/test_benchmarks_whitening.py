"""The look at whitening over a run: its measures are what they are called, and a run becomes a line and a picture."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import whitening
from kl_dist import methods
from kl_dist.methods import Hyper
from kl_dist.methods.rule import Rule
from kl_dist.methods.state import MatrixState
from launch.options import UsageError, parse
from launch.ranks import joined_ranks
from launch.train import Job

SMALL = "--layers 1 --width 16 --heads 2 --context 16 --tokens-per-step 64 --steps 10"


def evenness_of(update: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    """What is seen of a method that returns `update`."""
    constant: Rule = methods.rule("kl_shampoo", "fresh")._replace(update=lambda state, grad, hyper, spare: update)
    monkeypatch.setattr(whitening, "rule", lambda method, recipe: constant)
    watch = whitening.Watch("kl_shampoo")
    watch.looking = True
    watch(MatrixState(torch.zeros(1), torch.zeros(1), torch.zeros(1)), update, Hyper((0.9, 0.9), 0.0), update)
    rms, evenness = watch.means()
    assert rms == pytest.approx(update.square().mean().sqrt().item(), rel=1e-5)
    return evenness


def test_evenness_is_one_of_an_orthogonal_update_and_least_at_rank_one(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    noise = torch.randn(1, 64, 64)
    assert evenness_of(3.0 * torch.linalg.qr(noise).Q, monkeypatch) == pytest.approx(1, abs=1e-4)
    assert evenness_of(noise, monkeypatch) == pytest.approx(8 / (3 * math.pi), abs=0.01)  # the quarter circle's law
    assert evenness_of(noise[:, :, :1] @ noise[:, :1], monkeypatch) == pytest.approx(1 / 8, abs=1e-3)


def test_the_signals_share_is_one_where_both_halves_of_the_batch_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    with joined_ranks() as ranks:
        job = Job(parse(SMALL.split()), ranks)
        apart = whitening.signal(job, 1)
        monkeypatch.setattr(job, "rows", lambda step: torch.tensor([5, 5]))
        assert whitening.signal(job, 1) == pytest.approx(1, abs=1e-5)
        assert apart < 0.999


@pytest.mark.parametrize("optimizer", ["kl_shampoo", "kl_muon"])
def test_a_run_becomes_a_line_and_a_picture(
    optimizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(whitening, "RESULTS", tmp_path / "whitening.jsonl")
    method = optimizer.replace("kl_muon", "muon")
    monkeypatch.setitem(methods._METHODS, method, methods.METHODS[method])  # its recipe goes afterwards
    whitening.main(["--optimizer", optimizer, *SMALL.split(), "--set", "polar=0"])
    (line,) = map(json.loads, (tmp_path / "whitening.jsonl").read_text().splitlines())
    assert line["step"] == [1, 10] and line["optimizer"] == optimizer and line["torch"]
    assert all(0 < value <= 1.0001 for value in line["evenness"])
    assert (min(line["evenness"]) > 0.9) == (optimizer == "kl_muon")  # only Muon begins orthogonal
    assert "evenness" in capsys.readouterr().out
    whitening.main(["--draw", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_an_optimizer_that_whitens_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="not at adamw"):
        whitening.main(["--optimizer", "adamw", *SMALL.split()])
