"""GPT-2's parameters, for plans; nothing here is ever run."""

import torch
from torch import nn


class Block(nn.Module):
    """A transformer block's parameters."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)


class GPT2(nn.Module):
    """GPT-2's shapes, 124M parameters by default, the head tied to the embedding."""

    def __init__(self, d: int = 768, layers: int = 12, vocabulary: int = 50257) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, d), nn.Embedding(1024, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.wte.weight


def gpt2_on_meta() -> GPT2:
    with torch.device("meta"):
        model = GPT2()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    return model
