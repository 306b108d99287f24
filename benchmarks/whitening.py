"""How far the whitened momentum is from orthogonal over a run, and how much of the gradient is signal.

    python -m benchmarks.whitening --optimizer kl_shampoo --lr 1.5e-2 --set polar=0 --tokens-per-step 8192 --steps 400
    python -m benchmarks.whitening --draw docs/whitening.png

The first trains as launch/train.py does, with KL-Shampoo or kl_muon, looks at every tenth step and adds a line to the
results; the second draws all lines. Each look is a mean over the blocks of the matrices that the method serves:

    signal      <g1, g2> / |g|^2, with g1 and g2 the gradients of the two halves of the batch and g their mean: what a
                larger batch would leave of the squared gradient
    rms         of U, the update before the learning rate
    evenness    mean(s) / RMS(s) of U's singular values s: 1 if U is orthogonal, 0.85 if its entries are independent
                noise, 1 / sqrt(d) if it has rank one; the cosine between U and its polar factor
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import report
from kl_dist.methods import Hyper, add_rule, averages, rule
from kl_dist.methods.state import MatrixState
from launch.endings import status_of
from launch.options import METHOD_OF, Options, UsageError, parse
from launch.ranks import joined_ranks
from launch.train import Job

RESULTS = Path(__file__).parent / "results" / "whitening.jsonl"
EVERY = 10
WATCHED = "watched"
MEASURES = {"signal": "signal's share", "rms": "update's RMS", "evenness": "evenness of its singular values"}


class Watch:
    """A method's update, of which some steps are looked at."""

    def __init__(self, method: str) -> None:
        self.update = rule(method, "fresh").update
        self.looking = False
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, state: MatrixState, grad: Tensor, hyper: Hyper, spare: Tensor) -> Tensor:
        update = self.update(state, grad, hyper, spare)
        if self.looking and update.ndim == 3:
            values = torch.linalg.svdvals(update)
            rms = values.square().mean(-1).sqrt()
            self.seen.append((averages.mean_square(update).sqrt(), values.mean(-1) / rms))
        return update

    def means(self) -> tuple[float, float]:
        """RMS and evenness since the last call, mean over blocks."""
        rms, evenness = (torch.cat(parts).mean().item() for parts in zip(*self.seen, strict=True))
        self.seen.clear()
        return rms, evenness


def signal(job: Job, step: int) -> float:
    """The signal's share of the blocks' squared gradient at this step's batch, mean over matrices."""
    rows = job.rows(step)
    halves = []
    for half in rows.chunk(2):
        job.trainer.zero_grad()
        job.loss(job.model, job.corpus.train, half).backward()
        halves.append([p.grad.clone() for p in job.model.blocks.parameters() if p.ndim == 2 and p.grad is not None])
    shares = [torch.sum(a * b) / torch.square((a + b) / 2).sum() for a, b in zip(*halves, strict=True)]
    return torch.stack(shares).mean().item()


def look(options: Options, watch: Watch) -> report.Line:
    """One run's measures, a list each, by step; the loss of the same batches and the validation loss at the end."""
    found: dict[str, list[float]] = {name: [] for name in ("step", "loss", *MEASURES)}
    with joined_ranks() as ranks:
        job = Job(options, ranks)
        for step in range(1, options.steps + 1):
            watch.looking = step % EVERY == 0 or step == 1
            share = signal(job, step) if watch.looking else 0.0
            loss = job.train_step(step)["loss"]
            if watch.looking:
                rms, evenness = watch.means()
                for name, value in zip(found, (step, loss, share, rms, evenness), strict=True):
                    found[name].append(round(value, 5))
        return {**found, "validation_loss": round(job.validate(), 4)}


def draw(lines: Sequence[report.Line], path: Path) -> None:
    """A panel per measure over steps; a colour per batch, dashed where the method is not KL-Shampoo."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(MEASURES))
    batches = sorted({line["tokens_per_step"] for line in lines})
    colours = dict(zip(batches, ("#f2a65a", "#4c78a8", "#54356b", "#b23a48"), strict=False))
    for axis, (name, title) in zip(axes, MEASURES.items(), strict=True):
        for line in sorted(lines, key=lambda line: (line["optimizer"], line["tokens_per_step"])):
            style = "-" if line["optimizer"] == "kl_shampoo" else "--"
            colour = colours[line["tokens_per_step"]]
            label = f"{line['optimizer']}, {line['tokens_per_step']:,} bytes"
            axis.plot(line["step"], line[name], style, color=colour, label=label, linewidth=1.4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(0, color="#888888", linewidth=0.8)
    axes[-1].axhline(0.85, color="#888888", linewidth=0.8)
    axes[-1].annotate("independent noise", (0, 0.85), xytext=(2, 3), textcoords="offset points", fontsize=8)
    axes[-1].set_ylim(0, 1.02)
    axes[-1].legend(fontsize=8, frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make one run a line of the results, or draw them all."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--draw" in given:
        draw([json.loads(line) for line in RESULTS.read_text().splitlines()], Path(given[given.index("--draw") + 1]))
        return
    asked: Options = parse(given)
    if asked.optimizer not in ("kl_shampoo", "kl_muon"):
        raise UsageError(f"it looks at kl_shampoo and kl_muon, not at {asked.optimizer}")
    watch = Watch(METHOD_OF[asked.optimizer])
    add_rule(METHOD_OF[asked.optimizer], WATCHED, rule(METHOD_OF[asked.optimizer], "fresh")._replace(update=watch))
    options: Options = parse([*given, "--recipe", WATCHED])
    arena = {name: getattr(options, name) for name in ("optimizer", "tokens_per_step", "steps", "lr", "seed")}
    line = {**report.machine(), "job": given, **arena, **look(options, watch)}
    report.append([line], RESULTS)
    for name in MEASURES:
        print(name, *(f"{step}: {value:.3f}" for step, value in zip(line["step"], line[name], strict=True)), sep="  ")


if __name__ == "__main__":
    sys.exit(status_of(main))
