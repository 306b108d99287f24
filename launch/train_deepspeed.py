"""Train the byte-level GPT of launch/model.py with DeepSpeed, at any ZeRO stage; the config says with which optimizer.

    torchrun --nproc-per-node 2 launch/train_deepspeed.py --deepspeed_config launch/configs/zero2.json
    deepspeed launch/train_deepspeed.py --deepspeed_config launch/configs/zero3.json

As in launch/train.py a batch depends on the seed and the step alone, so any number of processes does the same training.
"""

import json
import math
import os
import sys
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
from tqdm import tqdm

import deepspeed_integration  # noqa: F401 (makes the optimizers known to DeepSpeed)
from launch import endings
from launch.data import Corpus, load_corpus, training_starts, validation_starts, windows
from launch.endings import Diverged
from launch.model import GPT
from launch.options import UsageError
from launch.ranks import watched

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
        data: a text file; by default the source of Python's standard library.
        out: folder of the metrics and of the checkpoint.
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
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        given = json.loads(options.deepspeed_config.read_text())
        self.windows = given.get("train_batch_size", 0)
        if not self.windows:
            raise UsageError(
                f"{options.deepspeed_config} needs a train_batch_size: the windows of a step, over all ranks"
            )
        if self.windows % self.ranks:
            raise UsageError(
                f"train_batch_size {self.windows} of {options.deepspeed_config} must divide over {self.ranks} ranks"
            )
        self.corpus: Corpus = load_corpus(options.data, options.context)
        torch.manual_seed(options.seed)
        model = GPT(options.layers, options.width, options.heads, options.context)
        self.engine: Any = deepspeed.initialize(model=model, model_parameters=groups(model), config=given)[0]

    def step(self, step: int) -> float:
        """One step; the mean loss over the ranks."""
        options = self.options
        starts = training_starts(self.corpus.train, options.seed, step, self.windows, options.context)
        mine = starts[self.rank :: self.ranks]
        total = torch.zeros((), device=self.engine.device)
        shares = mine.split(self.engine.train_micro_batch_size_per_gpu())
        for share in shares:
            loss = self.loss(self.corpus.train, share)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / len(shares)
        return self.mean(total)

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over the fixed validation windows that divide over the ranks."""
        starts = validation_starts(self.corpus.validation, VALIDATION_WINDOWS, self.options.context)
        starts = starts[: len(starts) // self.ranks * self.ranks]
        losses = [self.loss(self.corpus.validation, share) for share in starts[self.rank :: self.ranks].split(16)]
        return self.mean(torch.stack(losses).mean())

    def loss(self, text: Tensor, starts: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per byte, of the windows that begin at `starts`."""
        inputs, targets = (part.to(self.engine.device) for part in windows(text, starts, self.options.context))
        return F.cross_entropy(self.engine(inputs).flatten(0, 1).float(), targets.flatten())

    def mean(self, value: Tensor) -> float:
        value = value.float()
        dist.all_reduce(value)
        return float(value) / self.ranks


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

    Raises:
        Diverged: the loss is not finite, on all ranks.
    """
    options = job.options
    if options.resume:
        job.engine.load_checkpoint(str(options.out))
    first = job.rank == 0
    if first:
        options.out.mkdir(parents=True, exist_ok=True)
    began = job.engine.global_steps
    bar = tqdm(range(began + 1, options.steps + 1), disable=not first, unit="step")
    for step in bar:
        doing(f"step {step}", step == began + 1)
        loss = job.step(step)
        bar.set_postfix(loss=f"{loss:.3f}")
        if first:
            note(options.out, {"step": step, "loss": loss})
        if not math.isfinite(loss):
            raise Diverged(f"The loss is {loss} at step {step}")
    doing("the validation", True)
    found = job.validate()
    doing("saving", True)
    job.engine.save_checkpoint(str(options.out))
    if first:
        note(options.out, {"step": options.steps, "val_loss": found})
        what = f"ZeRO {job.engine.zero_optimization_stage()}, {job.ranks} processes, {options.steps} steps"
        print(f"{what}: validation loss {found:.4f} nats per byte")


def note(folder: Path, record: dict[str, float]) -> None:
    """Add a line to the metrics; a disk that is full does not end the run."""
    try:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        print(f"metrics.jsonl could not be written: {error.strerror or error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line asks; returns the exit status."""
    given = None if arguments is None else list(arguments)
    return endings.status_of(lambda: train(CLI(Options, args=given, as_positional=False)))


if __name__ == "__main__":
    endings.process(main)
