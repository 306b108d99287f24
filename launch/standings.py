"""What a comparison ends with: one table and one picture of how far each setting got.

A setting is a run but for its seed; its curve is the mean over its seeds. AdamW's final loss, of the best AdamW with as
many steps on the same model and data, is the mark: how soon a setting passes it says more than the last digit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed, or opened
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from launch.records import Record
from launch.results import ARENA, arena, identity

UNITS = {"text": "nats per byte", "regression": "mean square error", "finetuning": "nats per byte"}
HEADINGS = (
    "setting",
    "final loss",
    "of each seed",
    "steps to AdamW's",
    "seconds to AdamW's",
    "optimizer ms/step, median (mean)",
    "state bytes per rank",
)
SIZES = tuple(key for key in ARENA if key not in ("task", "data"))
DASH = "–"  # noqa: RUF001
STRAIGHT = 10
"""How many lines differ by colour alone; those after them are dashed, then dotted."""


@dataclass(frozen=True)
class Setting:
    """The runs of one setting, ordered by seed."""

    label: str
    runs: tuple[Record, ...]

    @property
    def settings(self) -> Record:
        return self.runs[0]["settings"]

    @property
    def complete(self) -> bool:
        """Whether every seed reached the last step."""
        return all(run["status"] == "done" for run in self.runs)

    @property
    def curves(self) -> np.ndarray:
        """Evaluations of the seeds that reached the last step: seeds x evaluations x (step, seconds, loss)."""
        return np.array([run["evaluations"] for run in self.runs if run["status"] == "done"])

    @property
    def final(self) -> float:
        """Mean validation loss after the last step; infinite where a seed did not get there."""
        return float(self.curves[:, -1, 2].mean()) if self.complete else np.inf

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """Steps and seconds at which the mean curve first is at `loss` or below, between evaluations on a line."""
        if not self.complete:
            return None
        curve = self.curves.mean(axis=0)
        after = int(np.argmax(curve[:, 2] <= loss))
        if curve[after, 2] > loss:
            return None
        before = max(after - 1, 0)
        fall = curve[before, 2] - curve[after, 2]
        part = (curve[before, 2] - loss) / fall if fall else 0.0
        steps, seconds, _ = curve[before] + part * (curve[after] - curve[before])
        return float(steps), float(seconds)


def collect(records: Sequence[Record]) -> list[Setting]:
    """Group runs into settings, the best first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(identity(record["settings"], leave_out=["seed"]), []).append(record)
    differing = [key for key in SIZES if len({record["settings"][key] for record in records}) > 1]
    settings = []
    for group in groups.values():
        runs = tuple(sorted(group, key=lambda run: run["settings"]["seed"]))
        sizes = "".join(f", {key.replace('_', ' ')} {runs[0]['settings'][key]}" for key in differing)
        settings.append(Setting(runs[-1]["label"] + sizes, runs))
    return sorted(settings, key=lambda setting: setting.final)


def mark(setting: Setting, field: Sequence[Setting]) -> float | None:
    """The final loss of the best AdamW in `field` that ran where `setting` did; None if there is none."""
    rivals = (one for one in field if one.settings["optimizer"] == "adamw" and one.complete)
    return min((one.final for one in rivals if arena(one.settings) == arena(setting.settings)), default=None)


def table(settings: Sequence[Setting], field: Sequence[Setting]) -> str:
    """The standings in markdown; AdamW is looked for in `field`, which may hold more than is shown."""
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *(row(one, mark(one, field)) for one in settings)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", conditions(settings), ""])


def row(setting: Setting, target: float | None) -> tuple[str, ...]:
    """One line of the table."""
    reached = None if target is None else setting.reaches(target)
    timed = [run for run in setting.runs if "optimizer_seconds" in run]
    return (
        setting.label,
        f"{setting.final:.4g}" if setting.complete else DASH,
        ", ".join(outcome(run) for run in setting.runs),
        f"{reached[0]:.0f}" if reached else DASH,
        f"{reached[1]:.3g}" if reached else DASH,
        f"{mean(timed, 'optimizer_seconds'):.3g} ({mean(timed, 'optimizer_seconds_mean'):.3g})" if timed else DASH,
        f"{timed[0]['state_bytes']:,}" if timed else DASH,
    )


def mean(runs: Sequence[Record], name: str) -> float:
    """A time over all seeds, in milliseconds."""
    return 1000 * float(np.mean([run[name] for run in runs]))


def outcome(run: Record) -> str:
    """How a run ended: its loss, or what went wrong."""
    return f"{run['evaluations'][-1][2]:.4g}" if run["status"] == "done" else f"{run['status']} ({run['error']})"


def conditions(settings: Sequence[Setting]) -> str:
    """What was measured where; a table without it cannot be read."""
    runs = [run for setting in settings for run in setting.runs]
    task = runs[0]["settings"]["task"]
    sizes = ", ".join(f"{key.replace('_', ' ')} {listed(run['settings'][key] for run in runs)}" for key in SIZES)
    where = ", ".join(f"{key} {listed(run['machine'][key] for run in runs)}" for key in runs[0]["machine"])
    return (
        f"Task {task} ({UNITS[task]}, lower is better), best first. {sizes.capitalize()}, "
        f"seed {listed(run['settings']['seed'] for run in runs)}. Times are of one process; {where}; "
        f"torch {listed(run['versions']['torch'] for run in runs)}, "
        f"source of kl_dist {listed(run['versions']['kl_dist_source'] for run in runs)}."
    )


def listed(values: Iterable[object]) -> str:
    """The different values among `values`, in words."""
    return " or ".join(map(str, sorted(set(values), key=str)))


def draw(settings: Sequence[Setting], path: Path) -> None:
    """Write the picture: validation loss over steps and over seconds, a line a setting, a band from seed to seed."""
    shown = [setting for setting in settings if setting.complete]
    # The legend stands beside the panels, in the order in which the lines end, and hides none of them.
    figure, panels = plt.subplots(
        1, 2, figsize=(13, max(4.8, 0.24 * len(shown) + 1)), dpi=150, sharey=True, layout="constrained"
    )
    for number, setting in enumerate(shown):
        style = ("-", "--", ":", "-.")[number // STRAIGHT % 4]
        for axes, column in zip(panels, (0, 1), strict=True):
            curves = setting.curves
            over, losses = curves[:, :, column].mean(axis=0), curves[:, :, 2]
            color = f"C{number % STRAIGHT}"
            label = f"{setting.final:.4g}  {setting.label}"
            axes.plot(over, losses.mean(axis=0), style, color=color, linewidth=1.6, label=label)
            axes.fill_between(over, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.18, linewidth=0)
    for axes, name in zip(panels, ("step", "seconds of training"), strict=True):
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if shown:
        frame(panels[0], shown)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def frame(axes: Axes, shown: Sequence[Setting]) -> None:
    """Show the part of the losses in which settings differ: from an eighth of the way to the end."""
    means = [setting.curves.mean(axis=0) for setting in shown]
    # Where all seeds of a setting start is the ceiling: a line that rose above it may leave the picture.
    top = max(min(curve[0, 2], curve[curve[:, 0] >= curve[-1, 0] / 8][0, 2]) for curve in means)
    bottom = min(setting.curves[:, :, 2].min() for setting in shown)
    if top > 5 * bottom:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set_ylim(bottom / 1.1, top * 1.1)
    else:
        axes.set_ylim(bottom - 0.04 * (top - bottom), top + 0.04 * (top - bottom) + 1e-9)
    axes.set_ylabel(f"validation loss ({UNITS[shown[0].settings['task']]})")
