"""A second task, of another kind than text: regression on inputs whose covariance is ill-conditioned.

    x = z diag(s) R        z normal, s falling geometrically from 1 to 1 / CONDITION, R a rotation
    y = tanh(z A) B        scaled to a mean square of 1

The targets depend on all directions of z alike, while the inputs nearly hide most of them: what a first-order method
learns late, and what whitening is for. A choice that only suits text shows itself here.

The rows stand in for bytes: a "window" is `context` consecutive rows, which are independent, so batches, validation
and the division over ranks are those of the training job.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launch.data import Corpus
from launch.model import Model, Perceptron
from launch.options import Options
from launch.train import Job

INPUTS, HIDDEN, OUTPUTS = 64, 64, 16
CONDITION = 100.0
TRAINING_ROWS, VALIDATION_ROWS = 2**17, 2**14
DATA_SEED = 20_260
"""Of the rows; a run's own seed is for its initial weights and the order of the rows, as it is for text."""


class Regression(Job):
    """The training job with rows of numbers in place of text; its loss is the mean square error, 1 for a guess of 0."""

    @staticmethod
    def read(options: Options) -> Corpus:
        """Rows of inputs and targets side by side (rows x (INPUTS + OUTPUTS), float32)."""
        draw = torch.Generator().manual_seed(DATA_SEED)
        rotation, _ = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=draw))
        scales = CONDITION ** -torch.linspace(0, 1, INPUTS)
        inner = torch.randn(INPUTS, HIDDEN, generator=draw) / INPUTS**0.5
        outer = torch.randn(HIDDEN, OUTPUTS, generator=draw)
        hidden = torch.randn(TRAINING_ROWS + VALIDATION_ROWS, INPUTS, generator=draw)
        targets = torch.tanh(hidden @ inner) @ outer
        rows = torch.cat([hidden * scales @ rotation, targets / targets.square().mean().sqrt()], dim=1)
        name = f"a regression of condition number {CONDITION:g}"
        return Corpus(name, rows[:TRAINING_ROWS], rows[TRAINING_ROWS:], (), ())

    @staticmethod
    def build(options: Options) -> Model:
        return Perceptron(options.layers, INPUTS, options.width, OUTPUTS)

    def loss(self, model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
        """Mean square error over the `context` rows that begin at each of `starts`."""
        rows = text[(starts[:, None] + torch.arange(self.options.context)).flatten()].to(self.ranks.device)
        return F.mse_loss(model(rows[:, :INPUTS]), rows[:, INPUTS:])
