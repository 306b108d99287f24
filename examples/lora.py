"""Adapters of peft on a frozen GPT-2.        python examples/lora.py"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import kl_dist
from kl_dist import KLShampoo


def main(steps: int = 100) -> float:
    """Returns by how much the loss fell."""
    source = Path(kl_dist.__file__).parent
    text = "".join(path.read_text() for path in sorted(source.rglob("*.py")))
    tokens = torch.tensor(list(text.encode())).unfold(0, 64, 64)

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4))
    # In the place of one's own: LoRA is for models that have learnt something, which this one has not.
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=["c_attn", "c_proj", "c_fc"]))
    model.print_trainable_parameters()

    # An adapter is r wide and much longer: of the long side a diagonal is kept. The rate is AdamW's own.
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = KLShampoo(parameters, lr=1e-2, blocking="none", max_preconditioner_dim=16, long_side="diagonal")
    state = sum(x.numel() for entry in optimizer.state.values() for x in entry.values())
    print(f"{state / sum(p.numel() for _, p in parameters):.2f} numbers of state per trained parameter")

    losses = []
    for step in range(steps):
        batch = tokens[torch.randint(len(tokens), (16,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    return losses[0] - losses[-1]


if __name__ == "__main__":
    main()
