"""The peak of what a step allocates: tensors that did not exist before it."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors made within while they live; `peak` is their largest sum. For eager code on CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}  # by address, which a later storage may have again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), counted=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, counted=True)
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._known.values()))
        return result

    def _note(self, values: Any, counted: bool) -> None:
        self._known = {key: known for key, known in self._known.items() if not known[0].expired()}
        for storage in (x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self._known:
                self._known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() if counted else 0)
