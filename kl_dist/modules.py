"""What a model's modules say of their parameters: embeddings, the output head, and which matrices a tensor holds.

But for an output head of which nothing says that it is one, nothing is guessed from a shape. A parameter of three
dimensions or more is known where it is a convolution's, where
`TABLE` has the class of its module, or where the module speaks for itself, as experts of transformers do; any other is
served by AdamW, with a warning, until the option `matrices` says what it is. Classes go by name, so that no library is
imported, and a class made of another (by FSDP2, say) is known by its base. What is stored transposed, (in, out), is
read as it is: a matrix and its transpose are preconditioned alike.

Checked on transformers 5.24.0, torchtitan 0.2.2 and its main branch of August 2026, and Megablocks 0.11.0.dev0.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kl_dist.planning.matrices import Declaration, declaration_of, names_of, read_matrices

log = logging.getLogger(__name__)

EACH: Declaration = {"batch": (0,)}  # (E, ..): an expert each, a codebook or a head
GATE_UP: Declaration = {"batch": (0,), "parts": {1: 2}}  # (E, 2m, n)
GATE_UP_TRANSPOSED: Declaration = {"batch": (0,), "parts": {2: 2}}  # (E, n, 2m)
IN_TURNS: Declaration = {"batch": (0,), "interleaved": {1: 2}}  # (E, 2m, n): gate, up, gate, up, ..
IN_TURNS_TRANSPOSED: Declaration = {"batch": (0,), "interleaved": {2: 2}}
HEADS: Declaration = {"rows": (0,), "columns": (1, 2)}  # (d, heads, d / heads)
VECTORS = None  # (E, n): biases, one of each expert, say, which AdamW serves

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)  # of several dimensions, too

_QKV: Mapping[str, Declaration | None] = {"c_attn.weight": {"parts": {1: "split_size"}}}
_FLAT: Declaration = {"parts": {0: "args.ffn_hidden_size"}}

TABLE: dict[str, Mapping[str, Declaration | None]] = {
    "torch.nn.modules.activation.MultiheadAttention": {"bias_k": VECTORS, "bias_v": VECTORS},
    # transformers: fused query, key and value, or key and value, of a Conv1D
    "GPT2Attention": _QKV,
    "DecisionTransformerGPT2Attention": _QKV,
    "ImageGPTAttention": _QKV,
    "transformers.models.openai.modeling_openai.Attention": _QKV,
    # transformers: experts, beside those that speak for themselves
    "GptOssExperts": {
        **{"gate_up_proj": IN_TURNS_TRANSPOSED, "down_proj": EACH},
        **{"gate_up_proj_bias": VECTORS, "down_proj_bias": VECTORS},
    },
    "Llama4TextExperts": {"gate_up_proj": GATE_UP_TRANSPOSED, "down_proj": EACH},
    "LongcatFlashExperts": {"gate_up_proj": GATE_UP, "down_proj": EACH},
    "Step3p7Experts": {"gate_up_proj": GATE_UP, "down_proj": EACH},
    "InklingSharedExperts": {"gate_proj": EACH, "up_proj": EACH, "down_proj": EACH},
    "JetMoeMoE": {"input_linear.weight": GATE_UP, "output_linear.weight": EACH},
    "JetMoeMoA": {"input_linear.weight": EACH, "output_linear.weight": EACH},
    "DbrxExpertGLU": {name: {"parts": {0: "ffn_hidden_size"}} for name in ("w1", "v1", "w2")},
    # transformers: other stacks, and heads that have an axis of their own
    "MoshiFlexibleLinear": {"weight": EACH},
    "KyutaiSpeechToTextFlexibleLinear": {"weight": EACH},
    "GroupedLinearLayer": {"weight": EACH},
    "RecurrentGemmaRglru": {"input_gate_weight": EACH, "recurrent_gate_weight": EACH},
    "ZambaMambaMixer": {"x_proj_weight": EACH, "dt_proj_weight": EACH},
    "XLNetRelativeAttention": {name: HEADS for name in ("q", "k", "v", "o", "r")},
    "FunnelRelMultiheadAttention": {"r_kernel": HEADS},
    # torchtitan, under the names of 0.2.2 and those of its main branch
    "GroupedExperts": {name: EACH for name in ("w1", "w2", "w3", "w1_EFD", "w2_EDF", "w3_EFD")},
    "FusedGroupedExperts": {"w13": {"batch": (0, 2), "rows": (1,), "columns": (3,)}},
    "GptOssGroupedExperts": {
        **{"mlp1_weight": IN_TURNS, "mlp1_weight_EGD": IN_TURNS, "mlp2_weight": EACH, "mlp2_weight_EDF": EACH},
        **{name: VECTORS for name in ("mlp1_bias", "mlp1_bias_EG", "mlp2_bias", "mlp2_bias_ED")},
    },
    # Megablocks: a tensor (E, m, n), or (E m, n) in the dropless layers
    "megablocks.layers.mlp.MLP": {"w1": EACH, "w2": EACH},
    "SparseMLP": {"w1": _FLAT, "w2": _FLAT},
    "SparseGLU": {"v1": _FLAT},
}
"""By class, what its parameters hold, by their names within the module. A word in the place of a number of parts is the
module's attribute with the size of one part."""


