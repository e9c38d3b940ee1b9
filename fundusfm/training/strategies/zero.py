"""ZeRO through DeepSpeed, on CPU and GPU: optimiser state (1), gradients (2) and parameters (3) in pieces.

DeepSpeed trains, but its checkpoints are not used. They fit one world size only; their universal form needs a
conversion, drops frozen parameters and buffers, and in stage 3 gives every group the rates of the first. The
pieces of a rank are flat ranges of each parameter, and are saved and read as such.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from fundusfm.objectives.base import Objective
from fundusfm.recipe.schema import Precision, Recipe
from fundusfm.training.pieces import Piece, PieceReader
from fundusfm.training.strategies.portable import Portable, blocks_of, empty_state, tied_names
from fundusfm.training.watchdog import collective_timeout


class Zero(Portable, DeepSpeedStrategy):
    """Stages 1 and 2; `Zero3` changes where a rank's pieces lie."""

    def __init__(self, recipe: Recipe, stage: int) -> None:
        timeout = collective_timeout(recipe.trainer.stall_minutes)
        super().__init__(config=config_of(recipe, stage), logging_level=logging.ERROR, timeout=timeout)
        self._names: list[list[str]] = []

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {}  # else it compiles an operator that only inference uses
        DDPStrategy.setup_environment(self)  # Lightning's own refuses CPUs here, and nowhere else

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        """Lightning compares the numbers of devices, and those of CPUs have none."""
        numbered = devices and [
            torch.device("cpu", i) if one.type == "cpu" else one for i, one in enumerate(devices)
        ]
        self._parallel_devices = numbered

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        # Before DeepSpeed puts flat tensors into the groups.
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimiser, which wraps ours."""
        return self.optimizers[0]

    @property
    def base_optimiser(self) -> torch.optim.Optimizer:
        base: torch.optim.Optimizer = self.zero.optimizer
        return base

    def group_names(self) -> list[list[str]]:
        return self._names

    def differentiate(self, value: Tensor) -> None:
        """Stage 1 keeps the sums over pieces until the step ends; 2 and 3 add each to the ranks' shares."""
        engine = self.deepspeed_engine
        engine.set_gradient_accumulation_boundary(False)
        engine._backward_prologue()  # a hook of the whole forward pass calls it otherwise, and that goes on
        with torch.autocast(value.device.type, enabled=False):
            engine.backward(value, scale_wrt_gas=False)
        self.zero.clear_backward_seen_flag()  # else the next one of stage 3 replaces this one
        engine.set_gradient_accumulation_boundary(True)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._take_over_changes()
        return super().training_step(*args, **kwargs)

    def weights(self) -> list[Piece]:
        self._take_over_changes()
        aliases = tied_names(self.objective)
        state = self.objective.state_dict(keep_vars=True)
        pieces = [self._of_weight(name, tensor) for name, tensor in state.items() if name not in aliases]
        return [piece for piece in pieces if piece is not None]

    def optimiser(self) -> list[Piece]:
        found: list[Piece | None] = []
        for name, parameter in self._trained():
            flat = self._flat_of(parameter)
            for key, value in sorted(self.base_optimiser.state.get(flat, {}).items()):
                if value.shape == flat.shape:
                    found.append(self._range(f"{key}/{name}", parameter, value))
                else:
                    found.append(Piece.whole(f"{key}/{name}", value))
        return [piece for piece in found if piece is not None]

    def restore_weights(self, reader: PieceReader) -> None:
        super().restore_weights(reader)
        for name, parameter in self._trained():
            self._restore_working_copy(name, parameter, reader)

    def _make_state(self, keys: Mapping[str, list[str]], reader: PieceReader) -> None:
        for name, parameter in self._trained():
            flat = self._flat_of(parameter)
            for key in keys.get(name, ()):
                is_like_parameter = reader.shape(f"{key}/{name}") == _shape(parameter)
                self.base_optimiser.state[flat].setdefault(key, empty_state(flat, is_like_parameter))

    def _of_weight(self, name: str, tensor: Tensor) -> Piece | None:
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            return self._range(name, tensor, self._flat_of(tensor))
        return self._untrained(name, tensor)

    def _take_over_changes(self) -> None:
        """What the objective did to parameters after a step, such as clamps, goes into the master copy."""
        if type(self.objective).after_step is not Objective.after_step:
            with torch.no_grad():
                for _, parameter in self._trained():
                    self._to_master(parameter)

    # Where the pieces of a rank lie.

    def _flat_of(self, parameter: nn.Parameter) -> Tensor:
        """The flat master copy that holds a parameter's range, among those of others."""
        group = next(i for i, group in enumerate(self.zero.bit16_groups) if _is_in(parameter, group))
        flat: Tensor = self.zero.single_partition_of_fp32_groups[group]
        return flat

    def _range(self, name: str, parameter: Any, flat: Tensor) -> Piece | None:
        """This rank's range of a parameter in a flat tensor of its group, if it has any."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        address = mapping.hp_fragment_address
        values = flat.detach().narrow(0, address.start, address.numel)
        return Piece(name, _shape(parameter), mapping.lp_fragment_address.start, values, shared=False)

    def _untrained(self, name: str, tensor: Tensor) -> Piece:
        return Piece.whole(name, tensor)

    def _restore_working_copy(self, name: str, parameter: Any, reader: PieceReader) -> None:
        parameter.data.copy_(reader.whole(name))

    def _to_master(self, parameter: Any) -> None:
        if parameter._hp_mapping is not None:
            parameter._hp_mapping.update_hp()


class Zero3(Zero):
    """Stage 3: parameters are in pieces, too, frozen ones included."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # DeepSpeed replaces the gradients of the last step by those of the first piece. A temperature gets
        # its own with the last piece only, and that would be added to the one of the last step.
        self.zero.grad_partitions_flat_buffer.zero_()
        return super().training_step(*args, **kwargs)

    def compile_blocks(self) -> None:
        """A block fetches its parameters as a whole: a compiler would stop at hooks of its parts.

        DeepSpeed would also reduce their gradients as a whole, at every call of the block, which is too often
        for objectives that call it twice, and too early for a block whose input needs no gradient.
        """
        from deepspeed.runtime.zero import stage3
        from deepspeed.utils import set_z3_leaf_module

        super().compile_blocks()
        stage3.z3_leaf_parameter = lambda parameter: False
        for block in blocks_of(self.objective):
            set_z3_leaf_module(block, True)

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """With micro-batches, the loss's own parameters get their gradients in no call that fetches them."""
        has_pieces = self.objective.recipe.data.micro_batch_size is not None
        with self.gathered() if has_pieces else nullcontext():
            return super().backward(*args, **kwargs)

    def gathered(self) -> AbstractContextManager[None]:
        """Blocks fetch their own; tables and tokens between them are used without a call that would.

        Small parameters are fetched already, and the end of this would take away what a step did to them.
        """
        from deepspeed.runtime.zero import GatheredParameters

        in_blocks = {id(p) for block in blocks_of(self.objective) for p in block.parameters()}
        between = [p for p in self.objective.parameters() if id(p) not in in_blocks and not _stays_fetched(p)]
        whole: AbstractContextManager[None] = GatheredParameters(between)
        return whole

    def _flat_of(self, parameter: nn.Parameter) -> Tensor:
        flat: Tensor = self.zero.fp32_partitioned_groups_flat[self._position(parameter)[0]]
        return flat

    def _range(self, name: str, parameter: Any, flat: Tensor) -> Piece:
        _, offset, size = self._position(parameter)
        start, count = self._share(parameter, size)
        return Piece(name, _shape(parameter), start, flat.detach().narrow(0, offset, count), shared=False)

    def _untrained(self, name: str, tensor: Any) -> Piece:
        if not hasattr(tensor, "ds_tensor"):
            return Piece.whole(name, tensor)
        start, count = self._share(tensor, tensor.partition_numel())
        values = tensor.ds_tensor.detach().flatten().narrow(0, 0, count)
        return Piece(name, _shape(tensor), start, values, shared=False)

    def _restore_working_copy(self, name: str, parameter: Any, reader: PieceReader) -> None:
        start, count = self._share(parameter, parameter.partition_numel())
        if count:
            parameter.ds_tensor.data.flatten()[:count].copy_(reader.read(name, start, count))
        if _is_fetched(parameter):
            parameter.data.copy_(reader.whole(name))

    def _to_master(self, parameter: Any) -> None:
        """Small parameters, which stay fetched; others cannot be reached after a step."""
        if not _is_fetched(parameter):
            return
        group, offset, size = self._position(parameter)
        start, count = self._share(parameter, size)
        values = parameter.data.flatten()[start : start + count]
        parameter.ds_tensor.data[:count].copy_(values)
        self.zero.fp32_partitioned_groups_flat[group].data.narrow(0, offset, count).copy_(values)

    def _position(self, parameter: nn.Parameter) -> tuple[int, int, int]:
        group, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return group, offset, size

    def _share(self, parameter: Any, size: int) -> tuple[int, int]:
        """Start and number of this rank's values; the last ranks' shares are padded."""
        start = min(self.global_rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)


