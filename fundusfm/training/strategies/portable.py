"""What all our strategies share: checkpoints are read and written as pieces, never as Lightning's own files.

Lightning keeps what it knows of loops, schedule and callbacks; tensors of the model and of the optimiser are
ours. So a run saved under one strategy goes on under any other, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import Strategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fundusfm.errors import EveryRankError
from fundusfm.objectives import cached
from fundusfm.objectives.base import Objective
from fundusfm.training.checkpoint import OPTIMISER, WEIGHTS, load_trainer_state, pieces_of
from fundusfm.training.pieces import Piece, PieceReader

_GROUPS = "optimiser_groups"
Save = Callable[[dict[str, Any], Path], None]


class Portable(Strategy):
    """Mixed into a Lightning strategy, before it. Subclasses say which pieces of the tensors a rank holds."""

    save: Save  # set by whoever saves; called on every rank
    is_fork = False  # what is loaded belongs to another recipe, whose rates and decays do not count

    @property
    def objective(self) -> Objective:
        assert isinstance(self.lightning_module, Objective)
        return self.lightning_module

    @property
    def base_optimiser(self) -> torch.optim.Optimizer:
        """The optimiser that holds state and hyper-parameters."""
        return self.optimizers[0]

    def differentiate(self, value: Tensor) -> None:
        """Add the gradients of a piece of the batch; they are averaged when the step ends."""
        cached.differentiate(value)

    def setup(self, trainer: Any) -> None:
        if self.objective.recipe.trainer.compile:
            self.compile_blocks()
        super().setup(trainer)
        self.objective.differentiate = self.differentiate

    def compile_blocks(self) -> None:
        """Every block of the towers runs through `torch.compile`, what surrounds them does not.

        The hooks of a strategy, the packing of texts and the choice of patches give a compiler nothing to
        gain and a new case to compile at every step. Blocks that are alike share what was compiled.
        """
        blocks = list(blocks_of(self.objective))
        # The code of a block is compiled again for each width and dropout rate, with and without gradients,
        # for one batch size and for any. Beyond its limit, 8 unless raised, PyTorch would not compile it.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 8 * len(blocks))
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 16 * len(blocks))
        for block in blocks:
            block.forward = torch.compile(block.forward)

    def gathered(self) -> AbstractContextManager[None]:
        """Within it the objective may be run outside of a step, by every rank at once."""
        return nullcontext()

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Blocks that run again here, to save memory, would move averages of batch normalisation twice."""
        averages = self._averages() if self.objective.recipe.model.vision.gradient_checkpointing else []
        kept = [average.clone() for average in averages]
        loss = super().backward(*args, **kwargs)
        for average, value in zip(averages, kept, strict=True):
            average.copy_(value)
        return loss

    def _averages(self) -> list[Tensor]:
        normalisations = (m for m in self.objective.modules() if isinstance(m, _BatchNorm))
        return [average for module in normalisations for average in module.buffers(recurse=False)]

    def weights(self) -> list[Piece]:
        """This rank's pieces of parameters and buffers, in the same order on every rank."""
        aliases = tied_names(self.objective)
        state = self.objective.state_dict()
        return [self.piece(name, tensor) for name, tensor in state.items() if name not in aliases]

    def optimiser(self) -> list[Piece]:
        """This rank's pieces of the optimiser's state, named `exp_avg/vision.proj.weight`."""
        pieces = []
        for name, parameter in self._trained():
            for key, value in sorted(self.base_optimiser.state.get(parameter, {}).items()):
                pieces.append(self.piece(f"{key}/{name}", value))
        return pieces

    def piece(self, name: str, tensor: Tensor) -> Piece:
        """What this rank holds of a tensor."""
        return Piece.whole(name, tensor)

    def group_names(self) -> list[list[str]]:
        """Names of the parameters of each group of the optimiser."""
        names = {id(parameter): name for name, parameter in self.objective.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self.base_optimiser.param_groups]

    def restore_weights(self, reader: PieceReader) -> None:
        """Bring back parameters and buffers in place."""
        for piece in self.weights():
            reader.fill(piece)

    def restore_optimiser(self, reader: PieceReader) -> None:
        """Bring back the optimiser's state; what it has so far is dropped."""
        keys: dict[str, list[str]] = {}
        for full in reader.names:
            key, _, name = full.partition("/")
            keys.setdefault(name, []).append(key)
        self._make_state(keys, reader)
        for piece in self.optimiser():
            if reader.has(piece.name):  # a fork may train what was frozen
                reader.fill(piece)

    def _make_state(self, keys: Mapping[str, list[str]], reader: PieceReader) -> None:
        for name, parameter in self._trained():
            self.base_optimiser.state[parameter] = {
                key: empty_state(parameter, reader.shape(f"{key}/{name}") == tuple(parameter.shape))
                for key in keys.get(name, ())
            }

    def refuse_untouched(self) -> None:
        """EveryRankError if a trained parameter got no gradient: over ranks it has no mean."""
        for name, parameter in self._trained():
            if parameter.grad is None:
                raise EveryRankError(
                    f"{name} got no gradient", where="objective.name", fix="freeze what the loss does not use"
                )

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.objective.named_parameters() if p.requires_grad)

    # What Lightning asks of a strategy.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass  # `load_checkpoint` has done it

    def load_optimizer_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Collective."""
        hyper = [{k: v for k, v in g.items() if k != "params"} for g in self.base_optimiser.param_groups]
        checkpoint[_GROUPS] = [
            {"names": names, **values} for names, values in zip(self.group_names(), hyper, strict=True)
        ]
        self.save(checkpoint, Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Bring back everything from a folder that was verified before. Collective."""
        folder = Path(checkpoint_path)
        state = load_trainer_state(folder)
        with torch.no_grad():
            self.restore_weights(_known(pieces_of(folder, WEIGHTS), self.objective, folder))
            self.restore_optimiser(pieces_of(folder, OPTIMISER))
        self._enter_schedule(state["lr_schedulers"])
        if not self.is_fork:
            restore_groups(self.base_optimiser, self.group_names(), state[_GROUPS])
        return state

    def _enter_schedule(self, saved: list[dict[str, Any]]) -> None:
        """Our own schedule, at the step of the checkpoint; `saved` is what Lightning will load.

        The saved one belongs to the groups that there were, and in a fork to other rates.
        """
        for number, config in enumerate(self.lr_scheduler_configs):
            schedule: Any = config.scheduler
            step = saved[number]["last_epoch"]
            factors = [factor(step) for factor in schedule.lr_lambdas]
            rates = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
            for group, rate in zip(self.base_optimiser.param_groups, rates, strict=True):
                group["lr"] = rate
            now = {"last_epoch": step, "_step_count": saved[number]["_step_count"], "_last_lr": rates}
            saved[number] = {**schedule.state_dict(), **now}


