"""launch/train.py with something wrong in its model: `python tests/failing_job.py HOW RANK arguments of the job`.

In step 2: "raise", an error on one rank; "all", on every rank; "nan", a gradient that is not finite on one rank.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import Tensor, nn

from launch import endings, train


class Failing(train.Job):
    """The job whose loss fails."""

    step = 0

    def rows(self, step: int) -> Tensor:
        self.step = step
        return super().rows(step)

    def loss(self, model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
        found = super().loss(model, text, starts)
        if self.step < 2 or (HOW != "all" and self.ranks.rank != RANK):
            return found
        if HOW == "nan":
            return found * float("nan")
        raise ArithmeticError("the layers do not add up")


if __name__ == "__main__":
    HOW, RANK, *arguments = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    endings.process(lambda: train.main(arguments, Failing))
