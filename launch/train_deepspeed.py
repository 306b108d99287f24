"""Train the byte-level GPT of launch/model.py with DeepSpeed, at any ZeRO stage; the config says with which optimizer.

    torchrun --nproc-per-node 2 launch/train_deepspeed.py --deepspeed_config launch/configs/zero2.json
    deepspeed launch/train_deepspeed.py --deepspeed_config launch/configs/zero3.json

As in launch/train.py a batch depends on the seed and the step alone, so any number of processes does the same training.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    # Started as a file, Python looks for modules beside it; this package's folder is one up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import torch
import torch.distributed as dist
from jsonargparse import CLI
from torch import Tensor, nn
from torch.nn import functional as F

import deepspeed_integration  # noqa: F401 (makes the optimizers known to DeepSpeed)
from launch import endings
from launch.data import Corpus, load_corpus, training_starts, validation_starts, windows
from launch.endings import Diverged
from launch.metrics import opened_log
from launch.model import GPT
from launch.options import UsageError
from launch.ranks import Ranks, watched
from launch.records import Record, set_aside

VALIDATION_WINDOWS = 128


@dataclass(frozen=True)
class Options:
    """A run of DeepSpeed's engine.

    Args:
        deepspeed_config: DeepSpeed's JSON file; its train_batch_size is the windows of a step, over all processes.
        layers: transformer blocks.
        width: size of a byte's vector.
        heads: attention heads of a block.
        context: bytes a prediction can see.
        steps: when to stop.
        seed: of the weights and of the order of the data.
        eval_every: steps between two looks at the validation loss, and at what the optimizer says of each matrix.
        data: a text file; by default the source of Python's standard library.
        out: folder of the metrics, of TensorBoard's file and of the checkpoint.
        resume: go on from the newest checkpoint in `out`.
        patience: seconds after which a process that has stopped ends the job on all the others; 0: never.
        local_rank: set by the deepspeed launcher.
    """

    deepspeed_config: Path
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    steps: int = 200
    seed: int = 0
    eval_every: int = 50
    data: str | None = None
    out: Path = Path("runs/deepspeed")
    resume: bool = False
    patience: float = 300.0
    local_rank: int = -1


class Job:
    """What one rank holds: the text, and DeepSpeed's engine."""

    def __init__(self, options: Options) -> None:
        self.options = options
        if "RANK" not in os.environ:
            raise UsageError("start this with torchrun, deepspeed, or accelerate launch --use_deepspeed")
        if not options.deepspeed_config.is_file():
            raise UsageError(f"there is no file {options.deepspeed_config}")
        deepspeed.init_distributed()
        size = dist.get_world_size()
        given = json.loads(options.deepspeed_config.read_text())
        self.windows = given.get("train_batch_size", 0)
        if not self.windows:
            raise UsageError(
                f"{options.deepspeed_config} needs a train_batch_size: the windows of a step, over all ranks"
            )
        if self.windows % size:
            raise UsageError(
                f"train_batch_size {self.windows} of {options.deepspeed_config} must divide over {size} ranks"
            )
        self.corpus: Corpus = load_corpus(options.data, options.context)
        torch.manual_seed(options.seed)
        model = GPT(options.layers, options.width, options.heads, options.context)
        self.engine: Any = deepspeed.initialize(model=model, model_parameters=groups(model), config=given)[0]
        self.ranks = Ranks(dist.get_rank(), size, torch.device(self.engine.device))

    def step(self, step: int) -> Record:
        """One step, and its record; the loss is the mean over the ranks."""
        options, engine = self.options, self.engine
        starts = training_starts(self.corpus.train, options.seed, step, self.windows, options.context)
        mine = starts[self.ranks.rank :: self.ranks.size]
        total = torch.zeros((), device=engine.device)
        began, in_optimizer, lr = time.perf_counter(), 0.0, engine.get_lr()[0]
        shares = mine.split(engine.train_micro_batch_size_per_gpu())
        for share in shares:
            loss = self.loss(self.corpus.train, share)
            engine.backward(loss)
            total += loss.detach() / len(shares)
            self.ranks.synchronize()
            stepped = time.perf_counter()
            engine.step()  # which updates after the last of them
            self.ranks.synchronize()
            in_optimizer += time.perf_counter() - stepped
        seconds = time.perf_counter() - began
        tokens = step * self.windows * options.context
        record: Record = {"step": step, "loss": self.mean(total), "lr": lr, "tokens": tokens}
        return record | {"seconds": seconds, "optimizer_seconds": in_optimizer}

    def look(self) -> Record:
        """The validation loss, and what the optimizer says of itself and of each matrix; a collective."""
        stats = getattr(self.engine.basic_optimizer, "stats", None)
        numbers = {} if stats is None else {"optimizer": stats(all_ranks=True, matrices=True)}
        return {"val_loss": self.validate(), **numbers, "memory": self.ranks.peak_memory()}

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over the fixed validation windows that divide over the ranks."""
        starts = validation_starts(self.corpus.validation, VALIDATION_WINDOWS, self.options.context)
        rank, size = self.ranks.rank, self.ranks.size
        starts = starts[: len(starts) // size * size]
        self.engine.eval()
        losses = [self.loss(self.corpus.validation, share) for share in starts[rank::size].split(16)]
        self.engine.train()
        return self.mean(torch.stack(losses).mean())

    def loss(self, text: Tensor, starts: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per byte, of the windows that begin at `starts`."""
        inputs, targets = (part.to(self.engine.device) for part in windows(text, starts, self.options.context))
        return F.cross_entropy(self.engine(inputs).flatten(0, 1).float(), targets.flatten())

    def mean(self, value: Tensor) -> float:
        value = value.float()
        dist.all_reduce(value)
        return float(value) / self.ranks.size


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Norms are not decayed."""
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def train(options: Options) -> None:
    """Train to the last step, and save."""
    job = Job(options)
    with watched(options.patience) as watch:
        run(job, watch.doing if watch else lambda *_: None)


def run(job: Job, doing: Callable[[str, bool], None]) -> None:
    """The loop; `doing` is told what this rank is at, and whether that may take it long.

    Raises, on all ranks:
        Diverged: the loss is not finite.
        UsageError: there is nothing left to do, or the folder cannot be written.
    """
    options, engine, ranks = job.options, job.engine, job.ranks
    if options.resume:
        engine.load_checkpoint(str(options.out))
    elif ranks.first and (aside := set_aside(options.out)):
        print(f"The files of an earlier run are now in {aside}.")
    done = engine.global_steps
    if done >= options.steps:
        raise UsageError(f"this run is at step {done} of --steps {options.steps} already; there is nothing left to do")
    with opened_log(options.out, options.steps, done, ranks) as log:
        for step in range(done + 1, options.steps + 1):
            doing(f"step {step}", step == done + 1)
            record = job.step(step)
            if step == options.steps or step % options.eval_every == 0:
                doing(f"the validation loss after step {step}", True)
                record |= job.look()
            if log:
                log.record(record)
            if not math.isfinite(record["loss"]):
                raise Diverged(f"The loss is {record['loss']} at step {step}")
        doing("saving", True)
        engine.save_checkpoint(str(options.out))
    if ranks.first:
        what = f"ZeRO {engine.zero_optimization_stage()}, {ranks.size} processes, {options.steps} steps"
        print(f"{what}: validation loss {record['val_loss']:.4f} nats per byte")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line asks; returns the exit status."""
    given = None if arguments is None else list(arguments)
    return endings.status_of(lambda: train(CLI(Options, args=given, as_positional=False)))


if __name__ == "__main__":
    endings.process(main)
