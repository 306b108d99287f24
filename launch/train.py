"""Train a byte-level GPT on real text, on one process or many.

    python launch/train.py --optimizer adamw
    torchrun --nproc-per-node 2 launch/train.py

The global batch of a step depends on the seed and the step alone, so any number of processes does the same training;
each takes its rows of the batch, DDP averages the gradients, and the optimizer divides its own work over the processes.
"""

import math
import sys
import time
from pathlib import Path

if not __package__:
    # Started as a file, Python looks for modules beside it; this package's folder is one up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launch import checkpoint, report
from launch.data import Corpus, load_corpus, training_starts, validation_starts, windows
from launch.metrics import Log, Record, set_aside
from launch.model import GPT, Model
from launch.optimizers import Trainer, make_trainer
from launch.options import Options, UsageError, parse
from launch.parallel import clip_gradients, lay_out
from launch.ranks import Ranks, joined_ranks

VALIDATION_WINDOWS = 128


class Job:
    """Everything one run holds on one rank: text, model, optimizer."""

    def __init__(self, options: Options, ranks: Ranks) -> None:
        self.options = options
        self.ranks = ranks
        self.corpus = self.read(options)
        torch.manual_seed(options.seed)
        self.model = self.build(options).to(ranks.device)
        self.laid = lay_out(self.model, options.parallel, options.inner, ranks)
        # After every rank has its weights, and on the bare model, whose modules have plain names.
        self.trainer: Trainer = make_trainer(options, self.model)
        # DDP lays out its buckets anew after its first backward, and with them the order in which ranks are summed. Let
        # that backward be this one, so that every step, also the first of a job that continues, sums in the same order.
        self.loss(self.laid.module, self.corpus.train, self.rows(step=0)).backward()

    @staticmethod
    def read(options: Options) -> Corpus:
        """What is learned; with `build` and `loss`, all that another task needs to say of itself."""
        return load_corpus(options.data, options.context)

    @staticmethod
    def build(options: Options) -> Model:
        """The model, freshly initialised."""
        return GPT(options.layers, options.width, options.heads, options.context)

    def start(self) -> int:
        """Begin afresh or continue; returns how many steps are already done."""
        folder = self.options.folder / "checkpoint"
        if self.options.resume:
            return checkpoint.load(checkpoint.newest(folder), self.options, self.ranks, self.model, self.trainer)
        if self.ranks.first and (aside := set_aside(self.options.folder)):
            print(f"The files of an earlier run are now in {aside}.")
        return 0

    def train_step(self, step: int) -> Record:
        """One step: this rank's rows, their gradients averaged over the ranks, one update."""
        began, cpu_began = time.perf_counter(), time.process_time()
        self.trainer.zero_grad()
        loss = self.loss(self.laid.module, self.corpus.train, self.rows(step))
        loss.backward()
        if self.options.grad_clip is not None:
            clip_gradients(self.model.parameters(), self.options.grad_clip)
        self.ranks.synchronize()
        stepped, cpu_stepped = time.perf_counter(), time.process_time()
        lr = self.trainer.step(step)
        self.ranks.synchronize()
        ended, cpu_ended = time.perf_counter(), time.process_time()
        return {
            "step": step,
            "loss": self.ranks.sum(loss.detach()).item() / self.ranks.size,
            "lr": lr,
            "tokens": step * self.options.tokens_per_step,
            "seconds": ended - began,
            "optimizer_seconds": ended - stepped,
            "cpu_seconds": cpu_ended - cpu_began,
            "optimizer_cpu_seconds": cpu_ended - cpu_stepped,
        }

    def rows(self, step: int) -> Tensor:
        """Where this rank's windows of a step's batch begin."""
        options = self.options
        starts = training_starts(self.corpus.train, options.seed, step, options.windows_per_step, options.context)
        return starts[self.laid.part :: self.laid.parts]

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over the fixed validation windows; the ranks share them out, all in as many rounds."""
        options = self.options
        part, parts = self.laid.part, self.laid.parts
        starts = validation_starts(self.corpus.validation, VALIDATION_WINDOWS, options.context)
        size = options.windows_per_rank(self.ranks.size)
        shares = starts[part::parts].split(size)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for number in range(math.ceil(len(starts) / parts / size)):
            # a rank that has no more looks at any window, for sharded layers need all ranks, and does not count it
            some = shares[number] if number < len(shares) else starts[:1]
            loss = self.loss(self.model, self.corpus.validation, some)
            total += loss.double() * (len(some) if number < len(shares) else 0)
        return self.ranks.sum(total).item() / len(starts) * parts / self.ranks.size

    def loss(self, model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per byte, of the windows that begin at `starts`."""
        device = self.ranks.device
        inputs, targets = (part.to(device) for part in windows(text, starts, self.options.context))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def save(self, step: int) -> Path:
        folder = self.options.folder / "checkpoint"
        return checkpoint.save(folder, step, self.options, self.ranks, self.model, self.trainer)


def run(job: Job) -> None:
    """Train to the last step, looking at the validation loss and saving on the way, and report."""
    options, ranks = job.options, job.ranks
    done = job.start()
    if done >= options.steps:
        raise UsageError(f"this run is at step {done} of --steps {options.steps} already; there is nothing left to do")
    if not ranks.first:
        train(job, done, None)
        return
    with Log(options.folder, options.steps, done) as log:
        saved = train(job, done, log)
    finish(job, log, saved)


def train(job: Job, done: int, log: Log | None) -> Path:
    """The loop, from step `done + 1` on; `log` is the first rank's. Returns the last checkpoint."""
    options = job.options
    saved = Path()
    for step in range(done + 1, options.steps + 1):
        record = job.train_step(step)
        last = step == options.steps
        if last or step % options.eval_every == 0:
            record["val_loss"] = job.validate()
        if log:
            log.record(record)
        if last or (options.checkpoint_every and step % options.checkpoint_every == 0):
            saved = job.save(step)
    return saved


def finish(job: Job, log: Log, saved: Path) -> None:
    """Draw the picture and say what was done; the first rank's work."""
    options, name = job.options, job.corpus.name
    picture = options.folder / "loss.png"
    report.draw(log.records, options, name, picture)
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    print(report.closing_words(log.records, options, name, parameters, job.ranks.size))
    print(f"Loss curve  {picture}\nMetrics     {log.path}, and TensorBoard's in {options.folder / 'tensorboard'}")
    print(f"Checkpoint  {saved}")
    other = "kl_shampoo" if options.optimizer == "adamw" else "adamw"
    print(f"\nTo compare, run the same with --optimizer {other}.")


def main() -> int:
    """Run the job that the command line asks for; returns the exit status."""
    try:
        options = parse()
        with joined_ranks() as ranks:
            run(Job(options, ranks))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; --resume continues from the last checkpoint, if one was saved.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
