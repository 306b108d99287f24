"""Train a GPT-2 of Hugging Face's transformers, byte by byte, with its Trainer: on DeepSpeed, under DDP or FSDP2.

    torchrun --nproc-per-node 2 launch/hf_trainer.py --parallel ddp
    deepspeed --num_gpus 2 launch/hf_trainer.py --deepspeed_config launch/configs/hf_zero3.json
    accelerate launch --use_deepspeed --num_processes 2 launch/hf_trainer.py

The Trainer knows nothing of KL-Shampoo. On DeepSpeed it takes importing deepspeed_integration, and a config whose
optimizer is of type KLShampoo; elsewhere a factory, and a callback that has its state whole where it is saved. Batches
are the Trainer's, so they depend on the number of processes.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:
    # Started as a file, Python looks for modules beside it; this package's folder is one up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from jsonargparse import CLI
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

import deepspeed_integration  # noqa: F401 (makes the optimizers known to DeepSpeed)
from kl_dist.huggingface import ConsolidateState, KLShampooFactory, log_stats
from launch import endings
from launch.data import load_corpus, validation_starts
from launch.model import gpt2
from launch.options import UsageError

DEFAULT_CONFIG = Path(__file__).parent / "configs/hf_zero2.json"
FSDP2 = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}
VALIDATION_WINDOWS = 128


@dataclass(frozen=True)
class Options:
    """A run of the Trainer. What the DeepSpeed config has at "auto" is taken from here.

    Args:
        parallel: how the model lies over the processes: deepspeed, ddp, or, on GPUs, fsdp2.
        deepspeed_config: DeepSpeed's JSON file; by default accelerate's, if it has one, or else configs/hf_zero2.json.
        layers: transformer blocks.
        width: size of a byte's vector.
        heads: attention heads of a block.
        context: bytes a prediction can see.
        steps: when to stop.
        batch_size: windows that a process takes at once.
        accumulate: how often it does that for a step.
        learning_rate: its peak; begin at five times AdamW's, up to 2e-2.
        weight_decay: decoupled weight decay; on DeepSpeed, to which the Trainer gives a single group, of norms as well.
        warmup: steps of linear warm-up before the cosine.
        grad_clip: largest norm of the whole gradient.
        bf16: compute in bfloat16.
        log_every: steps between two looks at the loss, and at what the optimizer says; both go to TensorBoard too.
        matrices_every: steps between two looks at each matrix, which go to TensorBoard alone.
        save_every: steps between two checkpoints; the last step is saved in any case.
        keep: how many of the newest checkpoints to keep.
        seed: of the weights and of the order of the data.
        data: a text file; by default the source of Python's standard library.
        out: folder of the checkpoints and of trainer_state.json, which has the losses.
        resume: go on from the newest checkpoint in `out`.
        local_rank: set by the deepspeed launcher.
    """

    parallel: Literal["deepspeed", "ddp", "fsdp2"] = "deepspeed"
    deepspeed_config: Path | None = None
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    steps: int = 200
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-2
    weight_decay: float = 0.01
    warmup: int = 10
    grad_clip: float = 1.0
    bf16: bool = False
    log_every: int = 10
    matrices_every: int = 50
    save_every: int = 100
    keep: int = 2
    seed: int = 0
    data: str | None = None
    out: Path = Path("runs/hf")
    resume: bool = False
    local_rank: int = -1


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of a text that begin at `starts`; the labels are the same bytes, since the model shifts them itself."""

    def __init__(self, text: Tensor, starts: Tensor, context: int) -> None:
        self.text, self.starts, self.length = text, starts, context + 1

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        start = int(self.starts[number])
        window = self.text[start : start + self.length].long()
        return {"input_ids": window, "labels": window}


def make_arguments(options: Options) -> TrainingArguments:
    config = options.deepspeed_config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", DEFAULT_CONFIG)
    fsdp: dict[str, Any] = {"fsdp": True, "fsdp_config": FSDP2} if options.parallel == "fsdp2" else {}
    return TrainingArguments(
        deepspeed=str(config) if options.parallel == "deepspeed" else None,
        **fsdp,
        use_cpu=not torch.cuda.is_available(),
        bf16=options.bf16,
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,
        max_grad_norm=options.grad_clip,
        logging_steps=options.log_every,
        save_steps=options.save_every,
        save_total_limit=options.keep,
        seed=options.seed,
        report_to=["tensorboard"],
    )


def make_model(options: Options) -> GPT2LMHeadModel:
    """A GPT-2, whole on every rank: from_config would make other weights at stage 3 than at stage 2."""
    torch.manual_seed(options.seed)
    return gpt2(options.layers, options.width, options.heads, options.context + 1)


def make_trainer(options: Options) -> Trainer:
    corpus = load_corpus(options.data, options.context)
    training = torch.arange(0, len(corpus.train) - options.context, options.context)
    validation = validation_starts(corpus.validation, VALIDATION_WINDOWS, options.context)
    rates = {"lr": options.learning_rate, "adamw_lr": options.learning_rate / 2, "weight_decay": options.weight_decay}
    others: dict[str, Any] = {
        "optimizer_cls_and_kwargs": (KLShampooFactory, rates),
        "callbacks": [ConsolidateState()],
    }
    trainer = Trainer(
        model=make_model(options),
        args=make_arguments(options),
        train_dataset=Windows(corpus.train, training, options.context),
        eval_dataset=Windows(corpus.validation, validation, options.context),
        **({} if options.parallel == "deepspeed" else others),
    )
    log_stats(trainer, options.matrices_every)
    return trainer


def train(options: Options) -> Trainer:
    """Train to the last step, and look at the validation loss.

    Raises:
        UsageError: no launcher has started this, accelerate has turned DeepSpeed or FSDP off, or it takes each process
            for the only one.
    """
    if "RANK" not in os.environ:
        raise UsageError("start this with torchrun, deepspeed, or accelerate launch")
    trainer = make_trainer(options)
    if options.parallel == "deepspeed" and not trainer.is_deepspeed_enabled:  # a Trainer would go on with AdamW
        raise UsageError("accelerate leaves DeepSpeed out where ACCELERATE_USE_CPU is set; unset it")
    if trainer.args.world_size != int(os.environ["WORLD_SIZE"]):  # each would read all of the data
        raise UsageError(
            f"accelerate counts {trainer.args.world_size} process(es), the launcher {os.environ['WORLD_SIZE']}: without"
            " GPUs TrainingArguments take use_cpu=True"
        )
    if options.parallel == "fsdp2" and not trainer.is_fsdp_enabled:  # it would go on with DDP
        raise UsageError("accelerate has FSDP on GPUs alone: on CPUs take --parallel ddp")
    trainer.train(resume_from_checkpoint=options.resume)
    found = trainer.evaluate()["eval_loss"]
    trainer.save_state()
    if trainer.is_world_process_zero():
        engine: Any = trainer.model_wrapped
        where = f"ZeRO {engine.zero_optimization_stage()}" if trainer.is_deepspeed_enabled else options.parallel
        what = f"{where}, {trainer.args.world_size} processes, {options.steps} steps"
        print(f"{what}: validation loss {found:.4f} nats per byte")
    return trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line asks; returns the exit status."""
    given = None if arguments is None else list(arguments)
    return endings.status_of(lambda: train(CLI(Options, args=given, as_positional=False)))


if __name__ == "__main__":
    endings.process(main)
