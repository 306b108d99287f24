"""Timing single steps of several optimizers, their repetitions interleaved.

A machine drifts: its clock, its neighbours, its caches. Timing A ten times and then B ten times charges the drift to
whoever was on at the time. Here every round times one step of every contender (A B C, A B C, ..), so a slow minute is
everybody's, and the ratios stand even where the milliseconds do not.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

from benchmarks.contenders import NEVER, Contender, state_bytes

POOL = 4  # sets of gradients, used in turn: one alone would give factors of rank one


@dataclass
class Samples:
    """Seconds of repeated steps of one kind, in order."""

    cpu: list[float] = field(default_factory=list)  # of all threads of the process together
    wall: list[float] = field(default_factory=list)


class Runner:
    """A contender with parameters of its own, ready to be stepped."""

    def __init__(self, contender: Contender, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self.contender = contender
        generator = torch.Generator(device).manual_seed(0)

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.parameters = [nn.Parameter(0.02 * draw(shape)) for shape in shapes]
        self.gradients = [[1e-3 * draw(shape) for shape in shapes] for _ in range(POOL)]
        self.samples = {kind: Samples() for kind in contender.kinds}
        self.steps = 0
        self.state_ratio = 0.0
        with contextlib.redirect_stdout(sys.stderr):
            self.optimizer = contender.make(self.parameters)

    def prepare(self, kind: str) -> None:
        """Put the next gradients in place and choose the kind of the next step; not timed."""
        gradients = self.gradients[self.steps % POOL]
        self.steps += 1
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.copy_(gradient)
        if self.contender.set_frequency is not None:
            self.contender.set_frequency(self.optimizer, NEVER if kind == "plain" else 1)

    def warm_up(self, rounds: int) -> None:
        """Steps that are not kept: two a round for everyone, as what is compiled may be so at its third step only."""
        for _ in range(rounds):
            for kind in (*self.contender.kinds, *self.contender.kinds)[:2]:
                self.step(kind, keep=False)

    def release(self) -> None:
        """Note `state_ratio`, bytes of state over bytes of parameters, and let go of all tensors."""
        self.state_ratio = state_bytes(self.optimizer) / sum(p.nbytes for p in self.parameters)
        del self.optimizer, self.parameters, self.gradients

    def step(self, kind: str, keep: bool) -> None:
        """One step, timed; `keep` is False while warming up."""
        self.prepare(kind)
        with contextlib.redirect_stdout(sys.stderr):
            wall, cpu = time.perf_counter(), time.process_time()
            self.optimizer.step()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if keep:
            self.samples[kind].cpu.append(cpu)
            self.samples[kind].wall.append(wall)


def measure(
    contenders: Sequence[Contender],
    shapes: Sequence[tuple[int, ...]],
    *,
    repeats: int,
    warmup: int,
    threads: int,
) -> tuple[list[Runner], dict[str, str]]:
    """Time all contenders on the CPU, round by round; a contender that fails is left out.

    Returns:
        Their runners, and for those that failed the reason.
    """
    failed: dict[str, str] = {}
    runners: list[Runner] = []
    with _threads(threads):
        for contender in contenders:
            try:
                runner = Runner(contender, shapes, torch.device("cpu"))
                runner.warm_up(warmup)
            except Exception as problem:  # whatever a peer raises, the others go on
                failed[contender.name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
                continue
            runners.append(runner)
        for _ in range(repeats):
            for runner in runners:
                for kind in runner.contender.kinds:
                    runner.step(kind, keep=True)
    for runner in runners:
        runner.release()
    return runners, failed


def amortised(seconds: dict[str, list[float]], every: int) -> float:
    """Median seconds of a step with a refresh every T steps: plain + (refresh step - plain) / T.

    What has but one kind of step takes that time always.
    """
    if len(seconds) == 1:
        return median(next(iter(seconds.values())))
    plain = median(seconds["plain"])
    return plain + (median(seconds["refresh"]) - plain) / every


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
