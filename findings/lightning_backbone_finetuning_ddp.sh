#!/bin/sh
# Lightning's BackboneFinetuning under strategy="ddp": do all ranks train the same backbone once it is unfrozen?
#
# One would guess so: under DDP every rank has the same weights after every step. What happens: the callback freezes the
# backbone before DistributedDataParallel is built, and DDP's reducer only knows the parameters that require a gradient
# then. Unfrozen later, the backbone is stepped with each rank's own gradient, without a word: its weights drift apart
# from rank to rank while the head's stay equal, and the checkpoint has rank 0's. strategy="ddp_find_unused_parameters_true"
# does the same. Reported as Lightning-AI/pytorch-lightning#20340.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/env/bin/pip" install --quiet --disable-pip-version-check lightning==2.6.6 torch==2.13.0
cat >"$folder/train.py" <<'PYTHON'
import sys
import warnings

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BackboneFinetuning

warnings.filterwarnings("ignore")
EPOCHS_FROZEN = 1


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 1)

    def training_step(self, batch, _):
        return self.head(torch.tanh(self.backbone(batch[0]))).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def on_train_end(self):
        apart = {}
        for name, p in self.named_parameters():
            everywhere = self.all_gather(p.detach())
            apart[name] = float((everywhere[0] - everywhere[1]).abs().max())
        if self.trainer.is_global_zero:
            print(f"torch {torch.__version__}, lightning {lightning.__version__}, strategy {sys.argv[1]}")
            for name, difference in apart.items():
                print(f"  {name}: rank 0 and rank 1 differ by {difference:.2e}")
            drifted = {name for name, difference in apart.items() if difference > 1e-4}
            expected = {"backbone.weight", "backbone.bias"}
            print("as described" if drifted == expected else f"CHANGED: expected {expected} to have drifted apart")
            self.as_described = drifted == expected


data = torch.utils.data.TensorDataset(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)))
model = Model()
pl.Trainer(
    accelerator="cpu",
    devices=2,
    strategy=sys.argv[1],
    max_epochs=EPOCHS_FROZEN + 2,
    callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=EPOCHS_FROZEN)],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
).fit(model, torch.utils.data.DataLoader(data, batch_size=8))
sys.exit(0 if getattr(model, "as_described", True) else 1)
PYTHON
for strategy in ddp ddp_find_unused_parameters_true; do
    OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" "$folder/env/bin/python" "$folder/train.py" "$strategy" 2>"$folder/said" ||
        { cat "$folder/said"; exit 1; }
done
