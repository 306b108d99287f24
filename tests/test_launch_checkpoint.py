"""Checkpoints of the job as files: what is whole, what is damaged, and which one a run goes on from."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from kl_dist.checkpoint import manifest
from launch import checkpoint, folders
from launch.model import GPT
from launch.optimizers import Trainer, make_trainer
from launch.options import Options, UsageError
from launch.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
SIZES = {"layers": 1, "width": 16, "heads": 2, "context": 16, "tokens_per_step": 96}


def job(**asked) -> tuple[Options, GPT, Trainer]:
    """A model and its optimizer after two steps."""
    options = Options(**SIZES, **asked)
    torch.manual_seed(0)
    model = GPT(options.layers, options.width, options.heads, options.context)
    trainer = make_trainer(options, model)
    for step in (1, 2):
        model(torch.arange(16)[None]).square().mean().backward()
        trainer.step(step)
    return options, model, trainer


def save(folder: Path, step: int, **asked) -> Path:
    options, model, trainer = job(**asked)
    return checkpoint.save(folder, step, options, ALONE, model, trainer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("whole"), 7)


def test_a_checkpoint_is_whole_and_names_every_file(whole: Path) -> None:
    assert manifest.fault(whole) is None
    names = {path.name for path in whole.iterdir()}
    assert names == {".metadata", "__0_0.distcp", "run.json", manifest.MANIFEST}
    assert json.loads((whole / manifest.MANIFEST).read_text())["files"].keys() == names - {manifest.MANIFEST}
    assert not list(whole.parent.glob("*.partial"))


def corrupt(folder: Path, number: int) -> str:
    """One of many ways in which files suffer; says which."""
    chance = random.Random(number)
    path = chance.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    kind = chance.choice(["flipped", "truncated", "gone", "zeroed", "grown"])
    if kind == "flipped":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "truncated":
        del data[chance.randrange(len(data)) :]
    elif kind == "zeroed":
        start = chance.randrange(len(data))
        end = start + chance.randint(1, 4096)
        if not any(data[start:end]):
            data[start] = 1
        else:
            data[start:end] = bytes(len(data[start:end]))
    elif kind == "grown":
        data += bytes(chance.randint(1, 100))
    path.unlink()
    if kind != "gone":
        path.write_bytes(data)
    return f"{path.name} {kind}"


def test_two_hundred_corruptions_are_recognised(whole: Path, tmp_path: Path) -> None:
    missed = []
    for number in range(200):
        folder = tmp_path / f"step-{number:06d}"
        shutil.copytree(whole, folder)
        what = corrupt(folder, number)
        fault = manifest.fault(folder)
        if fault is None:
            missed.append(what)
        shutil.rmtree(folder)
    assert missed == []


def test_the_newest_whole_checkpoint_is_chosen_and_damaged_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 10, 11, 12):
        whole = save(tmp_path, step)
    shutil.copytree(whole, tmp_path / "step-000020.partial")
    shutil.copytree(whole, tmp_path / "step-000021.deleting")
    (tmp_path / "step-000012" / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "step-000011" / ".metadata").unlink()
    assert checkpoint.choose(tmp_path, "auto", ALONE) == tmp_path / "step-000010"
    said = capsys.readouterr().err
    assert "step-000012 is passed over: __0_0.distcp is damaged" in said
    assert "step-000011 is passed over: .metadata cannot be read" in said
    assert checkpoint.choose(tmp_path, str(tmp_path / "step-000003"), ALONE) == tmp_path / "step-000003"
    with pytest.raises(UsageError, match=r"step-000012: __0_0\.distcp is damaged"):
        checkpoint.choose(tmp_path, str(tmp_path / "step-000012"), ALONE)


def test_without_any_checkpoint_auto_starts_anew(tmp_path: Path) -> None:
    assert checkpoint.choose(tmp_path, "auto", ALONE) is None
    with pytest.raises(UsageError, match="found no checkpoint"):
        checkpoint.choose(tmp_path, "newest", ALONE)


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006", "step-000008"]


def test_going_on_from_an_older_checkpoint_moves_the_later_ones_aside(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert folders.abandon(tmp_path, 2) == tmp_path / "abandoned-1"
    assert sorted(path.name for path in (tmp_path / "abandoned-1").iterdir()) == ["step-000004", "step-000006"]
    assert folders.abandon(tmp_path, 2) is None
    assert save(tmp_path, 3, keep=1).exists() and [path.name for path in folders.saved(tmp_path)] == ["step-000003"]


def test_what_interrupted_saves_left_is_swept_away_and_a_step_may_be_saved_again(tmp_path: Path) -> None:
    for name in ("step-000001.partial", "step-000002.deleting"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("left")
    for _ in range(2):
        assert manifest.fault(save(tmp_path, 2)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_resumed_job_has_the_options_it_asks_for_now(whole: Path) -> None:
    options, model, trainer = job(weight_decay=0.3, precondition_frequency=5)
    checkpoint.load(whole, options, ALONE, model, trainer)
    assert {group["weight_decay"] for group in trainer.groups} == {0.3, 0.0}
    assert {group["precondition_frequency"] for group in trainer.groups} == {5}


@pytest.mark.parametrize("optimizer", ["kl_shampoo", "muon", "adamw"])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, optimizer: str) -> None:
    options, model, trainer = job(optimizer=optimizer)
    path = checkpoint.save(tmp_path, 2, options, ALONE, model, trainer)
    expected = [parameter.clone() for parameter in model.parameters()]
    _, other, others = job(optimizer=optimizer)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert checkpoint.load(path, options, ALONE, other, others) == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, other.parameters(), strict=True))
    for one, its_trainer in ((model, trainer), (other, others)):
        one.zero_grad()
        one(torch.arange(16)[None]).square().mean().backward()
        its_trainer.step(3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_of_another_job_is_refused(whole: Path) -> None:
    for asked, words in (
        ({"optimizer": "soap"}, "saved with optimizer kl_shampoo, this job asks for soap"),
        ({"seed": 1}, "saved with seed 0, this job asks for 1"),
        ({"recipe": "paper"}, "does not fit .* Missing key"),
        ({"set": ("max_preconditioner_dim=8",)}, "does not fit"),
    ):
        options, model, trainer = job(**asked)
        with pytest.raises(UsageError, match=words):
            checkpoint.load(whole, options, ALONE, model, trainer)
