"""The training job that Lightning runs, at tiny sizes: its strategies, its YAML files, its errors."""

import csv
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from kl_dist import options
from kl_dist.cli import report
from launch import train_lightning
from launch.options import UsageError
from tests.jobs import ROOT, TORCHRUN, Ended, board_of, on_ranks, started, text_in
from tests.test_launch_job import losses as losses_of_job
from tests.test_launch_job import records
from tests.world import World

SCRIPT = "launch/train_lightning.py"
STEPS = 6
MODEL = "--model.layers 1 --model.width 16 --model.heads 2 --model.warmup 1"
DATA = "--data.context 16 --data.batch_size 6 --data.steps 3"
LOGGED = "--trainer.log_every_n_steps 1 --trainer.logger CSVLogger --trainer.logger.save_dir"
QUIET = "--trainer.enable_progress_bar false --trainer.enable_model_summary false"
TWO = "--trainer.accelerator cpu --trainer.devices 2"
SAVED = "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename {step} --trainer.callbacks.save_top_k -1"
"""Beside the checkpoints that a YAML file asks for."""

DDP, FSDP2 = (
    f"--config launch/configs/lightning_{name}.yaml {SAVED} --trainer.callbacks.every_n_train_steps 4"
    for name in ("ddp", "fsdp2")
)

Runner = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, whose validation windows are one more than a multiple of a batch: one rank has none in the last."""
    path = text_in(tmp_path_factory.mktemp("text"), lines=600)
    path.write_text(path.read_text()[:11690])
    return path


@pytest.fixture(scope="module", params=["ranks", pytest.param("processes", marks=pytest.mark.full)])
def trained(
    request: pytest.FixtureRequest, text: Path, worlds: dict[int, World], tmp_path_factory: pytest.TempPathFactory
) -> Runner:
    """The folder of a finished run on two processes; each is run once and left as it is.

    On ranks that are there already, or as torchrun starts both; "script" is what Lightning starts itself.
    """

    @functools.cache
    def run(strategy: str, more: str = "", start: str = request.param) -> Path:
        folder = tmp_path_factory.mktemp("run")
        where = f"--data.file {text} --trainer.default_root_dir {folder} --trainer.max_steps {STEPS}"
        flags = f"fit {strategy} {TWO} {where} {MODEL} {DATA} {LOGGED} {folder} {QUIET} {more}"
        done = ways[start](flags)
        assert done.status == 0, done.stderr
        return folder

    ways: dict[str, Callable[[str], Ended]] = {
        "ranks": functools.partial(on_ranks, worlds, "launch.train_lightning", 2),
        "processes": lambda flags: started(f"{TORCHRUN} 2 {SCRIPT} {flags}"),
        "script": lambda flags: started(f"{SCRIPT} {flags}"),
    }
    return run


def losses(folder: Path) -> list[float]:
    """Training losses of all steps and validation losses after every third, in the order in which they came."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    return [float(row[name]) for row in rows for name in ("train_loss", "val_loss") if row.get(name)]


def test_adamw_trains_the_module_as_the_job_without_lightning_does(
    trained: Runner, text: Path, worlds: dict[int, World], tmp_path: Path
) -> None:
    """So the data, the schedule and the mean over the ranks are the same, on one process there and on two here."""
    sizes = "--layers 1 --width 16 --heads 2 --context 16 --tokens-per-step 96 --warmup 1"
    flags = f"--optimizer adamw {sizes} --steps {STEPS} --eval-every 3 --data {text} --out {tmp_path}"
    done = on_ranks(worlds, "launch.train", 1, flags)
    assert done.status == 0, done.stderr
    found = losses(trained("--trainer.strategy ddp"))
    assert len(found) == STEPS + 2
    assert found == pytest.approx(losses_of_job(tmp_path), rel=1e-5)


def test_the_strategy_is_the_same_by_its_name_in_a_script_and_by_its_class_on_given_ranks(trained: Runner) -> None:
    by_name = losses(trained("--trainer.strategy kl_shampoo", start="script"))
    by_class = losses(trained("--trainer.strategy.class_path lightning_plugin.KLShampooStrategy"))
    assert len(by_name) == STEPS + 2 and by_class == pytest.approx(by_name, rel=1e-6)
    assert by_name != pytest.approx(losses(trained("--trainer.strategy ddp")), rel=1e-4), "AdamW has trained"


def test_both_yaml_files_train_alike_as_by_name_alone_and_better_than_at_adamws_rate(trained: Runner) -> None:
    """The rates that they give are those of the rule, by which the name alone takes AdamW's over."""
    ddp, fsdp2 = losses(trained(DDP)), losses(trained(FSDP2))
    assert fsdp2 == pytest.approx(ddp, rel=1e-5)
    assert ddp == pytest.approx(losses(trained("--trainer.strategy kl_shampoo", start="script")), rel=1e-3)
    kept = "--trainer.strategy.class_path lightning_plugin.KLShampooStrategy --trainer.strategy.convert_lr keep"
    assert ddp[-1] < losses(trained(kept))[-1] - 0.02
    assert checkpoints(trained(DDP)) == {"epoch=1-step=6.ckpt", "last.ckpt", "step=4.ckpt"}
    assert checkpoints(trained(FSDP2)) == {"epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt", "step=4.ckpt"}


