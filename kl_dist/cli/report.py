"""`kl-shampoo report RUN`: what a run recorded, as one page that needs nothing else.

RUN is a folder with a metrics.jsonl, a line of JSON a step, as the jobs of launch/ write it: `step`, `loss`, `lr`,
`seconds` and `optimizer_seconds` of the step, and now and then `val_loss`, `optimizer` (KLShampoo.stats(all_ranks=True,
matrices=True)) and `memory` (peak bytes of the first rank). What is not there is left out of the page.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from kl_dist.cli.run_plots import Record, numbers_of, plots, svg_of

METRICS = "metrics.jsonl"

STYLE = """
:root { color-scheme: light; --ink: #1b1b1f; --soft: #5b5b66; --line: #dcdce4; }
body { margin: 0 auto; padding: 1rem clamp(0.75rem, 3vw, 2.5rem); max-width: 84rem; color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; background: #fff; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 0 0 0.25rem; }
.plots { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: 0.75rem; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; } figcaption, .soft { color: var(--soft); font-size: 0.875rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(45%, 11rem), 1fr)); gap: 0.5rem 1.5rem;
     margin: 1rem 0; }
dt { color: var(--soft); font-size: 0.8rem; } dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.875rem; margin-top: 1rem; }
td, th { text-align: right; padding: 0.2rem 0.7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
"""


def write(run: Path, out: Path | None = None) -> Path:
    """Make the page of a run, at `out` or report.html in its folder; returns where it is.

    Raises:
        ValueError: there is no metrics.jsonl, nothing in it, or a line that is none.
    """
    records = read(run / METRICS)
    out = out or run / "report.html"
    out.write_text(page(run.resolve().name, records), encoding="utf-8")
    return out


def read(path: Path) -> list[Record]:
    """The lines of a run; the last may be cut short, by a run that is still writing it.

    Raises:
        ValueError: as `write`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        raise ValueError(f"{path} cannot be read ({problem.strerror}): give the folder of a run of launch/") from None
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"]), "loss": float(record["loss"])})
        except (ValueError, TypeError, KeyError) as problem:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is no step's record ({problem!r})") from None
    if not records:
        raise ValueError(f"{path} has no step in it yet")
    return records


def page(name: str, records: Sequence[Record]) -> str:
    """All of it, as HTML."""
    figures = "".join(
        f"<figure><h2>{html.escape(plot.title)}</h2>{svg_of(plot)}<figcaption>{html.escape(plot.says)}</figcaption></figure>"
        for plot in plots(records)
    )
    facts = "".join(
        f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in summary(records).items()
    )
    title = html.escape(f"{name}: {len(records):,} steps")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1><dl>{facts}</dl>"
        f'<div class="plots">{figures}</div>{_table(records)}</body></html>\n'
    )


def summary(records: Sequence[Record]) -> dict[str, str]:
    """What one would ask first."""
    last = records[-1]
    validated = [record for record in records if record.get("val_loss") is not None]
    found = {"step": f"{last['step']:,}", "training loss": f"{last['loss']:.4f}"}
    if validated:
        best = min(validated, key=lambda record: record["val_loss"])
        found["validation loss"] = f"{validated[-1]['val_loss']:.4f}"
        found["best validation loss"] = f"{best['val_loss']:.4f} at step {best['step']:,}"
    if seconds := [record["seconds"] for record in records if "seconds" in record]:
        found["step, median"] = f"{median(seconds) * 1e3:,.1f} ms"
        inside = [
            record["optimizer_seconds"] / record["seconds"] for record in records if "optimizer_seconds" in record
        ]
        if inside:
            found["of it in the optimizer"] = f"{median(inside):.0%}"
        found["training, together"] = f"{sum(seconds):,.0f} s"
    if numbers := numbers_of(records):
        said = numbers[-1][1]
        found["skipped steps"] = f"{said['skipped_steps']:,}"
        found["restarts of state"] = f"{said.get('restarts', 0):,}"
        found["refreshes"] = f"{said['refreshes']:,}"
    if memory := [record["memory"] for record in records if "memory" in record]:
        found["memory at its peak"] = f"{max(memory) / 2**20:,.0f} MiB"
    return found


def _table(records: Sequence[Record]) -> str:
    """The matrices at the end of the run."""
    numbers = numbers_of(records)
    matrices = numbers[-1][1].get("matrices", {}) if numbers else {}
    if not matrices:
        return ""
    heads = ("matrix", "update RMS", "weight RMS", "effective ranks", "conditions")
    rows = []
    for name, said in matrices.items():
        ranks = [f"{value:,.1f}" for key, value in said.items() if key.startswith("effective_rank.")]
        conditions = [f"{value:.1e}" for key, value in said.items() if key.startswith("condition.")]
        update = f"{said['update_rms']:.3f}" if "update_rms" in said else ""
        rows.append((name, update, f"{said['weight_rms']:.3f}", ", ".join(ranks), ", ".join(conditions)))
    head = "".join(f"<th>{word}</th>" for word in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
