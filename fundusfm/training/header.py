"""The start of a run in one screen: what is trained on what, and the arithmetic of its sizes."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from fundusfm.objectives.base import Objective
from fundusfm.recipe.schema import Negatives, Recipe
from fundusfm.stream.datamodule import Stream
from fundusfm.training.facts import count_parameters
from fundusfm.training.strategies.memory import memory_line
from fundusfm.training.strategies.portable import blocks_of


def header_rows(recipe: Recipe, objective: Objective, stream: Stream, place: str) -> dict[str, str]:
    """The lines of the header, by name."""
    batch, exams, steps = recipe.data.global_batch_size, stream.num_exams, objective.total_steps
    trained, total = count_parameters(objective)
    frozen = f", {total - trained:,} frozen" if total > trained else ""
    sources = ", ".join(
        f"{i.name} ({r.num_exams:,})" for i, r in zip(stream.indices, stream.readers, strict=True)
    )
    return {
        "objective": f"{recipe.objective.name}, {recipe.objective.fidelity.value}",
        "towers": f"{recipe.model.vision.name} at {recipe.data.image_size} px; {_text(recipe)}",
        "parameters": f"{trained:,} trained{frozen}",
        **_weights(recipe, objective),
        "unique exams": f"{exams:,} from {sources}",
        **stream.remarks,
        "global batch": _global_batch(recipe),
        "length": f"{steps:,} steps = {steps * batch:,} exams = {steps * batch / exams:.2f} passes "
        f"of {exams / batch:.1f} steps",
        "validation": _validation(recipe, stream),
        "runs on": f"{place}, {recipe.trainer.strategy.value}, {recipe.trainer.precision.value}, "
        f"{recipe.data.workers} loader workers a rank",
        **_compiled(recipe, objective),
        "memory": memory_line(recipe, objective),
        "run folder": f"{recipe.runs_dir}/{recipe.name}",
    }


def _weights(recipe: Recipe, objective: Objective) -> dict[str, str]:
    """What the towers start from, and plainly what they do not."""
    if recipe.model.weights is None:
        return {}
    parts = ", ".join(sorted({name.partition(".")[0] for name in objective.fresh}))
    told = f"; {len(objective.fresh)} tensors are not in it and start at random: {parts}" if parts else ""
    return {"weights": f"{recipe.model.weights}{told}"}


def _global_batch(recipe: Recipe) -> str:
    ranks, batch = recipe.trainer.devices * recipe.trainer.nodes, recipe.data.global_batch_size
    micro = recipe.data.micro_batch_size or batch // ranks
    count = batch // ranks // micro
    sizes = f"{batch} exams = {micro} a rank x {count} micro-batch{'es' if count > 1 else ''} x {ranks} ranks"
    if count == 1:
        return sizes
    if recipe.objective.negatives is Negatives["micro"]:
        return f"{sizes}; contrasted within each {micro * ranks}, not the whole batch"
    return f"{sizes}; contrasted as a whole, all but one encoded twice"


def _validation(recipe: Recipe, stream: Stream) -> str:
    if recipe.trainer.val_every_steps is None:
        return "none while training"
    return f"every {recipe.trainer.val_every_steps} steps" if stream.has_val else "none: no val split"


def _compiled(recipe: Recipe, objective: Objective) -> dict[str, str]:
    """Towers without repeated blocks exist, and nothing else is compiled."""
    if not recipe.trainer.compile:
        return {}
    kinds = Counter(type(block).__name__ for block in blocks_of(objective))
    return {"compiled": ", ".join(f"{number} {kind}" for kind, number in kinds.items()) or "no block"}


def _text(recipe: Recipe) -> str:
    return recipe.objective.language_part(recipe.model.text) if recipe.objective.reads_text else "no text"


def show_header(console: Console, rows: dict[str, str], start: str) -> None:
    """Print the header; `start` says where training begins."""
    table = Table.grid(padding=(0, 2))
    for name, value in {**rows, "start": start}.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(Panel(table, title="fundusfm pretrain", title_align="left", expand=False))
