"""A folder of torch.distributed.checkpoint that a stranger wrote runs nothing, and is refused by name."""

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from kl_dist import KLShampoo
from kl_dist.checkpoint import reading
from kl_dist.checkpoint.verify import is_sums
from kl_dist.options import CAME_LATER
from tests.checkpoints import make, state_of
from tests.models import same_bits

SAID: list[str] = []


def speak(word: str) -> str:
    """What a stranger would have run; it is harmless."""
    SAID.append(word)
    return word


class Stranger:
    def __reduce__(self) -> Any:
        return speak, ("run",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "saved"
    dcp.save({"optimizer": make().state_dict(), "also": {"step": 3, "of": [1.5, None]}}, checkpoint_id=path)
    return path


def loaded(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    optimizer = make(steps=0)
    state = {"optimizer": optimizer.state_dict(), "also": {"step": 0, "of": []}}
    reading.load(state, folder)
    optimizer.load_state_dict(state["optimizer"])
    return state["also"], state_of(optimizer)


def test_what_was_saved_is_loaded_plain_data_and_tensors(folder):
    reading.check(folder)
    also, state = loaded(folder)
    assert also == {"step": 3, "of": [1.5, None]} and same_bits(state, state_of(make()))


def rewritten(folder: Path, change) -> None:
    path = folder / ".metadata"
    found: Metadata = pickle.loads(path.read_bytes())
    change(found)
    path.write_bytes(pickle.dumps(found))


def call_in_metadata(folder: Path) -> None:
    rewritten(folder, lambda found: found.planner_data.update(mine=Stranger()))


def call_instead_of_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Stranger()))


def call_in_what_is_no_tensor(folder: Path) -> None:
    """In the place of the step, in a file of its own."""
    file = io.BytesIO()
    torch.save(Stranger(), file)
    (folder / "mine").write_bytes(file.getvalue())

    def change(found: Metadata) -> None:
        for index, place in found.storage_data.items():
            if index.fqn == "also.step":
                place.relative_path, place.offset, place.length = "mine", 0, len(file.getvalue())

    rewritten(folder, change)


def elsewhere(folder: Path) -> None:
    (folder.parent / "secret").write_bytes((folder / "__0_0.distcp").read_bytes())

    def change(found: Metadata) -> None:
        for place in found.storage_data.values():
            place.relative_path = "../secret"

    rewritten(folder, change)


def by_a_link(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder.parent / "secret")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "secret")


STRANGE = {
    call_in_metadata: r"\.metadata .*names tests\.test_reading\.speak",
    call_instead_of_metadata: r"\.metadata .*names tests\.test_reading\.speak",
    call_in_what_is_no_tensor: "Unsupported global|weights_only|Weights only",
    elsewhere: r"\.\./secret, which is no file of this folder",
    by_a_link: "which is no file of this folder",
}


@pytest.mark.parametrize("strange", STRANGE, ids=lambda one: one.__name__)
def test_what_a_stranger_put_there_is_refused_and_not_run(folder, strange):
    strange(folder)
    SAID.clear()
    with pytest.raises(ValueError, match=STRANGE[strange]):
        reading.check(folder)
    with pytest.raises((ValueError, dcp.CheckpointException), match=STRANGE[strange]):
        loaded(folder)
    assert SAID == []


def test_torch_itself_would_run_it(folder):
    """So that the tests above are of something."""
    call_in_metadata(folder)
    SAID.clear()
    dcp.load({"also": {"step": 0}}, checkpoint_id=folder)
    assert SAID == ["run"]


def test_a_folder_of_an_earlier_version_loads_with_one_line(folder, tmp_path, caplog):
    state = make().state_dict()
    for entries in state["state"].values():
        for key in list(filter(is_sums, entries)):
            del entries[key]
    for group in state["param_groups"]:
        del group["saved"]
    shutil.rmtree(folder)
    dcp.save({"optimizer": state, "also": {"step": 3, "of": []}}, checkpoint_id=folder)
    assert same_bits(loaded(folder)[1], state_of(make()))
    said = [record.message for record in caplog.records if record.name.startswith("kl_dist")]
    assert len(said) == 1 and said[0].startswith("this state came without checksums")


def test_a_flattened_folder_of_an_earlier_version_loads_too(tmp_path):
    """As torchtitan saves: there torch asks for each option of each parameter."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model = nn.Linear(6, 4)
    model.weight.grad, model.bias.grad = torch.ones(4, 6), torch.ones(4)
    before = KLShampoo(model, final_beta1=0.9, polar=2)
    before.step()
    state = {"optimizer": get_optimizer_state_dict(model, before, options=flat)}
    for key in list(state["optimizer"]):
        if is_sums(key) or key.rpartition(".")[2] in ("saved", *CAME_LATER):
            del state["optimizer"][key]
    assert len(state["optimizer"]) > 20
    dcp.save(state, checkpoint_id=tmp_path / "saved")
    after = KLShampoo(model, polar=1)
    state = {"optimizer": get_optimizer_state_dict(model, after, options=flat)}
    reading.load(state, tmp_path / "saved")
    set_optimizer_state_dict(model, after, state["optimizer"], options=flat)
    assert same_bits(state_of(after), state_of(before))
    group = after.param_groups[0]
    assert (group["final_beta1"], group["polar"], group["shampoo_exponent"]) == (None, 1, 0.7)


def test_a_folder_of_an_earlier_version_that_torch_loads_in_part_goes_on_without_what_came_later(tmp_path):
    """There torch leaves the options of the optimizer that it loads for, of which the seal says nothing."""
    before = make()
    del before.param_groups[0]["final_beta1"]  # with the seal of a version that has none
    dcp.save({"optimizer": before.state_dict()}, checkpoint_id=tmp_path / "saved")
    after = make(steps=0)
    state = {"optimizer": after.state_dict()}
    assert after.param_groups[0]["final_beta1"] == 0.99
    in_part = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=tmp_path / "saved", planner=in_part)
    after.load_state_dict(state["optimizer"])
    assert same_bits(state_of(after), state_of(before)) and after.param_groups[0]["final_beta1"] is None
