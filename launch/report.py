"""The end of a run: the loss curve as a picture, and a few plain sentences."""

import math
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed, or opened
from matplotlib import pyplot as plt

from launch.options import Options
from launch.records import Record

NATS_PER_BIT = math.log(2)
REACH = 10
"""How many steps to either side the smoothed training loss averages over."""


def smoothed(values: list[float]) -> list[float]:
    """The mean of each value's neighbours; equally many on both sides at the start, where the loss falls fast."""
    reaches = (min(REACH, at) for at in range(len(values)))
    return [fmean(values[at - reach : at + reach + 1]) for at, reach in enumerate(reaches)]


def draw(records: list[Record], options: Options, text: str, path: Path) -> None:
    """Write the loss curve of a run to `path`."""
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    validated = [record for record in records if "val_loss" in record]

    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(steps, smoothed(losses), color="#2171b5", linewidth=1.8, label="training, smoothed")
    axes.plot(
        [record["step"] for record in validated],
        [record["val_loss"] for record in validated],
        color="#d94801",
        marker="o",
        markersize=4.5,
        linewidth=1.2,
        label="validation",
    )
    last = validated[-1]
    axes.annotate(
        f"{last['val_loss']:.3f}",
        (last["step"], last["val_loss"]),
        xytext=(0, 9),
        textcoords="offset points",
        ha="right",
        color="#d94801",
    )
    axes.set_title(f"{options.optimizer}, learning rate {options.rates.lr:g}, on {text}", fontsize=11)
    axes.set_xlabel(f"step ({options.tokens_per_step:,} bytes of text each)")
    axes.set_ylabel("loss (nats per byte)")
    bits = axes.secondary_yaxis(
        "right", functions=(partial(np.multiply, 1 / NATS_PER_BIT), partial(np.multiply, NATS_PER_BIT))
    )
    bits.set_ylabel("bits per byte")
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def finish(records: list[Record], options: Options, text: str, parameters: int, ranks: int, saved: Path | None) -> None:
    """Draw the picture, where there is room for it, and say what was done, and where it is."""
    picture = options.folder / "loss.png"
    try:
        draw(records, options, text, picture)
    except OSError as error:
        print(f"The loss curve could not be drawn: {error.strerror or error}", file=sys.stderr)
    print(closing_words(records, options, text, parameters, ranks))
    metrics, board = options.folder / "metrics.jsonl", options.folder / "tensorboard"
    print(f"Loss curve  {picture}\nMetrics     {metrics}, and TensorBoard's in {board}")
    if saved is not None:
        print(f"Checkpoint  {saved}")
    other = "kl_shampoo" if options.optimizer == "adamw" else "adamw"
    print(f"\nTo compare, run the same with --optimizer {other}.")


def closing_words(records: list[Record], options: Options, text: str, parameters: int, ranks: int) -> str:
    """What was trained and how well, in plain words."""
    last = records[-1]
    seconds = sum(record["seconds"] for record in records)
    in_optimizer = sum(record["optimizer_seconds"] for record in records)
    processes = "1 process" if ranks == 1 else f"{ranks} processes"
    return (
        f"\nTrained a byte-level GPT of {parameters:,} parameters with {options.optimizer} on {text}: "
        f"{last['step']:,} steps, {last['tokens']:,} bytes seen, {spoken(seconds)} on {processes} "
        f"({in_optimizer / seconds:.0%} of it in the optimizer).\n"
        f"Validation loss {last['val_loss']:.4f} nats per byte, that is {last['val_loss'] / NATS_PER_BIT:.3f} bits per "
        "byte, on files it was not trained on; a guess that knows nothing needs 8.\n"
    )


def spoken(seconds: float) -> str:
    """A duration for people: `42 seconds`, `3 min 5 s`."""
    whole = round(seconds)
    return f"{whole} seconds" if whole < 60 else f"{whole // 60} min {whole % 60} s"
