"""A forecast as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kl_dist.cli.advice import Advice
from kl_dist.cli.forecast import Forecast
from kl_dist.cli.machine import Machine
from kl_dist.cli.models import Model
from kl_dist.planning.plan import Plan

BOUND_BY = {
    "products": "products of matrices",
    "refreshes": "refreshes",
    "memory": "memory traffic",
    "host": "the host",
    "within": "bytes within a node",
    "between": "bytes between nodes",
    "latency": "latency of exchanges",
}


def amount(number: float, unit: str, base: int = 1000) -> str:
    """A number with the prefix that leaves it one to four digits: 1.92 GB, 0.46 ms."""
    binary = "i" if base == 1024 else ""
    for prefix in ("T", "G", "M", "k"):
        size = base ** {"k": 1, "M": 2, "G": 3, "T": 4}[prefix]
        if number >= size:
            return f"{number / size:.3g} {prefix.upper() if binary else prefix}{binary}{unit}"
    return f"{number:.3g} {unit}"


def nbytes(number: float) -> str:
    return amount(number, "B", 1024)


def seconds(number: float) -> str:
    return f"{number:.3g} s" if number >= 1 else f"{1e3 * number:.3g} ms"


def _table(title: str, *columns: str) -> Table:
    found = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1))
    for i, column in enumerate(columns):
        found.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return found


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width
        console.width = 120
    title, table.title = table.title or "", None  # a table folds it to its own width
    console.print(title, style="bold")
    console.print(table)


def show(
    model: Model, plan: Plan, layout: str, on: Machine, found: Forecast, turns: Sequence[tuple[int, float]]
) -> None:
    """What one rank has to do and to hold: of ranks, the one that has most."""
    matrices = sum(owner is not None for owner in plan.owners)
    groups = found.world_size // found.partition_size
    title = f"{model.name}: {model.numel / 1e9:.3g} billion parameters, {matrices:,} matrices, {layout},"
    title += f" {found.world_size:,} rank{'s' * (found.world_size > 1)}"
    title += f" in {groups:,} groups of {found.partition_size:,}" if groups > 1 else ""
    table = _table(title, "of the rank that has most", "", "time")
    part = found.seconds
    table.add_row("optimizer state", nbytes(found.state_bytes), "")
    table.add_row("temporary memory, buffers included", nbytes(found.temporary_bytes), "")
    table.add_row("products of matrices, a step", amount(found.work.products, "flop"), seconds(part.products))
    table.add_row(
        f"refreshes, one step of {found.every}",
        amount(found.work.refresh / found.every, "flop"),
        seconds(part.refreshes),
    )
    table.add_row("memory traffic", nbytes(found.work.moved), seconds(part.memory))
    if part.host:
        table.add_row("host, whatever is computed", "", seconds(part.host))
    table.add_row("sent within a node", nbytes(found.within_bytes), seconds(part.within))
    table.add_row("sent between nodes", nbytes(found.between_bytes), seconds(part.between))
    table.add_row("latency of exchanges, and of the agreement", "", seconds(part.latency + part.agreement))
    table.add_row("[bold]a step of the optimizer[/bold]", "", f"[bold]{seconds(found.step_seconds)}[/bold]")
    table.add_row("bound by", BOUND_BY[part.bound], "")
    table.add_row("balance (max / mean of cost)", f"{found.balance:.3f}", "")
    table.add_row("padding of what is sent", f"{100 * found.padding:.1f} %", "")
    table.add_row("ranks of a group without a matrix", f"{found.idle:,}", "")
    _print(table)
    _print_schedule(turns)
    print(f"on: {on.name}")
    print()


def _print_schedule(turns: Sequence[tuple[int, float]]) -> None:
    counts = [count for count, _ in turns]
    most = max((load for _, load in turns), default=1.0)
    spread = f"{min(counts):,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"
    print(
        f"refreshes: T = {len(turns)}, {spread} of {sum(counts):,} matrices in a step; the most that a rank has in one"
        f" is {most:.2f} times the mean"
    )


def show_growth(found: Sequence[Forecast], asked: int) -> None:
    """How each number grows over worlds; the one that was asked for stands out."""
    columns = ("ranks", "groups of", "state", "temporary", "flop", "within", "between", "balance", "padding", "step")
    table = _table("over more and fewer ranks", *columns, "bound by")
    for one in found:
        work = one.work.products + one.work.refresh / one.every
        cells = [f"{one.world_size:,}", f"{one.partition_size:,}", nbytes(one.state_bytes)]
        cells += [nbytes(one.temporary_bytes), amount(work, ""), nbytes(one.within_bytes), nbytes(one.between_bytes)]
        cells += [f"{one.balance:.2f}", f"{100 * one.padding:.0f} %", seconds(one.step_seconds), one.seconds.bound]
        table.add_row(*cells, style="bold" if one.world_size == asked else None)
    _print(table)


def show_advice(found: Sequence[Advice], today: Forecast) -> None:
    """What would help, or that nothing that is known would."""
    if not found:
        print("no option that is tried here saves a twentieth of a step's time or of a rank's state")
        return
    table = _table("what would help", "option", "a step", "", "state", "", "learning")
    for one in found:
        table.add_row(
            one.change.said,
            seconds(one.forecast.step_seconds),
            f"{100 * one.faster:.0f} %",
            nbytes(one.forecast.state_bytes),
            f"{100 * one.smaller:.0f} %",
            one.change.learning,
        )
    _print(table)
