"""How a job ends: a status for a scheduler, one line of words for people, in the place where they look for it.

Under torchrun what a process says when it fails goes into the file that torchrun has given it for that, and torchrun,
or launch/agent.py, shows it last. Of ranks that fail together one speaks: the others give it a moment, in which
torchrun ends them, and speak if it has not.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from launch.options import UsageError

DONE, FAILED, USAGE, DIVERGED, NOT_SAVED, LOST = range(6)
"""Done, or stopped as asked and saved; an error of the program; of the command line; a loss that is not finite; the
last checkpoint not written; another rank that has ended or stopped."""
INTERRUPTED = 130

LATER = 1.5
"""Seconds in which torchrun has seen that another process of this host has failed."""
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
"""What gloo says when another rank has ended."""


class Diverged(Exception):
    """The loss is not finite any more, on all ranks alike; the message is for the user."""


class NotSaved(Exception):
    """What the run reached is not on the disk; the message is for the user."""


STATUS_OF: dict[type[Exception], int] = {UsageError: USAGE, Diverged: DIVERGED, NotSaved: NOT_SAVED}


def status_of(job: Callable[[], object]) -> int:
    """Do a job, and say in a line why it did not end well; returns the exit status. The program's errors are raised."""
    try:
        job()
    except tuple(STATUS_OF) as error:
        status = STATUS_OF[type(error)]
        record(f"error: {error}" if status == USAGE else str(error), after=_turn())
        return status
    except KeyboardInterrupt:
        record("\nInterrupted; --resume continues from the last checkpoint, if one was saved.")
        return INTERRUPTED
    return DONE


def process(main: Callable[[], int]) -> NoReturn:
    """Do `main` as all that this process is for, and end it with its status, or with 1 and the words of its error."""
    try:
        status = main()
    except Exception as error:
        status = FAILED
        gone = _of_another_rank(error)
        if gone is not None and "RANK" in os.environ:
            status = LOST
            record(f"another rank has ended, and this one with it: {gone}", after=2 * LATER)
        else:
            trace = traceback.format_exc().rstrip()
            record(f"{type(error).__name__}: {error}", trace, after=_turn())
    leave(status)


def _of_another_rank(error: Exception) -> str | None:
    """What gloo says of a rank that has ended; None of the program's own errors: its connections may break too."""
    said = str(error).splitlines() if isinstance(error, RuntimeError) else []
    return next((line for line in said if any(sign in line for sign in GONE)), None)


def record(words: str, trace: str | None = None, after: float = 0.0) -> None:
    """Say why this process ends, where it is looked for; `after` some seconds, if it is still there then."""
    if after:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a process that is told to end now has nothing to add
        time.sleep(after)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"timestamp": str(int(time.time()))} | ({"py_callstack": trace} if trace else {})
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": words, "extraInfo": extra}}))
    if not file or _starts_again():
        print(trace or words, file=sys.stderr, flush=True)


def leave(status: int) -> NoReturn:
    """End the process, under a launcher without taking the interpreter apart.

    Threads of gloo's may run until then: destroy_process_group leaves those of a group that anything still holds, a
    model in DistributedDataParallel, torch's caches of DTensors, DeepSpeed (findings/torch_gloo_threads.sh). One that
    lets go of a tensor while the interpreter ends aborts a process that has done all it had to.
    """
    if not os.environ.keys() & {"RANK", "SLURM_PROCID"}:
        sys.exit(status)
    if status == 0 and dist.is_initialized():  # a rank that failed must not wait for the others
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _turn() -> float:
    """How long to let others speak first: those of this host know the same, if it is all ranks that fail."""
    return LATER if os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_ERROR_FILE" in os.environ else 0.0


def _starts_again() -> bool:
    """Whether torchrun will start the processes anew, and says nothing of why."""
    count, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return count < most
