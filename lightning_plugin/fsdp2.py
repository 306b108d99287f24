"""FSDP2 under a Trainer: what Lightning's ModelParallelStrategy lacks for modules that were written for DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor

from kl_dist import KLShampoo
from kl_dist.checkpoint.load import causes_of
from kl_dist.checkpoint.reading import check
from lightning_plugin.restoring import REMEDY, restore, with_word_to_adamw
from lightning_plugin.sharding import shard
from lightning_plugin.together import CalledTogether
from lightning_plugin.unwrapping import unwrapped

OF_AN_EARLIER_VERSION = (
    "A folder that an earlier version wrote lacks keys that torch asks for: renew it as docs/checkpoints.md says, by"
    " kl_dist.checkpoint.reading.load"
)


class SpreadsOverAllRanks:
    """Mixin of a model-parallel strategy: data parallel over all devices, unless it is told otherwise.

    Args:
        data_parallel_size: ranks that share a copy of the parameters; "auto" is all that tensor parallelism leaves.
        tensor_parallel_size: ranks that share a layer, as the user's code lays it out.
    """

    def __init__(
        self,
        *,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = 1,
        **others: Any,
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,  # type: ignore[call-arg]
            tensor_parallel_size=1 if tensor_parallel_size == "auto" else tensor_parallel_size,
            **others,
        )

    def setup_environment(self: Any) -> None:
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes // self._tensor_parallel_size
        super().setup_environment()  # type: ignore[misc]


class UnderFSDP2:
    """Mixin of a Trainer's strategy: shards a module that has no `configure_model`, loads either kind of checkpoint."""

    _is_overridden: ClassVar[Callable[..., bool]]
    """The namespace's is_overridden."""

    optimizer_checkpoint: str
    _shards_for_module = False
    _calls: CalledTogether | None = None

    def setup(self: Any, trainer: Any) -> None:
        module = self.lightning_module
        self._shards_for_module = not type(self)._is_overridden("configure_model", module)
        if not self._shards_for_module:
            super().setup(trainer)  # type: ignore[misc]
            return
        if self._tensor_parallel_size != 1:
            raise ValueError("tensor_parallel_size needs a configure_model that says which layers are divided, and how")
        for part in (module,) if module.automatic_optimization else _called_parts(module):
            shard(part, self.device_mesh["data_parallel"], self.root_device)
        with _configured(module):
            super().setup(trainer)  # type: ignore[misc]

    def setup_optimizers(self: Any, trainer: Any) -> None:
        self._calls = CalledTogether(self.lightning_module)
        self.lightning_module.toggle_optimizer = _refuse_to_toggle
        if self.device_mesh["data_parallel"].size() > 1:
            _check_sharded(self.lightning_module)
        super().setup_optimizers(trainer)  # type: ignore[misc]

    def teardown(self: Any) -> None:
        if self._calls is not None:
            self._calls.end()
            self._calls = None
            vars(self.lightning_module).pop("toggle_optimizer", None)
        super().teardown()  # type: ignore[misc]

    def backward(self: Any, *arguments: Any, **options: Any) -> Any:
        with self._in_step():  # checkpointed activations are computed again, by forward
            return super().backward(*arguments, **options)  # type: ignore[misc]

    def _in_step(self) -> AbstractContextManager[None]:
        return nullcontext() if self._calls is None else self._calls.step()

    # The sharded parameters are gathered by hooks on forward, which a Trainer's steps do not call by themselves.

    def training_step(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._through_forward("training_step", *arguments, **options)

    def validation_step(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._through_forward("validation_step", *arguments, **options)

    def test_step(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._through_forward("test_step", *arguments, **options)

    def predict_step(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._through_forward("predict_step", *arguments, **options)

    def _through_forward(self: Any, step: str, *arguments: Any, **options: Any) -> Any:
        module = self.lightning_module
        with self._in_step():
            if not self._shards_for_module or not module.automatic_optimization:
                return getattr(module, step)(*arguments, **options)
            return self._forward_redirection(module, module, step, *arguments, **options)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def optimizer_state(self: Any, optimizer: Any) -> dict[str, Any]:
        if self._save_distributed_checkpoint or not isinstance(unwrapped(optimizer), KLShampoo):
            return super().optimizer_state(optimizer)  # type: ignore[misc]
        unwrapped(optimizer).consolidate_state_dict()  # the very file that DDP writes
        return with_word_to_adamw(unwrapped(optimizer).state_dict()) if self.is_global_zero else {}

    def load_checkpoint(self: Any, checkpoint_path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        how, optimizers = self.optimizer_checkpoint, self._optimizers
        if self.lightning_module.trainer.state.fn != "fit":
            how = "ignore"  # the weights are all that is wanted
        divided = Path(self.broadcast(checkpoint_path)).is_dir()
        if divided:
            check(Path(checkpoint_path))  # torch would run what a stranger has put there
        if divided and how == "partial":
            raise ValueError(f"optimizer_checkpoint='partial' needs a checkpoint in one file, not {checkpoint_path}")
        try:
            if not divided or how == "ignore":
                self._optimizers = []  # Lightning then loads the module alone
            loaded = super().load_checkpoint(checkpoint_path, *arguments, **options)  # type: ignore[misc]
        except CheckpointException as problem:
            found = f"{checkpoint_path} does not fit: {causes_of(problem)}"
            raise ValueError(f"{found}. {OF_AN_EARLIER_VERSION}. {REMEDY}, of one file") from problem
        finally:
            self._optimizers = optimizers
        if not divided and how != "ignore" and optimizers:
            if "optimizer_states" not in loaded:
                raise KeyError(f"{checkpoint_path} has the weights alone. {REMEDY}")
            restore(optimizers, loaded["optimizer_states"], how)
        return loaded


def _refuse_to_toggle(optimizer: Any) -> None:
    raise RuntimeError(
        "toggle_optimizer freezes the other optimizers' parameters, of which FSDP2 hears too late: leave it and"
        " untoggle_optimizer out, and zero the others' gradients after each backward (optimizer.zero_grad())"
    )


def _check_sharded(module: nn.Module) -> None:
    for name, p in module.named_parameters():
        if p.requires_grad and not isinstance(p, DTensor):
            raise ValueError(
                f"configure_model left {name!r} whole on every rank, where one rank's samples would train it: shard it"
                " there (fully_shard), or leave configure_model out and have the strategy shard the module"
            )


def _called_parts(module: Any) -> list[nn.Module]:
    """What a module that steps its optimizers itself calls: its children, whose outputs gradients flow back through.

    Its own training_step returns nothing, so that no hook on it would be met by a gradient.
    """
    for name, _ in module.named_parameters(recurse=False):
        raise ValueError(
            f"with manual optimization the strategy shards the submodules, and {name!r} is in none: put it into one, or"
            " define configure_model"
        )
    return [child for child in module.children() if any(True for _ in child.parameters())]


@contextmanager
def _configured(module: Any) -> Iterator[None]:
    """The module has a `configure_model`, without which Lightning refuses it: the strategy has done its work."""
    module.configure_model = lambda: None
    try:
        yield
    finally:
        del module.configure_model
