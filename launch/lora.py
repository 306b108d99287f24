"""Fine-tune a GPT-2 of Hugging Face's transformers by LoRA: peft's adapters, served by any optimizer named here.

    python launch/lora.py --rank 8 --optimizer adamw
    torchrun --nproc-per-node 2 launch/lora.py --rank 8

The first run makes the model that is fine-tuned: a byte-level GPT-2, trained on the source of Python's standard library
and kept in --base for the runs to come. The adapters then learn Python's reference manual, prose that it has not seen.

An adapter adds B A to a frozen weight: A is rank x inputs, B outputs x rank and zero at first. A Kronecker method
serves each of them as a matrix whose short side is the rank; what it keeps of the long side is --long-side. All else of
a run is as in launch/train.py, and so are its batches: any number of processes does the same training.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

if not __package__:
    # Started as a file, Python looks for modules beside it; this package's folder is one up.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import GPT2LMHeadModel

from launch import endings, train
from launch.data import Corpus, library_manual, load_corpus, standard_library
from launch.model import gpt2
from launch.optimizers import ADAMW_BETAS, Trainer, blamed_on_set, kronecker
from launch.options import METHOD_OF, Options, Rates, UsageError, option
from launch.ranks import joined_ranks

ADAPTED = ("c_attn", "c_proj", "c_fc")
"""The modules of a GPT-2 that get an adapter: all matrices of its blocks."""

LONG_SIDES = ("blocks", "diagonal", "identity")

OPTIMIZERS = (*METHOD_OF, "adamw")

DEFAULT_LR = 1e-2
"""The best of KL-Shampoo's and of AdamW's at rank 8, by docs/finetuning.md; rank 64 wants half of it."""


@dataclass(frozen=True)
class LoraOptions(Options):
    """The options of launch/train.py, with sizes of a model that fine-tunes in a minute, and those of adapters."""

    script: ClassVar[str] = "launch/lora.py"
    purpose: ClassVar[str] = "Fine-tune a small GPT-2 by LoRA and see how far an optimizer gets in a number of steps."

    rank: int = option(8, "of the adapters")
    alpha: int | None = option(None, "what B A is multiplied by is alpha / rank; by default alpha is twice the rank")
    long_side: str | None = option(
        None, "what a Kronecker method keeps of an adapter's: blocks, diagonal (the default) or identity"
    )
    b_ratio: float = option(1.0, "learning rate of B over that of A, which LoRA+ wants above 1")
    base: str | None = option(None, "folder of the model that is fine-tuned; by default one for each size, in runs")
    base_steps: int = option(600, "how many steps the base model is trained where it is not there yet")

    weight_decay: float = option(0.0, "decoupled weight decay of the adapters")
    steps: int = option(200, "how many optimizer steps to fine-tune")
    tokens_per_step: int = option(1024, "tokens of one step over all processes together")
    layers: int = option(2, "transformer blocks")
    width: int = option(256, "size of a token's vector")
    data: str | None = option(None, "a text file to fine-tune on; by default Python's reference manual")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(f"--optimizer takes {', '.join(OPTIMIZERS)} here, not {self.optimizer}")
        if self.adamw_lr is not None:
            raise UsageError("--adamw-lr means nothing here: adapters are matrices, and one optimizer serves them all")
        if self.parallel != "ddp":
            raise UsageError(f"--parallel takes ddp here, not {self.parallel}")
        if self.long_side not in (None, *LONG_SIDES):
            raise UsageError(f"--long-side takes {', '.join(LONG_SIDES)}, not {self.long_side}")
        if self.optimizer == "adamw" and self.long_side is not None:
            raise UsageError("--long-side means nothing to --optimizer adamw; leave it out")

    @property
    def rates(self) -> Rates:
        lr = DEFAULT_LR if self.lr is None else self.lr
        return Rates(lr, lr)

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/lora-{self.optimizer}")

    @property
    def base_folder(self) -> Path:
        sizes = f"{self.layers}x{self.width}-{self.heads}-{self.context}"
        return Path(self.base or f"runs/base-{sizes}-{self.base_steps}")

    @property
    def route(self) -> dict[str, Any]:
        """What --long-side means to a Kronecker method."""
        if self.long_side == "blocks":
            return {}
        return {"blocking": "none", "max_preconditioner_dim": self.rank, "long_side": self.long_side or "diagonal"}


class Pretraining(train.Job):
    """Makes the base model, by the optimizer and the rates that launch/train.py has."""

    @staticmethod
    def read(options: Options) -> Corpus:
        """Source code, without the manual that fine-tuning is about."""
        return load_corpus(None, options.context, functools.partial(standard_library, without=("pydoc_data",)))

    @staticmethod
    def build(options: Options) -> Any:
        return gpt2(options.layers, options.width, options.heads, options.context)

    @staticmethod
    def predict(model: nn.Module, inputs: Tensor) -> Tensor:
        return model(input_ids=inputs, use_cache=False).logits


class Finetuning(Pretraining):
    """The training job with a model whose adapters alone are trained."""

    kind = LoraOptions
    deciding = ("rank", "alpha", "b_ratio", "base_steps")

    @staticmethod
    def read(options: Options) -> Corpus:
        """Prose about code."""
        return load_corpus(options.data, options.context, library_manual)

    @staticmethod
    def build(options: Options) -> Any:
        """The base model with adapters, which begin as nothing: B is zero."""
        assert isinstance(options, LoraOptions)
        base = pretrained(options)
        torch.manual_seed(options.seed)  # of A, whether or not the base model was made just now
        alpha = 2 * options.rank if options.alpha is None else options.alpha
        # GPT-2 keeps its weights as inputs x outputs
        config = LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=list(ADAPTED), fan_in_fan_out=True)
        return get_peft_model(base, config)

    @staticmethod
    def serve(options: Options, model: Any) -> Trainer:
        """The optimizer of the adapters, A and B as two groups."""
        assert isinstance(options, LoraOptions)
        with blamed_on_set(options):
            if options.optimizer == "adamw":
                groups = adapter_groups(model, options.rates.lr, options.b_ratio)
                given = {"betas": ADAMW_BETAS, "weight_decay": options.weight_decay, **options.optimizer_options}
                optimizer: Optimizer = AdamW(groups, **given)
            else:
                kept = {"weight_decay": options.weight_decay, **options.route}
                optimizer = kronecker(options, adapter_groups(model, options.rates.lr, options.b_ratio, **kept))
        return Trainer([optimizer], options.steps, options.warmup_steps, options.schedule)

    def save(self, step: int) -> Path | None:
        """Beside the checkpoint the adapters as peft has them, a small file that other programs load."""
        if self.ranks.first:
            model: Any = self.model
            model.save_pretrained(self.options.folder / "adapter")
        return super().save(step)


def adapter_groups(model: nn.Module, lr: float, b_ratio: float, **options: Any) -> list[dict[str, Any]]:
    """Parameter groups of what peft has left trainable: A at `lr`, B at `b_ratio` times that."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [pair for pair in trainable if part in pair[0]], "lr": rate, **options}
        for part, rate in (("lora_A", lr), ("lora_B", lr * b_ratio))
    ]


