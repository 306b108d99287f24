"""Models to plan for: built-in lists of shapes, a factory on the meta device, or a config.json of Hugging Face's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kl_dist.modules import EACH, GATE_UP

Shapes = dict[str, tuple[int, ...]]


class NoSuchModel(ValueError):
    """What was asked for is no model, in words."""


@dataclass(frozen=True)
class Model:
    """What `kl_dist.plan` is given."""

    name: str
    given: nn.Module | Shapes
    options: Mapping[str, Any] = field(default_factory=dict)  # which parameters AdamW serves, and what stacks hold

    @property
    def is_shapes(self) -> bool:
        return not isinstance(self.given, nn.Module)

    @property
    def numel(self) -> int:
        if isinstance(self.given, nn.Module):
            return sum(p.numel() for p in self.given.parameters())
        return sum(torch.Size(shape).numel() for shape in self.given.values())


def gpt2(width: int, layers: int) -> Shapes:
    """Names and shapes of GPT-2, the head tied to the embedding."""
    d = width
    block = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.up": (4 * d, d), "mlp.down": (d, 4 * d)}
    found: Shapes = {"wte": (50257, d), "wpe": (1024, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(layers):
        for name, shape in block.items():
            found |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[:1]}
        found |= {f"h.{i}.{norm}.{part}": (d,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return found


def llama(width: int, feed_forward: int, layers: int, keys: int, vocabulary: int = 128256) -> Shapes:
    """Names and shapes of Llama 3; `keys` is the width of keys and values."""
    d, f = width, feed_forward
    block = _attention(d, d, keys) | {"gate": (f, d), "up": (f, d), "down": (d, f)}
    return _decoder(d, layers, block, vocabulary)


def mixture(
    width: int, queries: int, keys: int, experts: int, feed_forward: int, layers: int, vocabulary: int, head: int = 0
) -> Shapes:
    """Names and shapes of a mixture of experts, which are stacked as transformers 5 does, gate and up fused.

    `head` is the width of the norms of queries and keys, where there are any (Qwen3).
    """
    d, f = width, feed_forward
    block = _attention(d, queries, keys) | {"router": (experts, d)}
    block |= {"experts.gate_up": (experts, 2 * f, d), "experts.down": (experts, d, f)}
    block |= {"norm_q": (head,), "norm_k": (head,)} if head else {}
    return _decoder(d, layers, block, vocabulary)


def _attention(width: int, queries: int, keys: int) -> Shapes:
    return {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}


def _decoder(width: int, layers: int, block: Shapes, vocabulary: int) -> Shapes:
    block = block | {"norm_1": (width,), "norm_2": (width,)}
    found: Shapes = {"embed": (vocabulary, width), "head": (vocabulary, width), "norm": (width,)}
    return found | {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""Of parameters that are shapes alone."""

BUILT_IN: dict[str, Shapes] = {
    "gpt2": gpt2(768, 12),
    "gpt2-xl": gpt2(1600, 48),
    "llama-8b": llama(4096, 14336, 32, 1024),
    "llama-70b": llama(8192, 28672, 80, 1024),
    "qwen3-moe-30b": mixture(2048, 4096, 512, 128, 768, 48, 151936, head=128),
    "mixtral-8x7b": mixture(4096, 4096, 1024, 8, 14336, 32, 32000),
}
EMBEDDINGS = ("wte", "wpe", "embed", "head")
STACKS = {"experts.gate_up": GATE_UP, "experts.down": EACH}
"""What the stacked tensors above hold, by the end of their names."""


def options_of(shapes: Shapes) -> dict[str, Any]:
    """Options for built-in shapes: embeddings and head under AdamW, a matrix for each expert."""
    found: dict[str, Any] = {"adamw_names": tuple(name for name in EMBEDDINGS if name in shapes)}
    stacks = {name: held for name in shapes for end, held in STACKS.items() if name.endswith(end)}
    return found | ({"matrices": stacks} if stacks else {})


def model_of(asked: str) -> Model:
    """The model that a word asks for.

    Args:
        asked: a name of `BUILT_IN`; `module:factory`, called without arguments on the meta device; or a config.json of
            Hugging Face's, or the folder that has it.

    Raises:
        NoSuchModel: it is none of these, or making it failed.
    """
    if asked in BUILT_IN:
        return Model(asked, BUILT_IN[asked], options_of(BUILT_IN[asked]))
    path = Path(asked)
    if path.is_dir() and (path / "config.json").exists():
        path = path / "config.json"
    if path.suffix == ".json":
        return _of_config(path)
    if ":" in asked:
        return _of_factory(asked)
    near = get_close_matches(asked, BUILT_IN, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? There" if near else "there"
    raise NoSuchModel(
        f"no model {asked!r}; {hint} are {', '.join(BUILT_IN)}; or give module:factory, or a config.json of Hugging"
        " Face's"
    )


def _of_factory(asked: str) -> Model:
    module, _, factory = asked.partition(":")
    sys.path.insert(0, "")  # as `python -m` looks where one stands
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as problem:
        raise NoSuchModel(f"cannot import {asked!r}: {problem}") from None
    finally:
        sys.path.remove("")
    try:
        with torch.device("meta"):
            made = make()
    except Exception as problem:  # whatever a user's code raises
        raise NoSuchModel(
            f"{asked} failed on the meta device ({type(problem).__name__}: {problem}): it is called without arguments,"
            " and must not read its weights"
        ) from problem
    if not isinstance(made, nn.Module):
        raise NoSuchModel(f"{asked} returned {type(made).__name__}, not a torch.nn.Module")
    return Model(asked, made)


def _of_config(path: Path) -> Model:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise NoSuchModel(f"{path} needs transformers: pip install 'kl-shampoo[huggingface]'") from None
    if not path.exists():
        raise NoSuchModel(f"no file {path}")
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config)
    except Exception as problem:  # of a library that reads what is in the file
        raise NoSuchModel(f"{path} is no causal language model of transformers ({problem})") from problem
    return Model(str(path), made)
