"""The job's options: one frozen dataclass, from which the command line is made.

Each field is a flag (`adamw_lr` is `--adamw-lr`) and carries its own help. An `Options` that exists is valid: whatever
can be refused before the first tensor is made is refused in `__post_init__`, in one sentence that says what to do.
"""

import argparse
import ast
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from kl_dist import METHODS
from kl_dist.options import nearest


class UsageError(Exception):
    """Something the user asked for cannot be done; the message is one sentence for them, no traceback is needed."""


class Rates(NamedTuple):
    """Peak learning rates: of the matrices, and of what AdamW updates beside them: embeddings, head, 1-D parameters."""

    lr: float
    adamw_lr: float


SCHEDULES = ("cosine", "linear", "wsd", "constant")
PARALLEL = ("ddp", "fsdp", "hsdp", "tp", "fsdp+tp")

METHOD_OF = {method.called: name for name, method in METHODS.items()}
"""Our methods by what --optimizer calls them: "kl_muon" is Muon on our engine, "muon" is torch's."""

# The best that docs/learning.md found for the demo's model and text; another model wants its own search.
DEFAULT_RATES = {
    **dict.fromkeys(METHOD_OF, Rates(1e-2, 5e-3)),
    "kl_muon": Rates(1.5e-2, 5e-3),
    "muon": Rates(1.5e-2, 5e-3),
    "adamw": Rates(2e-3, 2e-3),
}


HOW_READ: dict[Any, dict[str, Any]] = {
    bool: {"action": "store_true"},
    tuple[str, ...]: {"type": str, "nargs": "+", "action": "extend"},
}
"""How the command line reads what is not one word."""


def option(default: Any, text: str, **how: Any) -> Any:
    """A dataclass field with the text that `--help` shows for it, and how the command line reads it if not plainly."""
    return field(default=default, metadata={"help": text, "how": how})