@dataclass(frozen=True)
class Said:
    """What a model's modules say of its parameters, which stand here by their ids."""

    elementwise: frozenset[int]  # embeddings and the output head, which AdamW serves
    vectors: frozenset[int]  # biases of experts, stacked; norms
    convolutions: frozenset[int]
    matrices: Mapping[int, Declaration]
    head: str | None = None  # the name of a module that was found to be the output head, where nothing says which is

    @property
    def about_head(self) -> str | None:
        """What to tell the user of it."""
        if self.head is None:
            return None
        return (
            f"{self.head!r} is taken for the output head, since it has as many outputs as an embedding has rows, and"
            ' AdamW serves it: name another in output_head, or none by output_head=""'
        )

    def serve(
        self,
        named: Collection[tuple[str, Tensor]],
        matrices: Mapping[str, Any] | None = None,
        adamw_names: Collection[str] | None = None,
    ) -> Served:
        """What becomes of some parameters of the model; a warning names those of which nothing is known.

        Args:
            named: parameters, named.
            matrices: the user's option for them, which goes first.
            adamw_names: the user's option.
        """
        adamw: list[str] = []
        chosen: list[str] = []
        declared: dict[str, Declaration] = {}
        unknown: list[str] = []
        for name, p in named:
            own = declaration_of(name, matrices)
            if len(shape_of(p)) < 2:
                continue
            if name in (adamw_names or ()):
                chosen.append(name)
            elif id(p) in self.elementwise or (own is None and id(p) in self.vectors):
                adamw.append(name)
            elif own is not None or id(p) in self.matrices:
                declared[name] = self.matrices[id(p)] if own is None else own
            elif len(shape_of(p)) > 2 and id(p) not in self.convolutions:
                adamw.append(name)
                unknown += [name] if p.requires_grad else []
        if unknown:
            log.warning("AdamW serves %s: %s", _listed(unknown), UNKNOWN)
        is_for_all = matrices is not None and not names_of(matrices)
        names = tuple(name for name, _ in named if name in {*adamw, *chosen})
        return Served(tuple(adamw), names, matrices if is_for_all else declared or None)


class Served(NamedTuple):
    """What becomes of parameters."""

    adamw: tuple[str, ...]  # of two dimensions or more, and served by AdamW for what they are
    adamw_names: tuple[str, ...]  # these and what the user has named, in the parameters' order: the option for a group
    matrices: Mapping[str, Any] | None  # the option `matrices` for the others

    @property
    def option(self) -> dict[str, Any]:
        """The option for a group, where there is something to say."""
        return {} if self.matrices is None else {"matrices": self.matrices}


UNKNOWN = (
    "tensors of three dimensions or more that are no convolution's, and nothing says which matrices they hold. Say it"
    ' with matrices={name: {"batch": (0,)}}, for a matrix of each index of the first axis (kl_dist/planning/matrices.py'
    " has the other forms), or name them in adamw_names"
)
_MOST_NAMES = 8