def test_a_run_leaves_a_record_as_the_job_without_lightning_does_and_its_logger_has_each_matrix(
    trained: Runner, text: Path, worlds: dict[int, World], tmp_path: Path
) -> None:
    logger = "--trainer.logger TensorBoardLogger --trainer.logger.save_dir"
    folder = trained("--trainer.strategy kl_shampoo", f"{logger} {tmp_path / 'board'}")
    sizes = "--layers 1 --width 16 --heads 2 --context 16 --tokens-per-step 96 --warmup 1"
    done = on_ranks(worlds, "launch.train", 2, f"{sizes} --steps 6 --eval-every 3 --data {text} --out {tmp_path}")
    assert done.status == 0, done.stderr
    found, plain = records(folder), records(tmp_path)
    for one, other in zip(found, plain, strict=True):
        assert one.keys() == {key for key in other if "cpu" not in key and key != "tokens"}
        assert 0 < one["optimizer_seconds"] < one["seconds"]
    for of in (found, plain):  # on one schedule, of AdamW's rate here and of the matrices' there
        assert of[3]["lr"] / of[0]["lr"] == pytest.approx(found[3]["lr"] / found[0]["lr"], rel=1e-6)
    assert losses_of_job(folder) == pytest.approx(losses(trained("--trainer.strategy kl_shampoo", start="script")))
    said, wanted = (of[-1]["optimizer"] for of in (found, plain))
    assert said.keys() == wanted.keys()
    assert said["matrices"].keys() == {f"gpt.{name}" for name in wanted["matrices"]}
    board = board_of(tmp_path / "board")
    name = next(iter(said["matrices"]))
    assert set(board[f"kl_shampoo/matrices/{name}/eigenvalues.0/q90"]) == set(board["val_loss"])
    assert board[f"kl_shampoo/matrices/{name}/condition.0"][5] == pytest.approx(
        said["matrices"][name]["condition.0"], rel=1e-6
    )
    page = report.write(folder).read_text()
    assert "Loss over seconds" in page and "Spectra" in page and name in page


def test_a_record_goes_on_where_the_checkpoint_is_and_another_run_moves_it_aside(
    worlds: dict[int, World], text: Path, tmp_path: Path
) -> None:
    """Of two batches a step."""
    where = f"--data.file {text} --trainer.default_root_dir {tmp_path} --trainer.accumulate_grad_batches 2"
    flags = f"fit --trainer.strategy kl_shampoo {TWO} {where} {MODEL} {DATA} --data.steps 2 {QUIET} {SAVED}"
    saved = f"--trainer.callbacks.every_n_train_steps 1 --trainer.callbacks.dirpath {tmp_path / 'saved'}"
    kept = []
    for more in ("", "", f"--ckpt_path {tmp_path / 'saved/step=2.ckpt'}"):
        done = on_ranks(worlds, "launch.train_lightning", 2, f"{flags} {saved} --trainer.max_steps 4 {more}")
        assert done.status == 0, done.stderr
        kept.append([(one["step"], one["loss"], "val_loss" in one) for one in records(tmp_path)])
    assert [one[::2] for one in kept[0]] == [(step, True) for step in (1, 2, 3, 4)]
    assert kept[0] == kept[1] and [one[0] for one in kept[2]] == [1, 2, 3, 4]
    assert [one[1] for one in kept[2]] == pytest.approx([one[1] for one in kept[0]], rel=1e-6)
    assert len(records(tmp_path / "earlier-1")) == 4 and not (tmp_path / "earlier-2").exists()


def test_adamw_leaves_a_record_without_numbers_of_ours(trained: Runner) -> None:
    found = records(trained("--trainer.strategy ddp"))
    assert len(found) == STEPS and not any("optimizer" in one for one in found)


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.ckpt")}


@pytest.mark.parametrize("config", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_a_run_goes_on_from_a_checkpoint_in_the_middle_of_an_epoch(trained: Runner, config: str) -> None:
    (checkpoint,) = trained(config).rglob("step=4.ckpt")
    continued = losses(trained(config, f"--ckpt_path {checkpoint}"))
    assert continued == pytest.approx(losses(trained(config))[-3:], rel=1e-6)


def test_a_batch_that_does_not_divide_over_the_devices_is_refused() -> None:
    data = train_lightning.TextData(batch_size=7)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 0})
    with pytest.raises(UsageError, match=r"--data\.batch_size 7 does not divide over 2 devices"):
        data.setup("fit")


@pytest.mark.parametrize("name", ["KLShampooStrategy", "KLShampooFSDP2Strategy"])
def test_help_explains_every_option_of_a_strategy(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = said_of(f"fit --trainer.strategy.help lightning_plugin.{name}", 0, monkeypatch, capsys)
    for option in (*options.DEFAULTS, "on_nonfinite", "output_head", "optimizer_checkpoint"):
        flag = rf"  --trainer\.strategy\.{option} (?:[^\n]*\n +|\S+ +)(?!\(type:)\S"
        assert re.search(flag, said), f"{option} is not explained"
    assert "T; the eigenbases are refreshed every T steps" in said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Lightning's own calls
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--trainer.strategy lightning_plugin.KLShampooStrategy --trainer.strategy.blockng none", "blockng"),
        (f"{DDP} --trainer.strategy.init_args.method soup", "soup"),
        ("--data.batchsize 3", "unrecognized arguments: --data.batchsize"),
        ("--model.width 10 --model.heads 3", "error: --model.width 10 does not divide into --model.heads 3\n"),
    ],
)
def test_a_mistake_in_an_option_is_named(
    flags: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in said_of(f"fit {flags}", 2, monkeypatch, capsys)


def said_of(arguments: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line that trains nothing leaves on the screen."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train_lightning.py", *arguments.split()])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        sys.exit(train_lightning.main())
    assert left.value.code == status
    return "".join(capsys.readouterr())
