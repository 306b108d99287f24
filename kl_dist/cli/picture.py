"""A forecast as a picture: what a step's time is made of, and how time, memory and bytes change with the world."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kl_dist.cli.forecast import Forecast
from kl_dist.cli.machine import Machine

PARTS = ("products", "refreshes", "memory", "within", "between", "latency", "host")
COLOURS = ("#1b6ca8", "#6aaed6", "#bdd7e7", "#e6862a", "#c4421a", "#8c8c8c", "#3f7f3f")


def draw(model: str, layout: str, on: Machine, today: Forecast, growth: Sequence[Forecast], png: Path) -> None:
    """Write the picture to `png`."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{model}, {layout}, the optimizer's part of a step on {on.name.split(',')[0]}")
    (time, memory), (sent, balance) = figure.subplots(2, 2)
    ranks = [one.world_size for one in growth]
    names = [f"{one:,}" for one in ranks]
    place = range(len(ranks))

    for part, colour in zip(PARTS, COLOURS, strict=True):
        values = [1e3 * getattr(one.seconds, part) or math.nan for one in growth]  # a logarithm has no 0
        if not all(map(math.isnan, values)):
            time.plot(place, values, ".-", color=colour, label=part)
    time.plot(place, [1e3 * one.step_seconds for one in growth], "k.-", label="a step, overlapped")
    time.set_yscale("log")
    time.yaxis.set_major_formatter("{x:g}")
    time.set_ylabel("ms")
    time.legend(fontsize="small", frameon=False, ncols=2)
    time.set_title("a step's time, and its parts")

    memory.plot(place, [one.state_bytes / 2**30 for one in growth], ".-", label="state", color=COLOURS[0])
    memory.plot(place, [one.temporary_bytes / 2**30 for one in growth], ".-", label="temporary", color=COLOURS[3])
    memory.set_ylabel("GiB a rank")
    memory.set_yscale("log", base=2)
    memory.yaxis.set_major_formatter("{x:g}")
    memory.legend(fontsize="small", frameon=False)
    memory.set_title("memory of the rank that has most")

    sent.plot(place, [one.within_bytes / 2**30 for one in growth], ".-", label="within a node", color=COLOURS[3])
    sent.plot(place, [one.between_bytes / 2**30 for one in growth], ".-", label="between nodes", color=COLOURS[4])
    sent.set_ylabel("GiB a rank and step")
    sent.legend(fontsize="small", frameon=False)
    sent.set_title("what is sent")

    balance.plot(place, [one.balance for one in growth], ".-", label="balance (max / mean)", color=COLOURS[0])
    balance.plot(place, [1 + one.padding for one in growth], ".-", label="1 + padding", color=COLOURS[5])
    balance.set_ylim(0.95, max(1.25, 1.05 * max(max(one.balance, 1 + one.padding) for one in growth)))
    balance.legend(fontsize="small", frameon=False)
    balance.set_title("how even it is")

    for axes in (time, memory, sent, balance):
        axes.set_xticks(list(place), names, rotation=45, ha="right", fontsize="small")
        axes.set_xlabel("ranks")
        axes.spines[["top", "right"]].set_visible(False)
        if today.world_size in ranks:
            axes.axvline(ranks.index(today.world_size), color="#cccccc", zorder=0, linewidth=6)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