def look_up(model: nn.Module, output_head: str | None = None) -> Said:
    """Ask all modules of a model.

    Args:
        model: unwrapped or not, on any device.
        output_head: name of a module, as in `model.named_modules()`; "" where none is one.

    Raises:
        ValueError: no module has the name `output_head`.
    """
    vectors: set[int] = set()
    convolutions: set[int] = set()
    matrices: dict[int, Declaration] = {}
    for module in model.modules():  # the outer ones first, and what they say of their parts goes first
        for path, declared in _declarations(module):
            p = _attribute(module, path)
            if not isinstance(p, nn.Parameter):
                continue
            if declared is VECTORS:
                vectors.add(id(p))
            elif (resolved := _resolved(declared, module, shape_of(p))) is not None:
                matrices.setdefault(id(p), resolved)
        if isinstance(module, NORMS):
            vectors |= {id(p) for p in module.parameters()}
        if isinstance(module, _ConvNd):
            convolutions |= {id(p) for p in module.parameters()}
    embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    heads, found = _heads(model, output_head)
    # a head tied to an Embedding has its very parameter, so it needs no look-up of its own; peft's lie in a wrapper
    elementwise = {id(parameter) for module in (*embeddings, *heads) for parameter in module.parameters()}
    said = Said(frozenset(elementwise), frozenset(vectors), frozenset(convolutions), matrices, found)
    if said.about_head:
        log.info(said.about_head)
    return said


def _heads(model: nn.Module, output_head: str | None) -> tuple[list[nn.Module], str | None]:
    """The output heads, and the name of one that nobody had said; see `kl_dist.param_groups`."""
    named = dict(model.named_modules())
    if output_head:
        if output_head not in named:
            raise ValueError(f"the model has no module named {output_head!r} to be its output head")
        chosen = [named[output_head]]
    else:
        chosen = []
    sayings = [get for module in named.values() if callable(get := getattr(module, "get_output_embeddings", None))]
    said = [head for get in sayings if isinstance(head := get(), nn.Module)]
    if output_head is not None or sayings or (found := _head_by_vocabulary(model)) is None:
        return [*chosen, *said], None
    return [named[found]], found


def _head_by_vocabulary(model: nn.Module) -> str | None:
    """The name of the only Linear whose outputs are as many as an Embedding's rows; those inside of blocks, a layer of
    an MLP as wide as a vocabulary of bytes, say, are none. None where a head is tied, since that is it."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    vocabularies = {module.num_embeddings for module in embeddings}
    linears = [(name, module) for name, module in _outside_of_blocks(model) if isinstance(module, nn.Linear)]
    tied = {id(module.weight) for module in embeddings} & {id(module.weight) for _, module in linears}
    found = [name for name, module in linears if module.out_features in vocabularies]
    return found[0] if len(found) == 1 and not tied else None


def _outside_of_blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Named parts of a model, but for what is inside of the members of lists, dicts and sequences of modules."""
    listed = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    for name, child in module.named_children():
        yield path + name, child
        if not listed:
            yield from _outside_of_blocks(child, f"{path}{name}.")


def shape_of(p: Tensor) -> torch.Size:
    """The shape of a parameter; DeepSpeed's zero.Init leaves an empty tensor, with the shape beside it."""
    return torch.Size(getattr(p, "ds_shape", p.shape))


def _declarations(module: nn.Module) -> Iterator[tuple[str, Declaration | None]]:
    for kind in type(module).__mro__:
        for key in (kind.__name__, f"{kind.__module__}.{kind.__name__}"):
            yield from TABLE.get(key, {}).items()
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):  # transformers' use_experts_implementation
        kind_of_parts = "parts" if getattr(module, "is_concatenated", True) else "interleaved"
        yield "gate_up_proj", {"batch": (0,), kind_of_parts: {2 if module.is_transposed else 1: 2}}
        for name in ("up_proj", "down_proj"):
            yield name, EACH
        for name in ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias"):
            yield name, VECTORS


def _resolved(declared: Declaration, module: nn.Module, shape: Sequence[int]) -> Declaration | None:
    """With numbers of parts for the sizes of one; None where it does not fit: then the class is another of its name."""
    parts = {axis: _count(part, module, shape, axis) for axis, part in declared.get("parts", {}).items()}
    resolved = {**declared, "parts": parts} if parts else declared
    try:
        read_matrices(shape, {"matrices": resolved})
    except ValueError:
        return None
    return resolved


def _count(part: int | str, module: nn.Module, shape: Sequence[int], axis: int) -> int:
    """The number of parts along an axis, 0 where there is none."""
    if isinstance(part, int):
        return part
    size = _attribute(module, part)
    whole = isinstance(size, int) and size > 0 and len(shape) > axis and shape[axis] % size == 0
    return shape[axis] // size if whole else 0


def _attribute(module: nn.Module, path: str) -> Any:
    """The attribute at `path`, with dots; None where there is none."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
