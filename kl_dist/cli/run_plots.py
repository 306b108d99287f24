"""The pictures of a run's page: what there is to draw, and how."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

Record = Mapping[str, Any]

WIDTH, HEIGHT = 6.4, 3.4  # inches of a plot; the page scales it
SHOWN = 24  # matrices that have a line of their own


class Plot(NamedTuple):
    """One picture of the page."""

    title: str
    says: str
    draw: Callable[[Any], None]  # onto matplotlib's axes


def plots(records: Sequence[Record]) -> Iterator[Plot]:
    """The pictures that there is something for."""
    steps = [record["step"] for record in records]
    yield Plot("Loss over steps", "Training at each step, validation where it was measured.", _losses(records, steps))
    if all("seconds" in record for record in records):
        clock = list(accumulate(record["seconds"] for record in records))
        yield Plot(
            "Loss over seconds",
            "Of training alone: validation and saves are not counted.",
            _losses(records, clock, "seconds"),
        )
    if all("lr" in record for record in records):
        yield Plot(
            "Learning rate", "Of the first parameter group.", _lines({"": (steps, [r["lr"] for r in records])}, "step")
        )
    if all({"seconds", "optimizer_seconds"} <= record.keys() for record in records):
        inside = [record["optimizer_seconds"] * 1e3 for record in records]
        outside = [record["seconds"] * 1e3 - mine for record, mine in zip(records, inside, strict=True)]
        series = {"forward, backward and the rest": (steps, outside), "optimizer": (steps, inside)}
        yield Plot(
            "Milliseconds of a step",
            "On the first rank; refreshes come every few steps.",
            _lines(series, "step", log=True),
        )
    yield from _of_the_optimizer(numbers_of(records))
    if memory := [(record["step"], record["memory"] / 2**20) for record in records if "memory" in record]:
        yield Plot(
            "Memory, MiB",
            "Peak of the first rank's process so far.",
            _lines({"": tuple(zip(*memory, strict=True))}, "step"),
        )


def _of_the_optimizer(numbers: Sequence[tuple[int, Record]]) -> Iterator[Plot]:
    if not numbers:
        return

    def over(key: str) -> tuple[list[int], list[float]]:
        pairs = [(step, said[key]) for step, said in numbers if said.get(key) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    yield Plot(
        "Update RMS",
        "Of all matrices' updates, before the learning rate: 0.2 to 0.3 in an ordinary run.",
        _lines({"": over("update_rms")}, "step"),
    )
    waits = {
        "waiting for exchanges": over("wait_seconds"),
        "updates": over("update_seconds"),
        "refreshing eigenbases": over("refresh_seconds"),
    }
    yield Plot(
        "Seconds so far",
        "Of the rank that took longest; what is hidden behind computing is not waited for.",
        _lines(waits, "step"),
    )
    left_out = {"skipped steps": over("skipped_steps"), "restarts of damaged state": over("restarts")}
    if any(value for _, values in left_out.values() for value in values):
        yield Plot(
            "Left out so far",
            "Steps whose gradients were not finite, and matrices whose state was damaged.",
            _lines(left_out, "step"),
        )
    hidden = over("communication_hidden")
    if hidden[0]:
        yield Plot(
            "Communication hidden",
            "Share of the time with an exchange in flight that was not waited for, over all ranks: 1 is all of it.",
            _lines({"": hidden}, "step"),
        )
    work = {"updates and refreshes, against the plan": over("work_as_run"), "refreshes": over("refresh_balance")}
    if any(value > 1 for _, values in work.values() for value in values):
        yield Plot(
            "Balance of work",
            "The slowest rank's share of the time over its planned share of flops; of refreshes its time over the mean:"
            " 1 is perfect.",
            _lines(work, "step"),
        )
    yield from _of_the_factors(numbers)


def _of_the_factors(numbers: Sequence[tuple[int, Record]]) -> Iterator[Plot]:
    steps, sides = [step for step, _ in numbers], _sides(numbers)
    if not sides:
        return

    def of_sides(kind: str) -> dict[str, Any]:
        return {
            name: (steps, [said["matrices"][matrix][f"{kind}.{side}"] for _, said in numbers])
            for name, matrix, side in sides
        }

    yield Plot(
        "Effective rank of factors",
        "exp of the entropy of the eigenvalues, a line for each side of a matrix.",
        _lines(of_sides("effective_rank"), "step", quiet=True),
    )
    yield Plot(
        "Condition of factors",
        "Largest over smallest eigenvalue.",
        _lines(of_sides("condition"), "step", log=True, quiet=True),
    )
    yield Plot(
        "Spectra",
        "Eigenvalues of unit mean over all sides: smallest, 10, 50, 90 % and largest, medians.",
        _spectra(numbers, sides),
    )


def numbers_of(records: Sequence[Record]) -> list[tuple[int, Record]]:
    """(step, what the optimizer said), where it did."""
    return [(record["step"], record["optimizer"]) for record in records if record.get("optimizer")]


def _sides(numbers: Sequence[tuple[int, Record]]) -> list[tuple[str, str, str]]:
    """(name, matrix, side) of factors that have a spectrum at every time; of many some, evenly chosen."""
    found = []
    for matrix, said in numbers[-1][1].get("matrices", {}).items():
        for key in said:
            kind, _, side = key.partition(".")
            there = all(key in earlier.get("matrices", {}).get(matrix, {}) for _, earlier in numbers)
            if kind == "effective_rank" and there:
                found.append((f"{matrix}, side {side}", matrix, side))
    return found[:: max(1, math.ceil(len(found) / SHOWN))]


def _losses(records: Sequence[Record], at: Sequence[float], called: str = "step") -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        axes.plot(at, [record["loss"] for record in records], color="#9ecae1", linewidth=0.9, label="training")
        there = [
            (x, record["val_loss"]) for x, record in zip(at, records, strict=True) if record.get("val_loss") is not None
        ]
        if there:
            axes.plot(
                *zip(*there, strict=True), color="#d94801", marker="o", markersize=3, linewidth=1.2, label="validation"
            )
        axes.set_xlabel(called)
        axes.legend(frameon=False)

    return draw


def _lines(series: Mapping[str, Any], called: str, log: bool = False, quiet: bool = False) -> Callable[[Any], None]:
    """Lines by name; `quiet` says no names, of which there are many."""

    def draw(axes: Any) -> None:
        for name, (x, y) in series.items():
            axes.plot(x, y, linewidth=1.1, label=name or None, alpha=0.7 if quiet else 1.0)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel(called)
        if any(series) and not quiet:
            axes.legend(frameon=False)

    return draw


def _spectra(numbers: Sequence[tuple[int, Record]], sides: Sequence[tuple[str, str, str]]) -> Callable[[Any], None]:
    steps = [step for step, _ in numbers]
    by_step = [[said["matrices"][matrix][f"eigenvalues.{side}"] for _, matrix, side in sides] for _, said in numbers]
    low, tenth, middle, ninetieth, high = (
        [median(values[k] for values in spectra) for spectra in by_step] for k in range(5)
    )

    def draw(axes: Any) -> None:
        axes.fill_between(steps, low, high, color="#deebf7", label="all")
        axes.fill_between(steps, tenth, ninetieth, color="#9ecae1", label="10 to 90 %")
        axes.plot(steps, middle, color="#08519c", linewidth=1.3, label="median")
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.legend(frameon=False)

    return draw


def svg_of(plot: Plot) -> str:
    """The picture, to stand within a page: text as text, without a fixed size."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.title, "font.size": 9}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        plot.draw(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    label = html.escape(plot.title, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
