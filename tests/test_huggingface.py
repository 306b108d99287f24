"""Under Hugging Face's Trainer and Accelerate, without DeepSpeed: trained as on one process, saved whole, resumed."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kl_dist import KLShampoo, full_state_dict, load_full_state_dict, param_groups
from tests.jobs import as_started
from tests.models import deviation, raising
from tests.sharded import layers, loss_of, tokens_of, weights_of

pytest.importorskip("accelerate")

STEPS = 6
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
KINDS = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")

# -- Trainer -----------------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """tests.sharded's model as Trainer takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers(torch.float64)
        self.net.tied.weight = nn.Parameter(
            self.net.tied.weight.detach().clone()
        )  # safetensors takes none that is tied

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.net(tokens)
        return {"loss": (output - labels.to(output.dtype)).square().mean(), "logits": output}


def samples() -> list[dict[str, Tensor]]:
    tokens = torch.cat([tokens_of(step) for step in range(6)])
    return [{"tokens": row, "labels": torch.sin(row.double()).sum(0, keepdim=True)} for row in tokens]


@contextlib.contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """accelerate has FSDP for GPUs alone, and leaves it out on CPUs without a word: here they pass for GPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    original = PartialState.__init__

    def made(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    with mock.patch.object(PartialState, "__init__", made):
        yield


def run_trainer(group: dist.ProcessGroup | None, folder: Path, resume: str | None = None, **more: Any) -> Any:
    """What the Trainer has after STEPS steps, or after it was resumed from a checkpoint of the folder: its weights."""
    from transformers import Trainer, TrainingArguments

    from kl_dist.huggingface import ConsolidateState, KLShampooFactory

    ranks = 1 if group is None else group.size()
    with as_started(group, "huggingface"):
        model = Learner()
        given = {"max_steps": STEPS, "save_steps": 3, "lr_scheduler_type": "cosine", "max_grad_norm": 0.5}
        given |= {"per_device_train_batch_size": 4 // ranks, "gradient_accumulation_steps": 2, "report_to": []}
        arguments = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, logging_steps=STEPS, **given | more)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=samples(),
            eval_dataset=samples()[:8],
            optimizer_cls_and_kwargs=(KLShampooFactory, OPTIONS),
            callbacks=[ConsolidateState()],
        )
        trainer.train(resume_from_checkpoint=resume and str(folder / resume))
        return weights_of(model)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder and the weights of a run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run_trainer(None, folder)


def test_the_trainer_under_ddp_trains_as_on_one_process_and_resumes_on_any_number(worlds, alone, tmp_path):
    folder, alone = alone
    for weights in worlds[2].run(run_trainer, 2, tmp_path / "2", timeout=120):
        assert deviation(weights, alone) < 1e-9
    for of in (folder, tmp_path / "2"):
        for weights in worlds[2].run(run_trainer, 2, of, "checkpoint-3", timeout=120):
            assert deviation(weights, alone) < 1e-9
    assert deviation(run_trainer(None, tmp_path / "2", "checkpoint-3"), alone) < 1e-9


def saved_by_others(group: dist.ProcessGroup, folder: Path, event: str) -> None:
    """A callback that comes last asks for a save at an event; one before ours, where it is the Trainer's own."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from kl_dist.huggingface import ConsolidateState, Consolidating, KLShampooFactory

    class Asks(TrainerCallback):
        pass

    def ask(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == 2

    class Gathering(Consolidating, Trainer):
        pass

    setattr(Asks, event.removeprefix("late "), ask)
    late = event.startswith("late ")
    with as_started(group, "huggingface"):
        trainer = (Gathering if late else Trainer)(
            model=Learner(),
            args=TrainingArguments(
                str(folder),
                use_cpu=True,
                max_steps=3,
                logging_steps=1,
                eval_strategy="steps",
                eval_steps=1,
                save_strategy="no",
                per_device_train_batch_size=2,
                report_to=[],
            ),
            train_dataset=samples(),
            eval_dataset=samples()[:2],
            optimizer_cls_and_kwargs=(KLShampooFactory, OPTIONS),
            callbacks=[Asks()] if late else [Asks(), ConsolidateState()],
        )
        trainer.train()


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate", "late on_step_end", "late on_evaluate"])
def test_a_save_that_another_callback_asks_for_is_whole(worlds, event, tmp_path):
    worlds[2].run(saved_by_others, 2, tmp_path, event, timeout=120)
    state = torch.load(tmp_path / "checkpoint-2/optimizer.pt", weights_only=True)
    KLShampoo(Learner(), **OPTIONS).load_state_dict(state)


def each_by_its_own_timer(group: dist.ProcessGroup, folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from kl_dist.huggingface import ConsolidateState, Consolidating, KLShampooFactory

    class Gathering(Consolidating, Trainer):
        pass

    for kind, callbacks in ((Trainer, [ConsolidateState()]), (Gathering, [])):
        with as_started(group, "huggingface"):
            given: dict[str, Any] = {"use_cpu": True, "max_steps": 3, "enable_jit_checkpoint": True, "report_to": []}
            trainer = kind(
                model=Learner(),
                args=TrainingArguments(str(folder), **given),
                train_dataset=samples(),
                optimizer_cls_and_kwargs=(KLShampooFactory, OPTIONS),
                callbacks=callbacks,
            )
            with raising(ValueError, "enable_jit_checkpoint has each rank save when its own timer says so"):
                trainer.train()


def test_saves_at_times_of_each_ranks_own_are_refused_before_training(worlds, tmp_path):
    worlds[2].run(each_by_its_own_timer, 2, tmp_path, timeout=120)


def run_under_fsdp2(group: dist.ProcessGroup, folder: Path, kind: str, resume: str | None = None) -> Any:
    config = {"fsdp_version": 2, "auto_wrap_policy": "NO_WRAP", "cpu_ram_efficient_loading": False}
    config["state_dict_type"] = kind
    with fsdp_on_cpus():
        return run_trainer(group, folder, resume, fsdp=True, fsdp_config=config)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_under_fsdp2_trains_as_on_one_process_and_resumes(worlds, alone, kind, tmp_path):
    for resume in (None, "checkpoint-3"):
        for weights in worlds[2].run(run_under_fsdp2, 2, tmp_path, kind, resume, timeout=120):
            assert deviation(weights, alone[1]) < 1e-9
    for weights in worlds[4].run(run_under_fsdp2, 4, tmp_path, kind, "checkpoint-3", timeout=120):
        assert deviation(weights, alone[1]) < 1e-9
    saved = "optimizer.bin" if kind == "FULL_STATE_DICT" else "optimizer_0"
    assert (tmp_path / "checkpoint-3" / saved).exists(), "FSDP was left out"


BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}


@pytest.mark.parametrize(
    "more",
    [
        {"save_strategy": "best", "save_total_limit": 1, **BEST},
        {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "save_total_limit": 1},
        {"save_only_model": True},
    ],
    ids=["best", "epoch", "model alone"],
)
def test_the_trainer_saves_whole_by_every_strategy(worlds, tmp_path, more):
    worlds[2].run(run_trainer, 2, tmp_path, timeout=120, **more)
    saved = sorted(tmp_path.glob("checkpoint-*"))
    assert saved
    for checkpoint in saved:
        if "save_only_model" in more:
            assert not (checkpoint / "optimizer.pt").exists()
            continue
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        optimizer = KLShampoo(Learner(), **OPTIONS)
        optimizer.load_state_dict(state)
        assert "kl_dist" not in state
        assert all(bool(entries["step"].item()) for entries in optimizer.state.values() if "step" in entries)


# -- Accelerate --------------------------------------------------------------------------------------------------------


class Prepared:
    """A model and its optimizer as accelerate has prepared them, under DDP, or under FSDP2 with a `kind` of state."""

    def __init__(self, kind: str | None = None, made: str = "before") -> None:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        plugin = None
        if kind is not None:
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False, state_dict_type=kind
            )
        self.accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model = layers(torch.float64)
        if made == "before":
            self.model, self.optimizer = self.accelerator.prepare(model, KLShampoo(model, **OPTIONS))
        elif made == "after":  # FSDP2's way to be prepared without any optimizer
            other = self.accelerator.prepare(model, torch.optim.SGD(model.parameters()))
            self.model, self.optimizer = other[0], KLShampoo(param_groups(model, weight_decay=0.1), lr=1e-2)

    def train(self, steps: Sequence[int]) -> "Prepared":
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        for step in steps:
            self.accelerator.backward(loss_of(self.model, tokens_of(step).chunk(ranks)[rank]))
            self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def weights(self) -> Any:
        found = weights_of(self.model)
        return {name.removeprefix("module."): tensor for name, tensor in found.items()}


