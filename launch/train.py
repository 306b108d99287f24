"""Train a byte-level GPT on real text, on one process or many.

    python launch/train.py --optimizer adamw
    torchrun --nproc-per-node 2 launch/train.py

The global batch of a step depends on the seed and the step alone, so any number of processes does the same training;
each takes its rows of the batch, DDP averages the gradients, and the optimizer divides its own work over the processes.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Started as a file, Python looks for modules beside it; this package's folder is one up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launch import checkpoint, endings, folders, identity, report
from launch.data import Corpus, load_corpus, training_starts, validation_starts, windows
from launch.endings import Diverged, NotSaved
from launch.metrics import Log, opened_log
from launch.model import GPT, Model
from launch.optimizers import Trainer, make_trainer
from launch.options import Options, UsageError, parse
from launch.parallel import clip_gradients, lay_out
from launch.ranks import Ranks, joined_ranks
from launch.records import Record, set_aside
from launch.signals import Asked

VALIDATION_WINDOWS = 128
PATIENT_STEPS = 10
"""Steps in a row whose loss is not finite; then the run ends."""


class Job:
    """Everything one run holds on one rank: text, model, optimizer."""

    kind: type[Options] = Options
    """Of the options that it takes."""
    deciding: tuple[str, ...] = ()
    """Those of them that decide how a run goes and that no other job has."""

    def __init__(self, options: Options, ranks: Ranks, asked: Asked | None = None) -> None:
        self.options = options
        self.ranks = ranks
        self.asked = asked or Asked()
        self.stopping = False  # after this step, because some rank was asked to
        self.corpus = self.read(options)
        torch.manual_seed(options.seed)
        self.model = self.build(options).to(ranks.device)
        self.laid = lay_out(self.model, options.parallel, options.inner, ranks)
        # After every rank has its weights, and on the bare model, whose modules have plain names.
        self.trainer = self.serve(options, self.model)
        # DDP lays out its buckets anew after its first backward, and with them the order in which ranks are summed. Let
        # that backward be this one, so that every step, also the first of a job that continues, sums in the same order.
        self.loss(self.laid.module, self.corpus.train, self.rows(step=0)).backward()
        self.trainer.zero_grad()  # with gradients about, torch makes no state to load a checkpoint into

    @staticmethod
    def read(options: Options) -> Corpus:
        """What is learned; with `build`, `serve` and `predict` or `loss`, all that another task says of itself."""
        return load_corpus(options.data, options.context)

    @staticmethod
    def build(options: Options) -> Model:
        """The model, freshly initialised."""
        return GPT(options.layers, options.width, options.heads, options.context)

    @staticmethod
    def serve(options: Options, model: Model) -> Trainer:
        """The optimizer of the bare model, in its place and on its device."""
        return make_trainer(options, model)

    def start(self) -> int:
        """Begin afresh or continue; returns how many steps are already done."""
        folder = self.options.folder / "checkpoint"
        if self.options.resume is not None:
            chosen = checkpoint.choose(folder, self.options.resume, self.ranks)
            if chosen is not None:
                done = checkpoint.load(chosen, self.options, self.ranks, self.model, self.trainer)
                if self.ranks.first:
                    identity.settle(self.options.folder, checkpoint.run_of(chosen, self.options.resume))
                goes_on = done < self.options.steps
                if goes_on and self.ranks.first and (aside := folders.abandon(folder, done)):
                    print(f"Going on from step {done}; the checkpoints after it are now in {aside}.")
                return done
        if self.ranks.first and (aside := set_aside(self.options.folder)):
            print(f"The files of an earlier run are now in {aside}.")
        if self.ranks.first:
            identity.settle(self.options.folder)
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
        # one sum for both: all ranks stop after the same step
        total, asked = self.ranks.sum(torch.stack([loss.detach(), loss.new_tensor(self.asked.to_stop)])).tolist()
        self.stopping = asked > 0
        return {
            "step": step,
            "loss": total / self.ranks.size,
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
            return F.cross_entropy(self.predict(model, inputs).flatten(0, 1), targets.flatten())

    @staticmethod
    def predict(model: nn.Module, inputs: Tensor) -> Tensor:
        """What a model makes of its inputs (batch x time), as logits."""
        return model(inputs)

    def save(self, step: int) -> Path | None:
        """The folder of the checkpoint; None where it could not be written, which is said and not fatal."""
        folder = self.options.folder / "checkpoint"
        self.ranks.doing(f"saving step {step}", unhurried=True)
        try:
            return checkpoint.save(folder, step, self.options, self.ranks, self.model, self.trainer)
        except checkpoint.SaveError as error:
            if self.ranks.first:
                print(f"\nThe checkpoint of step {step} was not written: {error}", file=sys.stderr)
            return None


def run(job: Job) -> None:
    """Train to the last step, looking at the validation loss and saving on the way, and report.

    Raises, on all ranks:
        UsageError: there is nothing left to do.
        Diverged: the loss is not finite any more.
        NotSaved: what was reached could not be written.
    """
    with identity.alone(job.options.folder, job.ranks):
        _run(job)


def _run(job: Job) -> None:
    options, ranks = job.options, job.ranks
    job.asked.listen()
    done = job.start()
    if done == options.steps and options.resume == "auto":  # it ended between its last checkpoint and its last words
        if ranks.first:
            with Log(options.folder, options.steps, done) as ended:
                if ended.records:
                    finish(job, ended, None)
        return
    if done >= options.steps:
        raise UsageError(f"this run is at step {done} of --steps {options.steps} already; there is nothing left to do")
    if ranks.any(job.asked.to_stop):
        if ranks.first:
            print(f"Stopped before step {done + 1}, as a signal asked; nothing has changed since.")
        return
    with opened_log(options.folder, options.steps, done, ranks) as log:
        last, saved = train(job, done, log)
    if log and last == options.steps:
        finish(job, log, saved)
    if saved is None:
        raise NotSaved(
            f"Step {last} was reached, and its checkpoint was not written{folders.last(options.folder / 'checkpoint')}"
        )
    if log and last < options.steps:
        print(f"Stopped after step {last}, as a signal asked. To go on, run the same with --resume.")


def train(job: Job, done: int, log: Log | None) -> tuple[int, Path | None]:
    """The loop, from step `done + 1` on; `log` is the first rank's. Returns the last step and its checkpoint."""
    options, ranks = job.options, job.ranks
    bad = 0  # steps in a row whose loss was not finite
    for step in range(done + 1, options.steps + 1):
        ranks.doing(f"step {step}", unhurried=step == done + 1)  # the first compiles what is compiled
        record = job.train_step(step)
        last = step == options.steps
        if last or step % options.eval_every == 0:
            ranks.doing(f"the validation loss after step {step}", unhurried=True)
            record["val_loss"] = job.validate()
            record |= {"optimizer": job.trainer.numbers(), "memory": job.ranks.peak_memory()}
        if log:
            log.record(record)
        bad = 0 if math.isfinite(record["loss"]) else bad + 1
        if bad == PATIENT_STEPS or (last and not math.isfinite(record["loss"] + record["val_loss"])):
            kept = folders.last(options.folder / "checkpoint", before=step - bad)
            raise Diverged(f"The loss is {record['loss']} after step {step}; nothing was saved of it{kept}")
        if last or job.stopping:
            break
        if not bad and options.checkpoint_every and step % options.checkpoint_every == 0:
            job.save(step)
    return step, None if bad else job.save(step)


def finish(job: Job, log: Log, saved: Path | None) -> None:
    """Draw the picture and say what was done; the first rank's work."""
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    report.finish(log.records, job.options, job.corpus.name, parameters, job.ranks.size, saved)


def main(arguments: Sequence[str] | None = None, job: type[Job] = Job) -> int:
    """Run the job that the command line asks for; returns the exit status, of launch/endings.py."""

    def started() -> None:
        options = parse(arguments, job.kind)
        with joined_ranks(options.patience) as ranks:
            asked = Asked()
            asked.listen()  # from here on the ranks can tell each other
            run(job(options, ranks, asked))

    return endings.status_of(started)


if __name__ == "__main__":
    endings.process(main)
