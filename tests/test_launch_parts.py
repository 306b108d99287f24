"""The job's parts, each on its own: text and split, schedule, model, folders."""

from pathlib import Path

import pytest
import torch
from torch import nn

from kl_dist import KLShampoo
from launch.data import load_corpus, standard_library, training_starts, validation_starts, windows
from launch.model import GPT
from launch.muon import Float32Muon
from launch.optimizers import make_trainer, schedule
from launch.options import Options, UsageError
from launch.records import set_aside
from launch.report import smoothed


def test_no_file_of_the_library_is_on_both_sides_of_the_split() -> None:
    corpus = standard_library()
    assert not set(corpus.train_files) & set(corpus.validation_files)
    assert "argparse.py" in corpus.train_files + corpus.validation_files
    assert not [name for name in corpus.train_files if "site-packages" in name]
    assert 0.03 < len(corpus.validation) / len(corpus.train) < 0.25
    assert torch.equal(corpus.train, standard_library().train)


def test_a_file_of_ones_own_keeps_its_last_tenth_for_validation(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"a" * 900 + b"b" * 100)
    corpus = load_corpus(str(path), context=16)
    assert bytes(corpus.train.tolist()) == b"a" * 900
    assert bytes(corpus.validation.tolist()) == b"b" * 100


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (b"short", "too few for --context 16")])
def test_a_text_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_corpus(str(path), context=16)


def test_targets_are_the_inputs_one_byte_further() -> None:
    text = torch.arange(50, dtype=torch.uint8)
    inputs, targets = windows(text, torch.tensor([0, 40]), context=9)
    assert inputs.tolist() == [list(range(9)), list(range(40, 49))]
    assert torch.equal(targets, inputs + 1)


def test_every_window_lies_within_the_text() -> None:
    text = torch.zeros(20, dtype=torch.uint8)
    for starts in (training_starts(text, 0, 1, 500, 16), validation_starts(text, 5, 16)):
        assert starts.min() >= 0 and starts.max() + 16 + 1 <= len(text)


@pytest.mark.parametrize(("shape", "last", "half"), [("cosine", 0.01, 0.5), ("linear", 0.02, 0.5), ("wsd", 0.06, 1.0)])
def test_the_schedule_warms_up_and_falls_towards_zero(shape: str, last: float, half: float) -> None:
    rates = [schedule(step, steps=100, warmup=10, shape=shape) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < last
    assert rates[54] == pytest.approx(half, abs=0.02)


def test_the_schedule_is_torchs_after_the_warm_up() -> None:
    """CosineAnnealingLR and LinearLR over the steps and one more, at which they would be at 0."""
    lr_scheduler = torch.optim.lr_scheduler
    parameter = nn.Parameter(torch.zeros(()))
    cosine = lr_scheduler.CosineAnnealingLR(torch.optim.SGD([parameter], lr=1.0), 91)
    linear = lr_scheduler.LinearLR(torch.optim.SGD([parameter], lr=1.0), 1.0, 0.0, 91)
    for shape, theirs in (("cosine", cosine), ("linear", linear)):
        for step in range(10, 101):
            assert schedule(step, 100, 10, shape) == pytest.approx(theirs.get_last_lr()[0])
            theirs.optimizer.step()
            theirs.step()
    assert [schedule(step, 100, 10, "constant") for step in (5, 10, 100)] == [0.5, 1.0, 1.0]
    assert [schedule(step, 110, 10, "wsd") for step in (90, 100, 110)] == pytest.approx([1, 11 / 20.2, 1 / 20.2])


def test_the_model_predicts_from_the_past_alone() -> None:
    torch.manual_seed(0)
    model = GPT(layers=2, width=16, heads=2, context=8)
    tokens = torch.randint(256, (1, 8))
    changed = tokens.clone()
    changed[0, -1] += 1
    assert torch.equal(model(tokens)[:, :-1], model(changed % 256)[:, :-1])


def test_the_engines_muon_on_whole_matrices_follows_torchs_muon() -> None:
    """Under names of their own: "muon" is torch's, in float32, and "kl_muon" ours."""
    losses: dict[str, list[float]] = {}
    for name, more in (("muon", ()), ("kl_muon", ("blocking=none",))):
        torch.manual_seed(0)
        model = GPT(layers=1, width=16, heads=2, context=8)
        trainer = make_trainer(Options(optimizer=name, set=more, lr=1.5e-2, adamw_lr=5e-3, steps=20), model)
        assert isinstance(trainer.optimizers[0], Float32Muon if name == "muon" else KLShampoo)
        for step in range(1, 21):
            tokens = torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            trainer.zero_grad()
            loss.backward()
            trainer.step(step)
            losses.setdefault(name, []).append(loss.item())
    assert losses["kl_muon"] == pytest.approx(losses["muon"], abs=1e-4) and losses["muon"][-1] != losses["muon"][0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_updated_and_norms_do_not_decay(optimizer: str) -> None:
    model = GPT(layers=1, width=16, heads=2, context=8)
    trainer = make_trainer(Options(optimizer=optimizer), model)
    groups = [group for one in trainer.optimizers for group in one.param_groups]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.01 if parameter.ndim == 2 else 0.0)


def test_a_fresh_start_moves_an_earlier_run_aside(tmp_path: Path) -> None:
    assert set_aside(tmp_path) is None
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(f"run {number}")
        assert set_aside(tmp_path) == tmp_path / f"earlier-{number}"
        assert (tmp_path / f"earlier-{number}" / "metrics.jsonl").read_text() == f"run {number}"


def test_smoothing_keeps_a_line_and_calms_noise() -> None:
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    noisy = [float(step % 2) for step in range(100)]
    assert all(abs(value - 0.5) < 0.1 for value in smoothed(noisy)[10:])


def test_muon_in_float32_is_torchs_but_for_its_rounding() -> None:
    """A step of each; torch's bfloat16 leaves a hundredth of the update."""
    for shape in ((24, 8), (8, 24)):
        for adjust_lr_fn in (None, "match_rms_adamw"):
            for nesterov in (True, False):
                generator = torch.Generator().manual_seed(0)
                mine, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
                options = {"lr": 0.1, "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov, "momentum": 0.9}
                optimizers = [Float32Muon([mine], **options), torch.optim.Muon([theirs], **options)]
                for _ in range(3):
                    mine.grad = torch.randn(shape, generator=generator)
                    theirs.grad = mine.grad.clone()
                    for optimizer in optimizers:
                        optimizer.step()
                assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()
                assert (mine - theirs).norm() < 0.02 * (theirs - 1).norm()