@contextlib.contextmanager
def as_launched(group: dist.ProcessGroup | None, kind: str | None) -> Iterator[None]:
    with as_started(group, "accelerate"), contextlib.nullcontext() if kind is None else fsdp_on_cpus():
        yield


def run_accelerate(group: dist.ProcessGroup | None, folder: Path, kind: str | None = None) -> tuple[Any, Any]:
    """The weights of a run that was never stopped, and of one that went on from its state in an optimizer new-made."""
    from kl_dist.huggingface import consolidate_on_save

    with as_launched(group, kind):
        run = Prepared(kind).train(range(3))
        consolidate_on_save(run.accelerator)
        run.accelerator.save_state(str(folder))
        run.train(range(3, STEPS))
        return run.weights(), resumed(folder, kind)


def resumed(folder: Path, kind: str | None) -> Any:
    other = Prepared(kind)
    other.accelerator.load_state(str(folder))
    return other.train(range(3, STEPS)).weights()


def go_on(group: dist.ProcessGroup | None, folder: Path) -> Any:
    with as_launched(group, None):
        return resumed(folder, None)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_accelerate_trains_as_on_one_process_and_its_save_state_is_whole(worlds, kind, tmp_path):
    alone, _ = run_accelerate(None, tmp_path / "alone")
    for weights, again in worlds[2].run(run_accelerate, 2, tmp_path, kind, timeout=120):
        assert deviation(weights, alone) < 1e-9
        assert deviation(again, alone) < 1e-9
    if kind is None:
        assert deviation(go_on(None, tmp_path), alone) < 1e-9
        assert all(deviation(x, alone) < 1e-9 for x in worlds[2].run(go_on, 2, tmp_path / "alone"))


