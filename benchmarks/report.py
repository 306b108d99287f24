"""What was measured as a table, as lines of JSON, and as a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.timing import Runner, amortised
from kl_dist import METHODS

Line = dict[str, Any]


def machine() -> Line:
    """Processor, cores, GPU and versions, so that a number can be read years later."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def lines_of(runners: Sequence[Runner], failed: Mapping[str, str], common: Line) -> list[Line]:
    """One line per contender, raw seconds of every step in it; one with `error` for each that is missing."""
    lines = [
        {
            **common,
            "contender": runner.contender.name,
            "note": runner.contender.note,
            "state_ratio": round(runner.state_ratio, 4),
            "cpu": {kind: samples.cpu for kind, samples in runner.samples.items()},
            "wall": {kind: samples.wall for kind, samples in runner.samples.items()},
        }
        for runner in runners
    ]
    return lines + [{**common, "contender": name, "error": reason} for name, reason in failed.items()]


def append(lines: Sequence[Line], path: Path) -> None:
    """Add lines to a file of JSON lines; what is there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def table(lines: Sequence[Line], every: Sequence[int], against: str, clock: str) -> str:
    """A markdown table of one clock, "cpu" or "wall": milliseconds, median (least to most), and ratios to `against`."""
    timed = [line for line in lines if "error" not in line]
    base = next((line for line in timed if line["contender"] == against), None)
    ratios = [] if base is None else [f"T = {T}, of {against}" for T in every]
    header = ["contender", "plain", "refresh adds", *(f"T = {T}" for T in every), *ratios, "state / parameters"]
    rows = [header, ["---"] * len(header)]
    for line in timed:
        seconds = line[clock]
        costs = [amortised(seconds, T) for T in every]
        row = [line["contender"], *_parts(seconds), *(f"{1e3 * cost:.1f}" for cost in costs)]
        if base is not None:
            row += [f"{cost / amortised(base[clock], T):.2f}" for cost, T in zip(costs, every, strict=True)]
        rows.append([*row, f"{line['state_ratio']:.2f}"])
    for line in lines:
        if "error" in line:
            what = "not installed" if line["error"].startswith(("ImportError", "ModuleNotFound")) else "failed"
            rows.append([line["contender"], what, *[""] * (len(header) - 2)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _parts(seconds: Mapping[str, Sequence[float]]) -> list[str]:
    """The columns "plain" and "refresh adds"; what refreshes at each step has no plain one to tell apart."""
    if "plain" not in seconds:
        return ["every step refreshes:", _spread(seconds["refresh"], 0.0)]
    plain = median(seconds["plain"])
    return [_spread(seconds["plain"], 0.0), _spread(seconds["refresh"], plain) if "refresh" in seconds else "none"]


def _spread(seconds: Sequence[float], less: float) -> str:
    low, middle, high = (1e3 * (x - less) for x in (min(seconds), median(seconds), max(seconds)))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def plot(lines: Sequence[Line], every: Sequence[int], clock: str, title: str, path: Path) -> None:
    """Stacked bars, plain + refresh / T, one panel per T, cheapest at the top in the last; this project's in bold.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = sorted((line for line in lines if "error" not in line), key=lambda line: -amortised(line[clock], every[-1]))
    names = [line["contender"] for line in timed]
    figure = Figure(figsize=(4 + 3 * len(every), 1.2 + 0.36 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(every), sharey=True, squeeze=False)[0]
    for axis, T in zip(axes, every, strict=True):
        total = [1e3 * amortised(line[clock], T) for line in timed]
        plain = [1e3 * median(line[clock]["plain"]) if "plain" in line[clock] else 0.0 for line in timed]
        refresh = [whole - part for whole, part in zip(total, plain, strict=True)]
        axis.barh(names, plain, color="#4c78a8", label="plain")
        axis.barh(names, refresh, left=plain, color="#f2a65a", label="refresh / T")
        for row, whole in enumerate(total):
            axis.text(whole, row, f" {whole:.0f}", va="center", fontsize=8)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_title(f"T = {T}", fontsize=10)
        axis.set_xlim(0, 1.18 * max(total))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].tick_params(axis="y", labelsize=9)
    for label in axes[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in METHODS else "normal")
    axes[-1].legend(loc="upper right", fontsize=8, frameon=False)
    figure.supxlabel(f"milliseconds a step ({'process CPU time' if clock == 'cpu' else 'wall time'})", fontsize=9)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
