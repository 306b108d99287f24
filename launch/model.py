"""A byte-level GPT: pre-norm blocks of causal attention and a GELU MLP, learned positions, no biases.

The output head is a Linear of its own, not tied to the embedding. All matrices inside the blocks are plain 2-D weights,
which is what a matrix optimizer is made for; embeddings, head and norms are what it leaves to AdamW.

A multilayer perceptron of the same make stands beside it for tasks that have no text, and a GPT-2 of transformers for
jobs that show how libraries go together. What the optimizers ask of a
model is the same for both: matrices in `blocks`, and an output layer `head`.
"""

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

BYTES = 256


class GPT(nn.Module):
    """Next-byte prediction: `forward` takes bytes (batch x time, int64) to logits (batch x time x 256)."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, BYTES, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # What a block adds to the residual stream starts smaller, so that its sum over depth does not grow.
                added = name.endswith(("attention.project.weight", "mlp.project.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if added else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.tokens(tokens) + self.positions(positions)
        return self.head(self.norm(self.blocks(hidden)))


class Perceptron(nn.Module):
    """Layers of a matrix and a GELU, then a linear head: `forward` takes rows x inputs to rows x outputs."""

    def __init__(self, layers: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        pairs = itertools.pairwise([inputs, *[width] * layers])
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(*pair, bias=False), nn.GELU()) for pair in pairs))
        self.head = nn.Linear(width, outputs, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.blocks(rows))


Model = GPT | Perceptron


def gpt2(layers: int, width: int, heads: int, positions: int) -> "GPT2LMHeadModel":
    """A GPT-2 of Hugging Face's transformers on bytes, freshly initialised, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel  # seconds, and a library that the other jobs do without

    config = GPT2Config(
        vocab_size=BYTES,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


class Block(nn.Module):
    """One transformer block; each half normalises its input and adds to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp = MLP(width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Attention(nn.Module):
    """Causal self-attention with one fused weight for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        # batch x time x 3 width -> three of batch x heads x time x head size
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """Two layers, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.project = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(hidden)))
