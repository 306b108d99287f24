"""`launch/hf_trainer.py` trains by each launcher and at every ZeRO stage alike, and goes on from where it stopped."""

import functools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import hf_trainer
from launch.options import UsageError

ROOT = Path(__file__).resolve().parent.parent
SIZES = "--layers 1 --width 32 --heads 2 --context 32 --log_every 1 --warmup 1 --steps 8 --save_every 4"
SCRIPT = "launch/hf_trainer.py"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
ACCELERATE = "-m accelerate.commands.launch --use_deepspeed --num_processes 2 --main_process_port 0"

ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}

SHOWS_THE_OPTIMIZER = """
import json, sys
from pathlib import Path
from launch.hf_trainer import Options, train

trainer = train(Options(layers=1, width=32, heads=2, context=32, steps=6, save_every=2, keep=1, accumulate=2,
                        bf16=True, learning_rate=0.003, data=sys.argv[1], out=Path(sys.argv[2])))
shell = trainer.model_wrapped.basic_optimizer
(group,) = shell.groups
named = {key: group[key] for key in ("base_lr", "betas", "adamw_betas", "eps", "weight_decay")}
print("found", json.dumps(named | {"routes": shell.core.routes()}))
"""

Runner = Callable[..., Path]


def start(command: str, *more: str, **environment: str) -> subprocess.CompletedProcess:
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command.split(), *more],
        cwd=ROOT,
        env={**os.environ, **quiet, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


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
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(500)))
    return path


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The folder of a run of eight steps on two processes; each is run once and left as it is."""

    @functools.cache
    def run(launcher: str, more: str = "") -> Path:
        folder = tmp_path_factory.mktemp("run")
        done = start(f"{launcher} {SCRIPT} {SIZES} --data {text} --out {folder} {more}")
        assert done.returncode == 0, done.stderr
        return folder

    return run


def test_it_learns_under_torchrun(whole: Runner) -> None:
    found = losses(whole(TORCHRUN))
    assert len(found) == 9
    assert found[-2] < found[3] < found[1] < math.log(256)
    assert found[-1] < found[1] - 1


def test_accelerate_hands_over_its_config_and_stage_3_trains_like_stage_2(whole: Runner) -> None:
    stage_3 = whole(f"{ACCELERATE} --deepspeed_config_file launch/configs/hf_zero3.json")
    divided = "checkpoint-8/global_step8/zero_pp_rank_1_mp_rank_00_model_states.pt"
    assert (stage_3 / divided).is_file(), "its config was not taken"
    assert (stage_3 / "checkpoint-8/model.safetensors").is_file()
    assert losses(stage_3) == pytest.approx(losses(whole(TORCHRUN)), rel=1e-4)


def test_a_fresh_process_of_the_deepspeed_launcher_goes_on_exactly(whole: Runner, text: Path, tmp_path: Path) -> None:
    expected = losses(whole(TORCHRUN))
    shutil.copytree(whole(TORCHRUN) / "checkpoint-4", tmp_path / "checkpoint-4")
    mark_losses(tmp_path / "checkpoint-4")
    launcher = f"-m deepspeed.launcher.runner --num_gpus 2 --master_port {free_port()}"
    done = start(f"{launcher} {SCRIPT} {SIZES} --data {text} --out {tmp_path} --resume true")
    assert done.returncode == 0, done.stderr
    assert "ZeRO 2, 2 processes, 8 steps" in done.stdout
    assert losses(tmp_path) == [0.0] * 4 + expected[4:]


def test_what_auto_becomes_and_who_serves_what(text: Path, tmp_path: Path) -> None:
    done = start("-c", SHOWS_THE_OPTIMIZER, str(text), str(tmp_path), **ONE_PROCESS, MASTER_PORT=free_port())
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found"))[5:])
    routes = found.pop("routes")
    expected = {"base_lr": 3e-3, "betas": [0.9, 0.9], "adamw_betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    assert found == expected
    served = {line.split()[0]: "adamw" if " adamw " in line else "matrix" for line in routes.splitlines()[1:]}
    assert served["transformer.wte.weight"] == "adamw", "embeddings, to which the output head is tied"
    assert {name for name, by in served.items() if by == "matrix"} == {
        f"transformer.h.0.{layer}.weight" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"], "the others are rotated out"
    assert (tmp_path / "checkpoint-6/global_step6/kl_dist/manifest.json").is_file()


def test_it_is_refused_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun, deepspeed, or accelerate launch"):
        hf_trainer.train(hf_trainer.Options())


def test_it_is_refused_where_accelerate_would_leave_deepspeed_out(text: Path, tmp_path: Path) -> None:
    port = free_port()
    more = ONE_PROCESS | {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    done = start(f"{SCRIPT} {SIZES} --data {text} --out {tmp_path}", **more)
    assert done.returncode != 0 and "error: accelerate leaves DeepSpeed out" in done.stderr