def config_of(recipe: Recipe, stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration; Lightning adds how gradients are clipped and that nothing is accumulated."""
    ranks = recipe.trainer.devices * recipe.trainer.nodes
    zero: dict[str, Any] = {
        "stage": stage,
        # Its own linear layer rounds otherwise than autocast does.
        "memory_efficient_linear": False,
        # Parameters of fewer values stay fetched.
        "stage3_param_persistence_threshold": 1000,
    }
    if recipe.trainer.offload:
        zero |= {
            place: {"device": "cpu"} for place in ("offload_optimizer", "offload_param")[: stage // 3 + 1]
        }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.data.global_batch_size // ranks,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if recipe.trainer.precision is Precision.bf16:
        # Its own bf16 mode would train bf16 weights, which is another arithmetic than that of DDP and FSDP.
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients travel in fp32
        }
    return config


def full_precision() -> DeepSpeedPrecision:
    """Lightning's part of both precisions: autocast is DeepSpeed's."""
    return DeepSpeedPrecision("32-true")


def _is_in(parameter: nn.Parameter, group: list[nn.Parameter]) -> bool:
    return any(parameter is one for one in group)


def _is_fetched(parameter: Any) -> bool:
    return bool(parameter.ds_status.name == "AVAILABLE")


def _stays_fetched(parameter: Any) -> bool:
    return bool(parameter.ds_persist) and _is_fetched(parameter)


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
