"""The command `kl-shampoo` and its subcommands."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kl_dist.ranges import nearest

EXTRA = "kl-shampoo needs its extra: pip install 'kl-shampoo[plan]'"
OF_EXTRA = ("jsonargparse", "matplotlib", "rich")


def main(argv: Sequence[str] | None = None) -> None:
    """The console script: exit status 2 and one line for what cannot be done."""
    try:
        given = _given(sys.argv[1:] if argv is None else argv)
        _plan(given.plan) if given.command == "plan" else _report(given.report)
    except ModuleNotFoundError as missing:  # each subcommand imports what it needs, and no more
        if missing.name not in OF_EXTRA:
            raise
        raise SystemExit(f"{EXTRA} ({missing})") from None
    except (ValueError, TypeError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None


def _given(words: Sequence[str]) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="kl-shampoo", description="Distributed KL-Shampoo, before and after a run.")
    commands = parser.add_subcommands(required=True, dest="command")
    made = {"plan": _plan_parser(), "report": _report_parser()}
    commands.add_subcommand("plan", made["plan"], help="who does what at a world size, what it takes, and how long")
    commands.add_subcommand("report", made["report"], help="what a run recorded, as one page of HTML")
    if words and words[0] in made:
        _refuse_unknown_flags(words, re.findall(r"--[a-z-]+", made[words[0]].format_usage()))
    return parser.parse_args(words)


def _refuse_unknown_flags(words: Sequence[str], known: Sequence[str]) -> None:
    """Name the flag that was probably meant; the parser would only repeat the mistake, or guess."""
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in ("--help", *known):
            raise ValueError(f"{flag} is no option of {words[0]}{nearest(flag, known, str)}; --help lists them")


def _plan_parser() -> Any:
    from jsonargparse import ArgumentParser

    from kl_dist.cli.machine import PRESETS
    from kl_dist.cli.models import BUILT_IN, DTYPES

    parser = ArgumentParser(description="What KLShampoo would do for a model over a world of ranks.")
    named = f"{', '.join(BUILT_IN)}; module:factory, called on the meta device; or a config.json of Hugging Face's"
    parser.add_argument("model", type=str, help=named)
    parser.add_argument("--world", type=int, default=8, help="ranks")
    parser.add_argument("--layout", type=str, default="ddp", help="ddp, fsdp2, or hsdp:RxS: R replicas of S ranks")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of parameters that are shapes alone")
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of KLShampoo; may be repeated"
    )
    parser.add_argument("--machine", choices=[*PRESETS, "cpu"], default="h100", help="cpu: this one, measured now")
    parser.add_argument("--flops", type=float | None, help="of matrix products, per second and rank")
    parser.add_argument("--memory-bandwidth", type=float | None, help="bytes per second of a rank's memory")
    parser.add_argument("--bandwidth", type=float | None, help="bytes per second that a rank sends to other nodes")
    parser.add_argument("--bandwidth-within", type=float | None, help="the same to ranks of its node")
    parser.add_argument("--latency", type=float | None, help="seconds of an exchange beside its bytes")
    parser.add_argument("--largest", type=int, default=4096, help="ranks, where growth is shown up to")
    parser.add_argument("--png", type=str | None, help="draw it, too")
    return parser


def _report_parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description="A page that needs nothing else: losses, spectra, who waits for what.")
    parser.add_argument("run", type=str, help="folder of a run, with its metrics.jsonl")
    parser.add_argument("--out", type=str | None, help="by default report.html in that folder")
    return parser


def _report(given: Any) -> None:
    from kl_dist.cli import report

    print(report.write(Path(given.run), None if given.out is None else Path(given.out)))


def _plan(given: Any) -> None:
    import matplotlib  # noqa: F401 (missing, it is said before anything is counted, and without a picture too)

    from kl_dist.cli import plan
    from kl_dist.cli.models import DTYPES, model_of

    question = plan.Question(
        model_of(given.model),
        given.world,
        plan.Layout.of(given.layout),
        DTYPES[given.dtype],
        given.ranks_per_node,
        dict(map(_option, given.set)),
    )
    rates = {"flops": given.flops, "memory": given.memory_bandwidth, "latency": given.latency}
    rates |= {"within": given.bandwidth_within, "between": given.bandwidth}
    plan.run(question, given.machine, rates, given.largest, None if given.png is None else Path(given.png))


def _option(said: str) -> tuple[str, Any]:
    """OPTION=VALUE, the value as Python writes it, or a word."""
    name, equals, value = said.partition("=")
    if not equals:
        raise ValueError(f"--set takes OPTION=VALUE, not {said!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    main()