def pretrained(options: LoraOptions) -> GPT2LMHeadModel:
    """The model that is fine-tuned, which all ranks train together where it is not there.

    Raises:
        UsageError: what is there has other sizes.
    """
    folder = options.base_folder
    if not (folder / "config.json").exists():
        sizes = {name: getattr(options, name) for name in ("layers", "width", "heads", "context")}
        asked = Options(steps=options.base_steps, out=str(folder), resume="auto", **sizes)
        with joined_ranks() as ranks:
            job = Pretraining(asked, ranks)
            train.run(job)
            if job.stopping:
                raise UsageError("stopped before the base model was done; the same command goes on with it")
            if ranks.first:
                model: Any = job.model
                model.save_pretrained(folder)
            ranks.tell(None)  # nobody reads it before it is there
    model = GPT2LMHeadModel.from_pretrained(folder)
    found = (model.config.n_layer, model.config.n_embd, model.config.n_head, model.config.n_positions)
    if found != (options.layers, options.width, options.heads, options.context):
        layers, width, heads, context = found
        raise UsageError(
            f"--base {folder} has --layers {layers} --width {width} --heads {heads} --context {context}, and this job"
            " asks for others; give these, or another folder"
        )
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune as the command line asks; returns the exit status."""
    return train.main(arguments, Finetuning)


if __name__ == "__main__":
    endings.process(main)
