"""Whether DeepSpeed's stages train alike, and what a step costs there: KL-Shampoo, and DeepSpeed's Muon and AdamW.

    OMP_NUM_THREADS=1 python -m benchmarks.deepspeed             two processes, ZeRO 0 to 3, three runs of each
    python -m benchmarks.deepspeed --ranks 3 --stages 1 3        three processes, some of the stages

A byte-level GPT in float32, gradients clipped by DeepSpeed. `difference` is a parameter's largest relative distance
from the run at the first stage that is not 0; what rounding makes of it, runs there with noise on the gradients say,
the farthest of them. `sent` is what our optimizer communicates, counted in its step; what DeepSpeed sends by itself is
counted for nobody. Process CPU time is of a whole step, the model's part included.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report
from launch.data import load_corpus, training_starts, windows
from launch.model import GPT
from tests.counting import Counter

Weights = dict[str, Tensor]
RESULTS = Path(__file__).parent / "results"
WINDOWS, CONTEXT = 12, 64  # of a step, over all ranks
NOISE = 1e-7  # relative, on all gradients
ADAM = {"torch_adam": True}  # DeepSpeed's FusedAdam is for GPUs
CONTENDERS: dict[str, dict[str, Any]] = {
    "KLShampoo": {"lr": 1e-2, "adamw_lr": 5e-3, "weight_decay": 0.01, "output_head": "head.lm_head"},
    "Muon": {"muon_lr": 2e-2, "adam_lr": 5e-3, "lr": 5e-3, "weight_decay": 0.01, **ADAM},
    "AdamW": {"lr": 5e-3, "weight_decay": 0.01, **ADAM},
}
COLUMNS = (
    ("difference", "difference", "{:.1e}", 1.0),
    ("seconds", "CPU ms/step", "{:.0f}", 1e3),
    ("state", "state, MB", "{:.2f}", 1e-6),
    ("sent", "sent, MB/step", "{:.2f}", 1e-6),
)


def model_of(args: argparse.Namespace) -> GPT:
    """The modules that are no matrices to either are called as DeepSpeed's Muon wants it, which goes by names."""
    torch.manual_seed(0)
    model = GPT(args.layers, args.width, 4, CONTEXT)
    for name, called in (("tokens", "embed"), ("positions", "embed"), ("head", "lm_head")):
        setattr(model, name, nn.Sequential(OrderedDict({called: getattr(model, name)})))
    return model


def config_of(contender: str, stage: int, args: argparse.Namespace) -> dict[str, Any]:
    # Muon refuses reduce_scatter at stage 3
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_scatter": False}
    return {
        "train_micro_batch_size_per_gpu": WINDOWS // args.ranks,
        "gradient_clipping": args.clip,
        "zero_optimization": zero,
        "optimizer": {"type": contender, "params": CONTENDERS[contender]},
    }


Found = tuple[report.Line, Weights]
"""Of a rank: what it measured, and the weights, whole; of a run: the same of all ranks."""
Run = Callable[[str, int, int | None, argparse.Namespace], Found]
"""(contender, stage, which draw of noise if any, sizes)."""


def measure(contender: str, stage: int, draw: int | None, args: argparse.Namespace) -> Found:
    """One run, on this rank of the default process group."""
    rank, ranks, text = dist.get_rank(), dist.get_world_size(), load_corpus(args.data, CONTEXT).train
    import deepspeed

    import deepspeed_integration  # noqa: F401 (makes the name known)

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    model = model_of(args)
    if draw is not None:
        generator = torch.Generator().manual_seed(draw)
        for p in model.parameters():
            p.register_hook(lambda grad: grad * (1 + NOISE * torch.randn(grad.shape, generator=generator)))
    config = config_of(contender, stage, args)
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    core, sent = getattr(engine.basic_optimizer, "core", None), Counter()
    seconds = []
    for step in range(1, args.steps + 1):
        starts = training_starts(text, 0, step, WINDOWS, CONTEXT)[rank::ranks]
        dist.barrier()
        if core is not None and step == args.steps:
            core.step = sent.counting()(core.step)
        began = time.process_time()
        inputs, targets = windows(text, starts, CONTEXT)
        engine.backward(F.cross_entropy(engine(inputs).flatten(0, 1), targets.flatten()))
        engine.step()
        seconds.append(time.process_time() - began)
    state = (core or engine.basic_optimizer).state.values()
    held = sum(x.nbytes for entry in state for x in entry.values() if isinstance(x, Tensor))
    found = {"seconds": median(seconds[args.warmup :]), "state": held}
    if core is not None:
        found["sent"] = sum(sent.swapped_out) + sent.gathered + round(sent.reduced)
    weights = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if hasattr(p, "ds_id") else contextlib.nullcontext():
            weights[name] = p.detach().clone()
    engine.destroy()
    return found, weights


