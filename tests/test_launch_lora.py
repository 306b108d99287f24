"""`launch/lora.py` at tiny sizes: what its adapters learn, what stays as it was, what it leaves behind and refuses."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.jobs import TORCHRUN, Ended, as_started, on_ranks, started, text_in
from tests.world import World

pytest.importorskip("peft")

SIZES = "--layers 1 --width 32 --heads 2 --context 32 --tokens-per-step 192 --base-steps 4"
RUN = f"{SIZES} --rank 4 --steps 6 --warmup 1 --eval-every 3 --checkpoint-every 3"
ROUTES = {
    "adamw": "--optimizer adamw --lr 3e-2",
    "blocks": "--long-side blocks --lr 3e-2",
    "diagonal": "--long-side diagonal --lr 3e-2",
}

Runner = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_in(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of base models, by the number of processes that made them."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def tuned(worlds: dict[int, World], text: Path, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The folder of a finished run of a route on a number of processes; each is run once and left as it is."""

    @functools.cache
    def run(route: str, processes: int = 1, again: int = 0) -> Path:
        folder = tmp_path_factory.mktemp(f"{route}-{processes}")
        given = f"{ROUTES[route]} {RUN} --data {text} --base {bases / str(processes)} --out {folder}"
        done = on_ranks(worlds, "launch.lora", processes, given)
        assert done.status == 0, done.stderr
        return folder

    return run


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records for name in ("loss", "val_loss") if name in record]


def job_of(text: Path, bases: Path, out: Path, **asked: Any) -> Any:
    """A job on one process, ready to train; its base model is there or is made."""
    from launch.lora import Finetuning, LoraOptions  # seconds, which a run without these tests need not pay
    from launch.ranks import Ranks

    sizes = {"layers": 1, "width": 32, "heads": 2, "context": 32, "tokens_per_step": 192, "base_steps": 4, "steps": 6}
    where = {"data": str(text), "base": str(bases / "1"), "out": str(out)}
    with as_started(None, "launch.lora"):
        return Finetuning(LoraOptions(**sizes | where | asked), Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("route", ROUTES)
def test_the_adapters_learn_alike_on_one_and_two_processes(route: str, tuned: Runner, bases: Path) -> None:
    """Each number of them has made its own base model, too."""
    alone, together = losses(tuned(route)), losses(tuned(route, 2))
    assert math.log(256) > alone[0] > alone[-1] + 0.05
    assert together == pytest.approx(alone, rel=1e-4)
    assert {path.name for path in bases.iterdir()} == {"1", "2"}


def test_the_base_model_is_trained_once_and_its_weights_never_move(
    tuned: Runner, text: Path, bases: Path, tmp_path: Path
) -> None:
    tuned("diagonal")
    saved = (bases / "1/model.safetensors").read_bytes()
    job = job_of(text, bases, tmp_path, rank=4)
    before = {name: parameter.detach().clone() for name, parameter in job.model.named_parameters()}
    for step in (1, 2):
        job.train_step(step)
    moved = {name for name, parameter in job.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if "lora_" in name} and len(moved) == 8
    assert (bases / "1/model.safetensors").read_bytes() == saved


def test_a_rerun_is_the_same_to_the_bit_and_a_resumed_run_too(
    tuned: Runner, worlds: dict[int, World], text: Path, bases: Path, tmp_path: Path
) -> None:
    first = tuned("diagonal")
    assert losses(tuned("diagonal", again=1)) == losses(first)
    (tmp_path / "metrics.jsonl").write_bytes((first / "metrics.jsonl").read_bytes())
    given = f"{ROUTES['diagonal']} {RUN} --data {text} --base {bases / '1'} --out {tmp_path}"
    done = on_ranks(worlds, "launch.lora", 1, f"{given} --resume {first / 'checkpoint/step-000003'}")
    assert done.status == 0, done.stderr
    assert losses(tmp_path) == losses(first)


def test_the_adapter_that_is_saved_loads_and_merges(tuned: Runner, text: Path, bases: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    folder = tuned("adamw")
    model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(bases / "1"), folder / "adapter")
    job = job_of(text, bases, tmp_path, optimizer="adamw", rank=4)
    job.model = model
    assert job.validate() == pytest.approx(losses(folder)[-1], rel=1e-6)
    job.model = model.merge_and_unload()
    assert job.validate() == pytest.approx(losses(folder)[-1], rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "least", "most"), [("diagonal", 1.0, 1.6), ("identity", 1.0, 1.4), ("blocks", 5, 40)]
)
def test_what_is_kept_of_the_long_side_decides_the_memory(
    asked: str, least: float, most: float, tuned: Runner, text: Path, bases: Path, tmp_path: Path
) -> None:
    """In numbers of state per parameter of the adapters; AdamW has two."""
    tuned("adamw")
    (optimizer,) = job_of(text, bases, tmp_path, rank=4, long_side=asked).trainer.optimizers
    adapters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert least < optimizer.plan.state_bytes[0] / 4 / adapters < most


def test_b_learns_at_its_own_rate(tuned: Runner, text: Path, bases: Path, tmp_path: Path) -> None:
    tuned("adamw")
    for optimizer in ("adamw", "kl_shampoo"):
        groups = job_of(text, bases, tmp_path, optimizer=optimizer, lr=1e-3, b_ratio=4.0).trainer.groups
        assert [group["lr"] for group in groups] == pytest.approx([1e-3, 4e-3])
        assert [{p.size(0) == 8 for p in group["params"]} for group in groups] == [{True}, {False}]


def test_a_head_that_peft_trains_whole_is_adamws() -> None:
    from peft import LoraConfig, get_peft_model

    from kl_dist import KLShampoo
    from launch.model import gpt2

    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    routes = KLShampoo(get_peft_model(gpt2(layers=1, width=32, heads=2, positions=8), config)).routes()
    (line,) = [line for line in routes.splitlines() if line.startswith("base_model.model.lm_head.modules_to_save")]
    assert " adamw " in line
    assert sum(" kl_shampoo " in line for line in routes.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optimizer muon", "--optimizer takes "),
        ("--rank 0", "--rank 0 is too small; the least is 1"),
        ("--rnk 8", "--rnk is no option; did you mean --rank?"),
        ("--rank many", "--rank takes a whole number, not many"),
        ("--long-side short", "--long-side takes blocks, diagonal, identity, not short"),
        ("--optimizer adamw --long-side diagonal", "--long-side means nothing to --optimizer adamw"),
        ("--adamw-lr 1e-3", "--adamw-lr means nothing here"),
        ("--parallel fsdp", "--parallel takes ddp here, not fsdp"),
        ("--set momentum=0.9", "--set momentum=0.9: kl_shampoo says: "),
        ("--layers 2", "has --layers 1 --width 32 --heads 2 --context 32"),
    ],
)
def test_a_mistake_is_one_clear_line(
    arguments: str, message: str, tuned: Runner, worlds: dict[int, World], text: Path, bases: Path, tmp_path: Path
) -> None:
    tuned("adamw")
    done = on_ranks(worlds, "launch.lora", 1, f"{RUN} --base {bases / '1'} --data {text} --out {tmp_path} {arguments}")
    assert done.status == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.full
def test_torchrun_starts_it(text: Path, bases: Path, tmp_path: Path) -> None:
    done: Ended = started(f"{TORCHRUN} 2 launch/lora.py {RUN} --data {text} --base {bases / 'own'} --out {tmp_path}")
    assert done.status == 0, done.stderr
    assert not dist.is_initialized() and (tmp_path / "adapter/adapter_model.safetensors").is_file()