@dataclass(frozen=True)
class Options:
    """All that a run depends on; together with the text and the code it determines every number of the run."""

    script: ClassVar[str] = "launch/train.py"
    purpose: ClassVar[str] = "Train a byte-level GPT and see how far an optimizer gets in a number of steps."

    optimizer: str = option("kl_shampoo", f"which one: {', '.join(DEFAULT_RATES)}")
    lr: float | None = option(None, "peak learning rate; by default one that suits the optimizer and the demo")
    adamw_lr: float | None = option(None, "the same for embeddings, head and 1-D parameters beside a matrix optimizer")
    weight_decay: float = option(0.01, "decoupled weight decay of everything but norms")
    recipe: str | None = option(
        None, "form of one of our methods: fresh, the default, paper, compact of kl_shampoo, normuon of kl_muon"
    )
    precondition_frequency: int | None = option(None, "steps between refreshes of a Kronecker method's eigenbases")
    set: tuple[str, ...] = option(
        (), "any other option of the optimizer, as key=value: --set nesterov=False momentum=0.9"
    )

    steps: int = option(400, "how many optimizer steps to train")
    warmup: int | None = option(None, "steps of linear warm-up; by default a twentieth of all steps")
    schedule: str = option(
        "cosine",
        "of the learning rate then: cosine or linear to zero, wsd (constant, and linear in the last fifth), constant",
    )
    grad_clip: float | None = option(None, "largest norm of the whole gradient; by default it is not clipped")
    tokens_per_step: int = option(2048, "tokens of one step over all processes together")
    seed: int = option(0, "of the initial weights and of the order of the text")

    parallel: str = option("ddp", "how the model lies over the processes: ddp, fsdp, hsdp, tp or fsdp+tp")
    inner: int = option(2, "processes that share a replica under hsdp, or divide a layer under fsdp+tp")

    layers: int = option(4, "transformer blocks")
    width: int = option(128, "size of a token's vector")
    heads: int = option(4, "attention heads of a block")
    context: int = option(128, "tokens a prediction can see")

    data: str | None = option(None, "a text file to train on; by default the Python standard library's own source")
    eval_every: int = option(50, "steps between two looks at the validation loss")
    checkpoint_every: int | None = option(None, "steps between two checkpoints; by default only the last step is saved")
    out: str | None = option(None, "folder of the results, shared by all machines; by default runs/OPTIMIZER")
    keep: int | None = option(None, "how many of the newest checkpoints to keep; by default all")
    resume: str | None = option(
        None,
        "continue: from the newest checkpoint in --out that is whole, from that or else from the start (auto), or from"
        " the folder of one",
        nargs="?",
        const="newest",
    )
    patience: float = option(
        300.0, "seconds after which a process that has stopped ends the job on all the others, with its name; 0: never"
    )

    def __post_init__(self) -> None:
        if self.optimizer not in DEFAULT_RATES:
            raise UsageError(f"--optimizer {self.optimizer} is unknown{nearest(self.optimizer, DEFAULT_RATES, str)}")
        if self.parallel not in PARALLEL:
            raise UsageError(f"--parallel takes {', '.join(PARALLEL)}, not {self.parallel}")
        if self.schedule not in SCHEDULES:
            raise UsageError(f"--schedule takes {', '.join(SCHEDULES)}, not {self.schedule}")
        if self.optimizer == "muon" and self.parallel != "ddp":
            raise UsageError("--optimizer muon needs matrices that are whole on every process; use --parallel ddp")
        self._check_numbers()
        if self.width % self.heads:
            raise UsageError(f"--width {self.width} does not divide into --heads {self.heads}")
        if self.tokens_per_step % self.context:
            raise UsageError(
                f"--tokens-per-step {self.tokens_per_step} is not a whole number of windows of --context {self.context}"
            )
        if self.warmup is not None and self.warmup >= self.steps:
            raise UsageError(f"--warmup {self.warmup} leaves nothing of --steps {self.steps}")
        if self.optimizer in METHOD_OF:
            recipes = METHODS[METHOD_OF[self.optimizer]].rules
            if self.recipe not in (None, *recipes):
                raise UsageError(f"--recipe takes {' or '.join(recipes)}, not {self.recipe}")
        else:
            for name in ("recipe", "precondition_frequency"):
                if getattr(self, name) is not None:
                    raise UsageError(f"{_flag(name)} means nothing to --optimizer {self.optimizer}; leave it out")
        if self.optimizer == "adamw" and self.adamw_lr is not None:
            raise UsageError("--adamw-lr is for what stands beside a matrix optimizer; with --optimizer adamw use --lr")
        if self.optimizer in METHOD_OF and self.lr == 0:
            raise UsageError("--lr 0 is too small: --adamw-lr is kept in proportion to it")
        if "process_group" in self.optimizer_options:
            raise UsageError("--set process_group: the job trains in the group of all its processes; leave it out")
        for name in self.optimizer_options:
            if name in {"method", *(option_field.name for option_field in fields(self))}:
                flag = "--optimizer" if name == "method" else _flag(name)
                raise UsageError(f"--set {name} would contradict a flag of the job; use {flag}")

    def _check_numbers(self) -> None:
        """Refuse what no number may be: a count below its least value, a rate that is negative, infinite or NaN."""
        least = {"seed": 0, "warmup": 0}
        for option_field in fields(self):
            name, value = option_field.name, getattr(self, option_field.name)
            if type(value) is int and value < least.get(name, 1):
                raise UsageError(f"{_flag(name)} {value} is too small; the least is {least.get(name, 1)}")
            if type(value) is float and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{_flag(name)} {value} is not a finite number of 0 or more")

    @property
    def rates(self) -> Rates:
        """The peak learning rates asked for, or the optimizer's own."""
        default = DEFAULT_RATES[self.optimizer]
        lr = default.lr if self.lr is None else self.lr
        if self.optimizer == "adamw":
            return Rates(lr, lr)
        return Rates(lr, default.adamw_lr if self.adamw_lr is None else self.adamw_lr)

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """What `--set` asks for, by key; the optimizer, which knows its options, checks them."""
        return dict(_assignment(text) for text in self.set)

    @property
    def warmup_steps(self) -> int:
        return self.steps // 20 if self.warmup is None else self.warmup

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.out or f"runs/{self.optimizer}")

    @property
    def windows_per_step(self) -> int:
        """How many windows of text one step sees, over all ranks."""
        return self.tokens_per_step // self.context

    def parts(self, world_size: int) -> int:
        """Into how many parts a batch is divided; processes that divide the layers among them share a part."""
        divide = {"tp": world_size, "fsdp+tp": self.inner}.get(self.parallel, 1)
        return max(world_size // divide, 1)

    def windows_per_rank(self, world_size: int) -> int:
        """This rank's share of them; the batch must divide, so that the mean over ranks is the mean over windows."""
        parts = self.parts(world_size)
        if self.windows_per_step % parts:
            raise UsageError(
                f"{self.windows_per_step} windows a step (--tokens-per-step {self.tokens_per_step} of --context "
                f"{self.context}) do not divide over {world_size} processes"
            )
        return self.windows_per_step // parts


Kind = TypeVar("Kind", bound=Options)


def parse(arguments: Sequence[str] | None = None, options: type[Kind] = Options) -> Kind:  # type: ignore[assignment]
    """Read the command line of a job with these `options`; a mistake in it raises `UsageError`."""
    parser = ArgumentParser(prog=options.script, description=options.purpose, exit_on_error=False)
    kinds = _kinds(options)
    for option_field in fields(options):
        kind = kinds[option_field.name]
        parser.add_argument(
            _flag(option_field.name),
            # Without a default of its own, an option that is not given is left to the dataclass.
            default=argparse.SUPPRESS if option_field.default in (None, ()) else option_field.default,
            help=option_field.metadata["help"],
            **HOW_READ.get(kind, {"type": kind}) | option_field.metadata["how"],
        )
    given = list(sys.argv[1:] if arguments is None else arguments)
    _refuse_unknown_flags(given, list(kinds))
    try:
        values = vars(parser.parse_args(given))
        found = options(**values | {"set": tuple(values.get("set", ()))})
    except ArgumentError as error:
        raise UsageError(_plain(str(error), kinds)) from error
    found.windows_per_rank(int(os.environ.get("WORLD_SIZE", "1")))
    return found


def _kinds(options: type[Options]) -> dict[str, Any]:
    """The type of each option, without the None that stands for "not given"."""
    hints = get_type_hints(options)
    given = {option_field.name: hints[option_field.name] for option_field in fields(options)}.items()
    return {name: next((kind for kind in get_args(hint) if type(None) in get_args(hint)), hint) for name, hint in given}


def _assignment(text: str) -> tuple[str, Any]:
    """`betas=(0.9,0.95)` as a name and a Python value; what is no Python literal is a word."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UsageError(f"--set takes key=value, not {text}")
    try:
        return name, ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError):
        return name, value


def _plain(message: str, kinds: dict[str, Any]) -> str:
    """The parser's complaint about a value in the words of the command line; any other complaint as it is."""
    complaint = re.fullmatch(r'Parser key "(\w+)":.* value: (.*)', " ".join(message.split()))
    if not complaint:
        return message
    name, value = complaint.groups()
    expected = {int: "a whole number", float: "a number"}.get(kinds[name], "a word")
    return f"{_flag(name)} takes {expected}, not {value}"


def _refuse_unknown_flags(arguments: Sequence[str], names: Sequence[str]) -> None:
    """Name the flag that was probably meant; the parser would only repeat the mistake."""
    known = ["--help", *map(_flag, names)]
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag not in known:
            raise UsageError(f"{flag} is no option{nearest(flag, known, str)}; --help lists them")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
