"""A folder of torch.distributed.checkpoint, read without running what a stranger may have put there.

torch reads `.metadata`, and what is no tensor, by plain pickle, which calls whatever it is told to call. Here pickle
knows the classes that torch.distributed.checkpoint writes and no others, and what is no tensor is read as torch.load
does with weights_only. A name that is not known is refused before anything of it is imported or built.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from kl_dist.checkpoint.seals import SAVED
from kl_dist.checkpoint.verify import is_sums
from kl_dist.options import BEGINS_WITH_A_RUN, CAME_LATER

METADATA = ".metadata"

GROUPS = "param_groups."  # what torch's flattened names of options begin with

KNOWN: Mapping[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{("torch", str(x).removeprefix("torch.")): x for x in vars(torch).values() if isinstance(x, torch.dtype)},
    # of the folder it was written to, which is not used
    **{(module, name): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local") for name in ("PosixPath",)},
    **{
        (module, name): pathlib.PureWindowsPath for module in ("pathlib", "pathlib._local") for name in ("WindowsPath",)
    },
}


class Unpickler(pickle.Unpickler):
    """Of `.metadata`. Raises pickle.UnpicklingError for any name that is not in KNOWN."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which torch.distributed.checkpoint does not write")
        return KNOWN[module, name]


class Reader(dcp.FileSystemReader):
    """torch's, of a folder that a stranger may have written."""

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        """What the folder holds, and where.

        Raises:
            ValueError: it is damaged, names what it has no business with, or files outside of the folder.
        """
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                found = Unpickler(file).load()
            if not isinstance(found, metadata.Metadata) or not isinstance(found.storage_data, dict):
                raise pickle.UnpicklingError("it is no metadata")
            for place in found.storage_data.values():
                name = Path(place.relative_path)
                if name.name != str(name) or (path.parent / name).is_symlink():
                    raise pickle.UnpicklingError(f"it names {place.relative_path}, which is no file of this folder")
        except OSError as problem:
            raise ValueError(f"{path} cannot be read: {problem.strerror}") from None
        except Exception as problem:  # of damaged bytes pickle raises anything
            raise ValueError(f"{path} is damaged, or not to be trusted: {problem}") from None
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class Planner(dcp.DefaultLoadPlanner):
    """torch's, for which what is no tensor is plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        super().load_bytes(read_item, _saved_again(plain))


def _saved_again(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


class _Looking(Planner):
    """Reads what is no tensor, and keeps nothing."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)


def load(state: dict[str, Any], folder: Path, process_group: dist.ProcessGroup | None = None) -> None:
    """As dcp.load, of a folder that a stranger or an earlier version may have written; a collective.

    Places for the checksums of the optimizer's state, and for options that came later, are taken out of `state` where
    the folder has none. Where torch has flattened the groups it asks for every option afterwards: there those that a
    run of before goes on without are None, and the others stay.

    Raises:
        CheckpointException: as dcp.load, on all ranks; also where the folder is damaged or not to be trusted.
    """
    reader, flat = Reader(folder), []
    with contextlib.suppress(ValueError):  # dcp.load meets it too, and tells all ranks of it
        there = reader.read_metadata().state_dict_metadata
        _take_out_what_came_later(state, there)
        flat = list(_take_out_flat_options(state, there))
    dcp.load(state, storage_reader=reader, planner=Planner(), process_group=process_group)
    for holder, key, value in flat:
        holder[key] = value


def _take_out_what_came_later(state: dict[str, Any], there: Mapping[str, Any]) -> None:
    for key, path in flatten_state_dict(state)[1].items():
        if key not in there and (is_sums(str(path[-1])) or SAVED in path[-2:] or path[-1] in CAME_LATER):
            _take_out(state, path)


def _take_out_flat_options(state: Any, there: Mapping[str, Any], within: str = "") -> Iterator[tuple[Any, str, Any]]:
    """Those that came later of groups that torch has flattened: "param_groups.layer.weight.final_beta1".

    Yields:
        What held each, its key, and what to put back.
    """
    for key in list(state):
        option = str(key).rpartition(".")[2]
        if not str(key).startswith(GROUPS):
            if isinstance(state[key], dict):
                yield from _take_out_flat_options(state[key], there, f"{within}{key}.")
        elif option == SAVED and f"{within}{key}.steps" not in there:
            del state[key]
        elif option in CAME_LATER and f"{within}{key}" not in there:
            value = state.pop(key)
            yield state, key, None if option in BEGINS_WITH_A_RUN else value


def _take_out(state: Any, path: tuple[Any, ...]) -> None:
    """Where torch has words for the numbers that parameters go by."""
    for depth, step in enumerate(path):
        if isinstance(state, dict):
            step = next((key for key in state if str(key) == str(step)), None)
            if step is None:
                return  # with what held it
            if depth == len(path) - 1 or step == SAVED:
                del state[step]
                return
        state = state[step]


def check(folder: Path) -> None:
    """Raises ValueError unless torch's own reader may be let loose on a folder: its metadata, and what is no tensor."""
    reader, planner = Reader(folder), _Looking()
    found = reader.read_metadata()
    plain = {
        key: io.BytesIO()
        for key, one in found.state_dict_metadata.items()
        if isinstance(one, metadata.BytesStorageMetadata)
    }
    planner.set_up_planner(plain, found, True)
    reader.set_up_storage_reader(found, True)
    plan = planner.create_local_plan()
    assert all(item.type is LoadItemType.BYTE_IO for item in plan.items)
    try:
        reader.read_data(plan, planner).wait()
    except Exception as problem:  # as above
        raise ValueError(f"{folder} is damaged, or not to be trusted: {problem}") from None
