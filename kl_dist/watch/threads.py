"""The threads of a process that give its signs, and listen to those of the others."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from kl_dist.watch.signs import Heard, Sign, Verdict, at, verdict, verdict_on_the_first

LONGEST_INTERVAL = 5.0  # seconds between two signs
VERDICT = "verdict"
STATUS = 5
"""Of a process that ends because another has stopped: none that Python or torchrun give a meaning."""


def say(words: str) -> None:
    """On the console, below a progress bar."""
    print(f"\n{words}", file=sys.stderr, flush=True)


class Watch:
    """One rank's part in it: a thread that gives signs and listens, and one that sees whether the store answers.

    Args:
        store: where the ranks of this start, and no others, meet; every rank's has the same prefix.
        patience: seconds.
        last_words: takes what there is to say before the process ends, in a thread, on every rank that is still there.
        status: what the process ends with then, whatever its other threads wait for.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        patience: float,
        last_words: Callable[[str], None] = say,
        status: int = STATUS,
    ) -> None:
        if patience <= 0:
            raise ValueError(f"patience is {patience}; seconds to wait for a rank, above 0")
        # A connection of its own: the main thread may wait within the other for long.
        self._store = dist.PrefixStore("watch", store.clone() if hasattr(store, "clone") else store)
        self.rank, self.size, self.patience = rank, size, patience
        self._last_words, self._status = last_words, status
        self.interval = min(patience / 8, LONGEST_INTERVAL)
        self._who = f"{socket.gethostname()}, pid {os.getpid()}"
        self._main = threading.main_thread().ident
        self._phase: tuple[int, str, bool, dict[str, int]] = (0, "starting", True, {})
        self._beat = 0
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(job,), name=f"kl_dist.{job.__name__}", daemon=True)
            for job in (self.exchange, self._see_to_the_store)
        ]
        now = time.monotonic()
        self._answered = now
        self._heard = {other: Heard(now, now) for other in (range(size) if rank == 0 else (0,))}
        self._said: float = now

    @classmethod
    def of_the_job(cls, patience: float, **given: Any) -> Watch:
        """Over all ranks of the default process group, which is there already; a collective, on its device."""
        told = [uuid.uuid4().hex]  # a store that is kept has the signs of earlier starts
        dist.broadcast_object_list(told)
        store = dist.PrefixStore(told[0], dist.distributed_c10d._get_default_store())
        return cls(store, dist.get_rank(), dist.get_world_size(), patience, **given)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """This rank leaves, as it should: the others do not miss it."""
        self._over.set()
        for thread in self._threads:
            thread.join(self.interval)
        with contextlib.suppress(dist.DistError, RuntimeError):  # where the store went first, all is over
            self._store.set(f"{self.rank}", json.dumps(asdict(self.sign(left=True))))

    def doing(self, what: str, unhurried: bool = False) -> None:
        """From now on this rank is at `what`, which others may have to wait for long if it is `unhurried`.

        What is not is a step that all ranks come to, as often as each other: from here on collectives are counted.
        """
        mark, _, _, before = self._phase
        self._phase = (mark, what, True, before) if unhurried else (mark + 1, what, False, collectives())

    def _repeat(self, job: Callable[[float], None]) -> None:
        last = time.monotonic()
        job(last)
        while not self._over.wait(self.interval):
            now = time.monotonic()
            if now - last > self.patience / 2:  # this process was stopped itself, and knows nothing of the time between
                self._answered = now
                for one in self._heard.values():
                    one.since = one.moved = now
            job(now)
            last = time.monotonic()

    def exchange(self, now: float) -> None:
        """Give a sign; of the first rank: read all others', and judge; of the others: read what it found."""
        try:
            self._store.set(f"{self.rank}", json.dumps(asdict(self.sign())))
            self._listen(now)
            found = None
            if self.rank == 0:
                found = verdict(self._heard, now, self.patience)
            elif self._store.check([VERDICT]):
                found = Verdict(self._store.get(VERDICT).decode(), final=True)
            else:
                found = verdict_on_the_first(self._heard[0], now, self.patience)
            self._answered = time.monotonic()
        except (dist.DistError, RuntimeError):
            return  # the other thread knows since when
        if found is not None:
            self._act(found, now)

    def _listen(self, now: float) -> None:
        known = [rank for rank, one in self._heard.items() if one.sign or self._store.check([f"{rank}"])]
        for rank, told in zip(
            known, self._store.multi_get([f"{rank}" for rank in known]) if known else (), strict=True
        ):
            self._heard[rank].hear(Sign(**json.loads(told)), now)

    def _act(self, found: Verdict, now: float) -> None:
        if not found.final:
            if now - self._said > self.patience:
                self._said = now
                say(f"waiting: {found.words}")
            return
        if self.rank == 0:
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._store.set(VERDICT, found.words)
        # the store may end with the first rank's process, and the others have to read it
        self._end(found.words, linger=3 * self.interval if self.rank == 0 else 0)

    def _see_to_the_store(self, now: float) -> None:
        if now - self._answered > self.patience:
            self._end(
                f"rank {self.rank} ({self._who}) has had no answer from the store of this job since "
                f"{at(self._answered, now)}: this host is cut off, or the process that keeps the store has stopped"
            )

    def _end(self, words: str, linger: float = 0.0) -> None:
        if self._over.is_set():
            return
        self._last_words(words)
        time.sleep(linger)
        os._exit(self._status)

    def sign(self, left: bool = False) -> Sign:
        mark, doing, unhurried, before = self._phase
        counts = {group: count - before.get(group, 0) for group, count in collectives().items()}
        self._beat += 1
        return Sign(self._beat, mark, counts, doing, unhurried, _where(self._main), self._who, left)


def collectives() -> dict[str, int]:
    """By name of a process group of this rank, how many collectives it has begun there."""
    found: dict[str, int] = {}
    world: Any = dist.distributed_c10d._world
    for group, name in list(world.pg_names.items()):
        try:
            found[name] = group._get_sequence_number_for_group()
        except (RuntimeError, AttributeError):
            continue  # a backend that does not count, or a group that this rank is not in
    return found


def _where(thread: int | None) -> str:
    """Where a thread is: the innermost three calls, the last one first."""
    frame = sys._current_frames().get(thread or 0)
    calls: list[str] = []
    while frame is not None and len(calls) < 3:
        calls.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return ", in ".join(calls) or "its end"