def _measure_in_process(
    rank: int, folder: str, contender: str, stage: int, draw: int | None, args: argparse.Namespace
) -> None:
    """One rank of one run; what it found goes to a file."""
    ranks = args.ranks
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, not used
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    torch.save(measure(contender, stage, draw, args), f"{folder}/found-{rank}")
    dist.barrier()
    dist.destroy_process_group()


def run(contender: str, stage: int, draw: int | None, args: argparse.Namespace) -> Found:
    """One run on processes of its own."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        try:
            mp.spawn(_measure_in_process, (folder, contender, stage, draw, args), nprocs=args.ranks)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as problem:
            return {"error": str(problem).strip().splitlines()[-1]}, {}
        return together([torch.load(f"{folder}/found-{rank}") for rank in range(args.ranks)])


def together(ranks: Sequence[Found]) -> Found:
    """The fullest rank's state, the busiest's bytes, and the weights, which are the first's as well as any."""
    found = [one for one, _ in ranks]
    line: report.Line = {key: max(one[key] for one in found) for key in found[0]}
    return line | {"seconds": median(one["seconds"] for one in found)}, ranks[0][1]


def run_all(args: argparse.Namespace, run: Run = run) -> list[report.Line]:
    """All runs, contenders and stages taking turns so that a busy machine is so for all of them."""
    first = next((stage for stage in args.stages if stage), args.stages[0])
    cases = [*((stage, False) for stage in args.stages), (first, True)]
    runs: dict[Any, list[Any]] = {(contender, *case): [] for contender in args.contenders for case in cases}
    for _ in range(args.repeats):
        for (contender, stage, noise), found in runs.items():
            if not found or "error" not in found[-1][0]:
                found.append(run(contender, stage, len(found) if noise else None, args))
    lines = []
    for (contender, stage, noise), found in runs.items():
        failed: report.Line = next((one for one, _ in found if "error" in one), {})
        line = {"contender": contender, "stage": stage, "noise": NOISE * noise, "ranks": args.ranks}
        line |= failed or found[0][0]
        if "error" not in line:
            seconds = [one["seconds"] for one, _ in found]
            line |= {"seconds": median(seconds), "seconds_of_runs": seconds, "against": first}
            if expected := runs[contender, first, False][0][1]:
                line["difference"] = max(difference(weights, expected) for _, weights in found)
        lines.append(line)
    return lines


def difference(weights: Weights, expected: Weights) -> float:
    """The largest |w - x| / |x| of a parameter."""
    return max(float((weights[name] - x).norm() / x.norm()) for name, x in expected.items())


def table(lines: Sequence[report.Line]) -> str:
    """The measurements in markdown; what failed has its error instead."""
    rows = [("optimizer", "ZeRO", *(heading for _, heading, _, _ in COLUMNS))]
    rows.append(("---", "---:", *("---:" for _ in COLUMNS)))
    for line in lines:
        cells = [form.format(line[key] * unit) if key in line else "" for key, _, form, unit in COLUMNS]
        cells = [line["error"], "", "", ""] if "error" in line else cells
        rows.append((line["contender"], f"{line['stage']}{', noise' if line['noise'] else ''}", *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None, run: Run = run) -> None:
    """Measure, print the table, add the lines to the results; `run` may have ranks that are there already."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deepspeed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", nargs="+", type=int, choices=range(4), default=list(range(4)))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--clip", type=float, default=0.5, help="the norm that gradients are clipped to; 0: none")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=4, help="of the steps, not timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", help="a text file; by default the source of Python's standard library")
    parser.add_argument("--out", type=Path, default=RESULTS / "deepspeed.jsonl")
    args = parser.parse_args(argv)
    lines = run_all(args, run)
    settings = {**report.machine(), "deepspeed": metadata.version("deepspeed"), "dtype": "float32"}
    settings |= {key: getattr(args, key) for key in ("clip", "layers", "width", "steps", "warmup", "repeats")}
    settings |= {"windows": WINDOWS, "context": CONTEXT, "options": CONTENDERS}
    report.append([{**settings, **line} for line in lines], args.out)
    print(table(lines))


if __name__ == "__main__":
    main()
