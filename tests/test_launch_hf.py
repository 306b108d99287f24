"""`launch/hf_trainer.py` trains by each launcher and at every ZeRO stage alike, and goes on from where it stopped."""

import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from kl_dist import KLShampoo
from tests.jobs import QUIET, TORCHRUN, Ended, as_started, board_of, free_port, here, on_ranks, started, text_in
from tests.world import World

SIZES = (
    "--layers 1 --width 32 --heads 2 --context 32 --log_every 1 --warmup 1 --steps 8 --save_every 4 --matrices_every 4"
)
SCRIPT = "launch/hf_trainer.py"
ACCELERATE = "-m accelerate.commands.launch --use_deepspeed --num_processes 2 --main_process_port 0"
STAGE_3 = "launch/configs/hf_zero3.json"

Runner = Callable[..., Path]


@pytest.fixture(scope="module", params=["ranks", pytest.param("processes", marks=pytest.mark.full)])
def launch(request: pytest.FixtureRequest, worlds: dict[int, World]) -> Callable[..., Ended]:
    """Runs it on two ranks that are there already, or in two processes that torchrun starts."""
    if request.param == "ranks":
        return functools.partial(on_ranks, worlds, "launch.hf_trainer", 2)
    return lambda arguments, **environment: started(f"{TORCHRUN} 2 {SCRIPT} {arguments}", **environment)


