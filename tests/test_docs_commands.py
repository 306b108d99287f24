"""Every command of the README and the docs runs as it stands, but for being told to do less and where to write."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import QUIET, SECONDS, free_port, text_in
from tests.pages import PAGES, ROOT, commands
from tests.world import patience

GPT = "--layers 1 --width 32 --heads 2 --context 32 --steps 4 --data {text} --out {out}"
LIGHTNING = (
    "--model.layers 1 --model.width 32 --model.heads 2 --data.context 32 --data.file {text} --data.steps 2 "
    "--trainer.max_steps 2 --trainer.default_root_dir {out}"
)
LESS = {
    "make demo": 'ARGS="' + GPT.replace("--steps 4", "--steps 20") + '"',
    "make test": "ARGS=tests/test_boxes.py",
    "pip install .": "--no-deps --no-build-isolation --target {out}",
    "python -m deepspeed_integration.universal": "",
    "kl-shampoo plan": "--largest 1 --png {out}/plan.png",
    "launch/hf_trainer.py": GPT,
    "launch/lora.py": GPT + " --base-steps 4 --base {out}/base",
    "launch/multinode.sh": GPT,
    "launch/train_deepspeed.py": GPT,
    "launch/train_lightning.py": LIGHTNING,
}
"""By what a command has in it: what is added to it."""

ALL = [(page, line) for page in PAGES for line in commands(page)]


def ran(line: str, folder: Path) -> str:
    """A command's output, in a shell whose environment is the one that is active; fails where the command does."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= QUIET | {"PATH": binaries, "VIRTUAL_ENV": sys.prefix, "DS_ACCELERATOR": "cpu"}
    limit = 4 * SECONDS * patience()
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def shortened(line: str, folder: Path) -> str:
    (more,) = (more for part, more in LESS.items() if part in line)
    line = line.replace("deepspeed --num_gpus", f"deepspeed --master_port {free_port()} --num_gpus")
    line = line.replace("multinode.sh ", f"multinode.sh --port {free_port()} ")
    line = line.replace("torchrun ", "torchrun --standalone ")
    return f"{line} {more}".format(text=text_in(folder), out=shlex.quote(str(folder / "out")))


def place_of(line: str, folder: Path) -> Path:
    """The checkout, or a copy for what would write into it, or a run's folder with checkpoints."""
    if line.startswith("pip"):
        unwanted = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
        return Path(shutil.copytree(ROOT, folder / "source", ignore=unwanted))
    if "deepspeed_integration.universal" in line:
        run = "torchrun --nproc-per-node 2 launch/train_deepspeed.py --deepspeed_config launch/configs/zero2.json"
        ran(shortened(run, folder), ROOT)
        (made,) = (folder / "out").glob("**/global_step4")
        shutil.copytree(made.parent, folder / "checkpoints")
        (folder / "checkpoints/global_step4").rename(folder / "checkpoints/global_step400")
        return folder
    return ROOT


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for _, line in ALL])
def test_a_command_of_a_page_runs(line: str, tmp_path: Path) -> None:
    folder = place_of(line, tmp_path)
    said = ran(shortened(line, tmp_path), folder)
    if "make test" in line:
        assert "passed" in said
    elif "universal" not in line:
        assert any((tmp_path / "out").iterdir()), "it has left nothing behind"
    else:
        assert len(list((tmp_path / "checkpoints").iterdir())) > 1


def test_every_command_has_a_shorter_form(tmp_path: Path) -> None:
    assert len(ALL) >= 10
    for _, line in ALL:
        assert shortened(line, tmp_path).startswith(line.split()[0])