def made_after(group: dist.ProcessGroup) -> Any:
    with as_launched(group, KINDS[0]):
        return Prepared(KINDS[0], made="after").train(range(STEPS)).weights()


def test_an_optimizer_made_after_accelerate_has_sharded_the_model_trains_alike(worlds, tmp_path):
    alone, _ = run_accelerate(None, tmp_path)
    for weights in worlds[2].run(made_after, 2):
        assert deviation(weights, alone) < 1e-9


def gathered_once(group: dist.ProcessGroup) -> list[int]:
    """How often state was gathered: asked for twice before a step, then once more; and loaded in between."""
    from kl_dist.checkpoint import full
    from kl_dist.huggingface import consolidate

    optimizer, counts = KLShampoo(Learner(), **OPTIONS), []
    with mock.patch.object(full, "gather", wraps=full.gather) as gather:
        for _ in range(2):
            consolidate(optimizer, group.rank() == 1)
        counts.append(gather.call_count)
        load_full_state_dict(optimizer, full_state_dict(optimizer))
        consolidate(optimizer, group.rank() == 1)
        counts.append(gather.call_count)
    assert optimizer.is_consolidated == (group.rank() == 1)
    assert ("kl_dist" not in optimizer.state_dict()) == (group.rank() == 1)
    return counts


def test_what_is_gathered_already_is_not_gathered_again(worlds):
    assert worlds[2].run(gathered_once, 2) == [[1, 3], [1, 3]]


def unknown_to_each_other(group: dist.ProcessGroup) -> None:
    """On two ranks whose accelerate thinks that it is alone, as it does on a machine without a GPU."""
    from accelerate import Accelerator

    from kl_dist.huggingface import consolidate_on_save

    with as_started(group, "accelerate"):
        consolidate_on_save(Accelerator())


def test_processes_that_accelerate_does_not_know_of_are_refused(worlds):
    with raising(ValueError, r"torch has 2 ranks here and Accelerate says 1, .* make Accelerator\(cpu=True\)"):
        worlds[2].run(unknown_to_each_other, 2)