def losses(folder: Path) -> list[float]:
    """Those of all steps and the validation's at the end, as the Trainer has logged them."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history for name in ("loss", "eval_loss") if name in entry]


def mark_losses(checkpoint: Path) -> None:
    """Put zeros in the place of what was logged: a run that begins anew logs its own."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    for entry in state["log_history"]:
        entry["loss"] = 0.0
    path.write_text(json.dumps(state))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_in(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(launch: Callable[..., Ended], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of eight steps at stage 2."""
    folder = tmp_path_factory.mktemp("run")
    done = launch(f"{SIZES} --data {text} --out {folder}")
    assert done.status == 0, done.stderr
    return folder


def test_it_learns(whole: Path) -> None:
    found = losses(whole)
    assert len(found) == 9
    assert found[-2] < found[3] < found[1] < math.log(256)
    assert found[-1] < found[1] - 1


def test_the_optimizer_within_deepspeed_says_how_it_does_and_each_matrix_at_its_interval(whole: Path) -> None:
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    said = [entry for entry in history if "loss" in entry]
    assert len(said) == 8 and all(entry["kl_shampoo/skipped_steps"] == 0 for entry in said)
    assert all(0.05 < entry["kl_shampoo/update_rms"] < 1 for entry in said[1:])
    board = board_of(whole)
    assert board["train/kl_shampoo/update_rms"].keys() == {entry["step"] for entry in said}
    assert board["train/kl_shampoo/matrices/transformer.h.0.mlp.c_proj.weight[0:64, :]/condition.1"].keys() == {1, 5}


def test_accelerate_hands_over_its_config_and_stage_3_trains_like_stage_2(
    whole: Path, text: Path, tmp_path: Path
) -> None:
    launcher = f"{ACCELERATE} --deepspeed_config_file {STAGE_3}"
    done = started(f"{launcher} {SCRIPT} {SIZES} --data {text} --out {tmp_path}")
    assert done.status == 0, done.stderr
    divided = "checkpoint-8/global_step8/zero_pp_rank_1_mp_rank_00_model_states.pt"
    assert (tmp_path / divided).is_file(), "its config was not taken"
    assert (tmp_path / "checkpoint-8/model.safetensors").is_file()
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("launcher", ["the same", pytest.param("deepspeed", marks=pytest.mark.full)])
def test_it_goes_on_exactly(
    launcher: str, launch: Callable[..., Ended], whole: Path, text: Path, tmp_path: Path
) -> None:
    """Also in fresh processes of the deepspeed launcher, of which test_launch_deepspeed.py has one start."""
    expected = losses(whole)
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    mark_losses(tmp_path / "checkpoint-4")
    deepspeed = f"-m deepspeed.launcher.runner --num_gpus 2 --master_port {free_port()} {SCRIPT}"
    start = launch if launcher == "the same" else lambda arguments: started(f"{deepspeed} {arguments}")
    done = start(f"{SIZES} --data {text} --out {tmp_path} --resume true")
    assert done.status == 0, done.stderr
    assert "ZeRO 2, 2 processes, 8 steps" in done.stdout
    assert losses(tmp_path) == [0.0] * 4 + expected[4:]


def optimizer_of(group: dist.ProcessGroup, text: Path, out: Path) -> dict[str, Any]:
    """What the optimizer of a run says of itself."""
    from launch import hf_trainer  # seconds, which the process of the tests need not pay

    sizes = {"layers": 1, "width": 32, "heads": 2, "context": 32, "steps": 6, "save_every": 2, "keep": 1}
    given = {"accumulate": 2, "bf16": True, "learning_rate": 0.003, "data": str(text), "out": out}
    with as_started(group, "launch.hf_trainer"):
        shell = hf_trainer.train(hf_trainer.Options(**sizes, **given)).model_wrapped.basic_optimizer
    (options,) = shell.groups
    named = {key: options[key] for key in ("base_lr", "betas", "adamw_betas", "eps", "weight_decay")}
    return {**named, "routes": shell.core.routes()}


def test_what_auto_becomes_and_who_serves_what(worlds: dict[int, World], text: Path, tmp_path: Path) -> None:
    found = worlds[2].run(optimizer_of, 2, text, tmp_path)[0]
    routes = found.pop("routes")
    expected = {"base_lr": 3e-3, "betas": (0.9, 0.9), "adamw_betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    assert found == expected
    served = {line.split()[0]: "adamw" if " adamw " in line else "matrix" for line in routes.splitlines()[1:]}
    assert served["transformer.wte.weight"] == "adamw", "embeddings, to which the output head is tied"
    assert {name for name, by in served.items() if by == "matrix"} == {
        f"transformer.h.0.{layer}.weight" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"], "the others are rotated out"
    assert (tmp_path / "checkpoint-6/global_step6/kl_dist/manifest.json").is_file()


def without_launcher(group: dist.ProcessGroup) -> Ended:
    return here(None, "launch.hf_trainer", [])


def test_it_is_refused_without_a_launcher(worlds: dict[int, World]) -> None:
    for rank in worlds[2].run(without_launcher, 2):
        assert rank.status == 2
        assert "error: start this with torchrun, deepspeed, or accelerate launch" in rank.stderr


def test_it_is_refused_where_accelerate_would_leave_deepspeed_out(
    launch: Callable[..., Ended], text: Path, tmp_path: Path
) -> None:
    done = launch(f"{SIZES} --data {text} --out {tmp_path}", ACCELERATE_USE_CPU="true")
    assert done.status != 0 and "error: accelerate leaves DeepSpeed out" in done.stderr


def without_use_cpu(group: dist.ProcessGroup, arguments: str) -> Ended:
    """As `accelerate launch --use_deepspeed` starts it on CPUs, for TrainingArguments that do not say so."""
    from launch import hf_trainer

    class Silent(hf_trainer.TrainingArguments):
        def __init__(self, **given: Any) -> None:
            super().__init__(**{**given, "use_cpu": False})

    with mock.patch.object(hf_trainer, "TrainingArguments", Silent):
        return here(group, "launch.hf_trainer", arguments.split(), ACCELERATE_USE_DEEPSPEED="true")


def test_it_is_refused_where_accelerate_takes_each_process_for_the_only_one(
    worlds: dict[int, World], text: Path, tmp_path: Path
) -> None:
    for rank in worlds[2].run(without_use_cpu, 2, f"{SIZES} --data {text} --out {tmp_path}"):
        assert rank.status == 2
        assert "error: accelerate counts 1 process(es), the launcher 2: without GPUs" in rank.stderr


@pytest.mark.parametrize(("flags", "said"), [("", "of 1"), ("--cpu", "of 1"), ("--cpu --use_deepspeed", "")])
def test_accelerate_without_use_deepspeed_starts_one_process_on_cpus_and_refuses_cpu_beside_it(
    flags: str, said: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """docs/deepspeed.md has it of the pinned version; the launcher runs within this process and starts the script."""
    (tmp_path / "says.py").write_text("import os; print('one of', os.environ.get('WORLD_SIZE', 1))")
    arguments = [*flags.split(), "--num_processes", "2", "--main_process_port", free_port(), str(tmp_path / "says.py")]
    launcher = import_module("accelerate.commands.launch")
    given = launcher.launch_command_parser().parse_args(arguments)
    with mock.patch.dict(os.environ, QUIET):
        if said:
            launcher.launch_command(given)
        else:
            with pytest.raises(ValueError, match="one of `--cpu`, `--multi_gpu`, `--tpu`, `--use_deepspeed`"):
                launcher.launch_command(given)
    assert capfd.readouterr().out == (f"one {said}\n" if said else "")


def with_optimizers(group: dist.ProcessGroup, text: Path, out: Path) -> str:
    """What serves a Trainer on DeepSpeed that was given `optimizers=`, with no optimizer in the config."""
    from launch import hf_trainer

    entry = json.loads(hf_trainer.DEFAULT_CONFIG.read_text())
    del entry["optimizer"]
    (out / f"config{group.rank()}.json").write_text(json.dumps(entry))
    sizes = {"layers": 1, "width": 32, "heads": 2, "context": 32, "steps": 1, "data": str(text), "out": out}
    options = hf_trainer.Options(**sizes, deepspeed_config=out / f"config{group.rank()}.json")
    trainer_of = hf_trainer.Trainer

    def with_ours(**given: Any) -> Any:
        return trainer_of(**given, optimizers=(KLShampoo(given["model"], lr=1e-2), None))

    with as_started(group, "launch.hf_trainer"), mock.patch.object(hf_trainer, "Trainer", with_ours):
        trainer = hf_trainer.make_trainer(options)
        trainer.train()
        return type(trainer.model_wrapped.basic_optimizer).__name__


def test_a_trainer_on_deepspeed_drops_the_optimizer_of_optimizers(
    worlds: dict[int, World], text: Path, tmp_path: Path
) -> None:
    assert worlds[2].run(with_optimizers, 2, text, tmp_path)[0] == "AdamW"


@pytest.mark.parametrize("launcher", ["the same", pytest.param("accelerate", marks=pytest.mark.full)])
def test_without_deepspeed_it_learns_and_goes_on_exactly(
    launcher: str, launch: Callable[..., Ended], text: Path, tmp_path: Path
) -> None:
    accelerate = f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0 {SCRIPT}"
    start = launch if launcher == "the same" else lambda arguments: started(f"{accelerate} {arguments}")
    arguments = f"{SIZES} --data {text} --out {tmp_path} --parallel ddp"
    done = start(arguments)
    assert done.status == 0, done.stderr
    assert "ddp, 2 processes, 8 steps" in done.stdout
    expected = losses(tmp_path)
    assert expected[-2] < expected[3] < expected[1] and expected[-1] < expected[1] - 0.7
    shutil.rmtree(tmp_path / "checkpoint-8")
    mark_losses(tmp_path / "checkpoint-4")
    done = start(f"{arguments} --resume true")
    assert done.status == 0, done.stderr
    assert losses(tmp_path) == [0.0] * 4 + expected[4:]


def test_fsdp_is_refused_where_accelerate_would_leave_it_out(
    launch: Callable[..., Ended], text: Path, tmp_path: Path
) -> None:
    done = launch(f"{SIZES} --data {text} --out {tmp_path} --parallel fsdp2")
    assert done.status != 0 and "error: accelerate has FSDP on GPUs alone" in done.stderr
