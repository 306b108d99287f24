"""Hugging Face's Trainer: a small GPT-2 on this library's own source.        python examples/hf_trainer.py"""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import kl_dist
from kl_dist.huggingface import ConsolidateState, KLShampooFactory, log_stats


class Bytes(torch.utils.data.Dataset):
    """Windows of a text, each byte a token."""

    def __init__(self, text: str, length: int = 64) -> None:
        self.windows = torch.tensor(list(text.encode())).unfold(0, length, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def main(steps: int = 100, folder: str = "runs/hf") -> float:
    """Returns by how much the loss fell."""
    source = Path(kl_dist.__file__).parent
    dataset = Bytes("".join(path.read_text() for path in sorted(source.rglob("*.py"))))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4))

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            max_grad_norm=1.0,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_steps=steps,
            report_to="none",
        ),
        train_dataset=dataset,
        optimizer_cls_and_kwargs=(KLShampooFactory, {"lr": 1e-2, "adamw_lr": 5e-3, "weight_decay": 0.01}),
        callbacks=[ConsolidateState()],  # all of the state is in what the Trainer saves
    )
    log_stats(trainer)  # update RMS and the like beside the loss
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses[0] - losses[-1]


if __name__ == "__main__":
    main()