def tied_names(module: nn.Module) -> dict[str, str]:
    """Further names of tensors that a state dict holds twice or more -> the first name."""
    first: dict[tuple[int, torch.Size], str] = {}
    aliases = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found = first.setdefault((id(tensor), tensor.shape), name)
        if found != name:
            aliases[name] = found
    return aliases


def empty_state(parameter: Tensor, is_like_parameter: bool) -> Tensor:
    """Room for one value of an optimiser's state: an average as the parameter, or a count of steps."""
    return torch.zeros_like(parameter) if is_like_parameter else torch.zeros((), dtype=torch.float32)


def restore_groups(
    optimiser: torch.optim.Optimizer, names: list[list[str]], saved: list[dict[str, Any]]
) -> None:
    """Rates and decays of each group, found by the names of its parameters, whatever their order."""
    by_name = {name: group for group in saved for name in group["names"]}
    for group, wanted in zip(optimiser.param_groups, names, strict=True):
        for name in wanted[:1]:
            group.update({k: v for k, v in by_name[name].items() if k != "names"})


def _known(reader: PieceReader, objective: Objective, folder: Path) -> PieceReader:
    """The reader, once it has a tensor for every name of the objective and no other."""
    aliases = tied_names(objective)
    state: dict[str, Any] = objective.state_dict(keep_vars=True)
    # ZeRO's third stage leaves an empty tensor, and notes the shape.
    expected = {n: tuple(getattr(t, "ds_shape", t.shape)) for n, t in state.items() if n not in aliases}
    found = {name: reader.shape(name) for name in reader.names}
    odd = sorted(name for name, _ in expected.items() ^ found.items())
    if odd:
        name = odd[0]
        raise EveryRankError(
            f"{len({*odd})} tensors of the checkpoint do not fit the objective: {name} is "
            f"{found.get(name, 'missing')}, not {expected.get(name, 'known')}",
            where=str(folder),
            fix="resume with the recipe and the code that wrote it",
        )
    return reader


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of towers, each once, also where parts of an objective share a tower.

    They are the members of the outermost lists whose members are alike and composed. Members that are mere
    sequences are looked into: some towers run what is in them without them.
    """
    return iter({id(block): block for block in _blocks_in(module)}.values())


def _blocks_in(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        members = list(child.children()) if isinstance(child, (nn.ModuleList, nn.Sequential)) else []
        kinds = {type(member) for member in members}
        if len(kinds) == 1 and all(_is_composed(member) for member in members):
            yield from members
        else:
            yield from _blocks_in(child)


def _is_composed(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    return any(True for _ in module.children()) and any(True for _ in module.parameters())
