"""The optimizer's numbers in what Hugging Face's Trainer reports, beside the loss and on a board."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from kl_dist import KLShampoo
from tests.jobs import as_started, board_of
from tests.models import raising
from tests.test_huggingface import OPTIONS, Learner, samples

pytest.importorskip("accelerate")


def run_with_stats(group: dist.ProcessGroup, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the Trainer keeps of its lines, and what a callback of the user's is given."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from kl_dist.huggingface import Consolidating, KLShampooFactory, log_stats

    given: list[dict[str, Any]] = []

    class Listens(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            given.append(dict(logs))

    class Gathering(Consolidating, Trainer):
        pass

    with as_started(group, "huggingface"):
        wanted = {"max_steps": 6, "logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 2}
        trainer = Gathering(
            model=Learner(),
            args=TrainingArguments(
                str(folder), report_to=["tensorboard"], use_cpu=True, disable_tqdm=True, eval_strategy="epoch", **wanted
            ),
            train_dataset=samples()[:12],
            eval_dataset=samples()[:4],
            optimizer_cls_and_kwargs=(KLShampooFactory, OPTIONS),
            callbacks=[Listens()],
        )
        with raising(ValueError, "matrices_every is 0: a number of steps"):
            log_stats(trainer, 0)
        callback = log_stats(trainer, matrices_every=3)
        trainer.train()
        trainer.remove_callback(callback)
        trainer.log({"loss": 1.0})
        return trainer.state.log_history, given


@pytest.fixture(scope="module")
def reported(worlds, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("reported")
    return folder, worlds[2].run(run_with_stats, 2, folder, timeout=120)


def test_numbers_of_the_optimizer_stand_beside_the_loss_in_every_report(reported):
    folder, ((kept, given), (others, _)) = reported
    *lines, last = [line for line in kept if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and "kl_shampoo/restarts" not in last
    rms = {line["step"]: line["kl_shampoo/update_rms"] for line in lines}
    assert all(0.05 < x < 1 for x in rms.values())
    assert [line.get("kl_shampoo/update_rms") for line in others] == [
        line.get("kl_shampoo/update_rms") for line in kept
    ]
    assert not any("kl_shampoo/update_rms" in line for line in kept if "eval_loss" in line)
    heard = [line for line in given if "kl_shampoo/restarts" in line]
    assert [line.get("kl_shampoo/update_rms") for line in heard] == [
        line.get("kl_shampoo/update_rms") for line in lines
    ]
    board = board_of(folder)
    assert board["train/kl_shampoo/update_rms"] == pytest.approx(rms, rel=1e-6)
    assert {f"train/{name}" for name in lines[-1] if name.startswith("kl_shampoo/")} <= board.keys()


def test_each_matrix_is_reported_at_its_interval_and_neither_printed_nor_kept(reported):
    folder, ((kept, given), _) = reported
    assert not any("/matrices/" in name for line in kept + given for name in line)
    board = {name: values for name, values in board_of(folder).items() if "/matrices/" in name}
    names = {unit.name for unit in KLShampoo(Learner(), **OPTIONS).plan.units if unit.method != "adamw"}
    assert {name.split("/")[3] for name in board} == names
    for name in names:
        of = f"train/kl_shampoo/matrices/{name}"
        assert set(board[f"{of}/effective_rank.0"]) == set(board[f"{of}/weight_rms"]) == {1, 4}
        low, high = board[f"{of}/eigenvalues.0/q0"][4], board[f"{of}/eigenvalues.0/q100"][4]
        assert high / low == pytest.approx(board[f"{of}/condition.0"][4], rel=1e-5)
