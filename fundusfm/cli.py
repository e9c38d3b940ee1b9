"""The command line: one verb a function, no logic of its own; each calls one function of a room.

Rooms are imported inside the verbs, so that `fundusfm --help` does not wait for torch.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from fundusfm import __version__
from fundusfm.endings import plain_endings
from fundusfm.errors import UserError

if TYPE_CHECKING:
    from fundusfm.shards.index import ShardIndex

_KINDS = ("trained", "frozen", "buffer", "tied")


class _Verbs(TyperGroup):
    """The whole command line inside `plain_endings`."""

    def invoke(self, ctx: Any) -> Any:
        with plain_endings():
            return super().invoke(ctx)


class Crop(str, Enum):
    """`fov`: cut the dark frame around the field of view."""

    fov = "fov"
    none = "none"


_PLAIN: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
app = typer.Typer(cls=_Verbs, **_PLAIN)
recipe_app = typer.Typer(help="Recipes: what to run.", **_PLAIN)
shards_app = typer.Typer(help="Cohorts as tar shards: build, check, look at, adopt, synthesise.", **_PLAIN)
tokens_app = typer.Typer(help="Tokenizers, trained on a cohort's own reports.", **_PLAIN)
checkpoint_app = typer.Typer(help="Checkpoints of runs: are they whole, what they hold.", **_PLAIN)
weights_app = typer.Typer(help="Published weights, brought into our layout.", **_PLAIN)
app.add_typer(recipe_app, name="recipe")
app.add_typer(shards_app, name="shards")
app.add_typer(tokens_app, name="tokens")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(weights_app, name="weights")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides: optim.lr=1e-4")
]
ShardFolder = Annotated[str, typer.Argument(metavar="DIR", help="A folder of shards.")]
OutFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")]
OutFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write.")]


def _all_cores() -> int:
    from fundusfm.shards.workers import default_workers

    return default_workers()


Workers = Annotated[
    int, typer.Option(default_factory=_all_cores, min=1, help="Processes.", show_default="all cores")
]
Loaders = Annotated[
    int,
    typer.Option(
        default_factory=_all_cores,
        min=0,
        help="Processes that load; 0: this one, which on few cores is faster.",
        show_default="all cores",
    ),
]
ExamsPerShard = Annotated[int, typer.Option(min=1, help="Most exams in a tar.")]


def _say(console: Console, line: str) -> None:
    """Print a line as it is: no markup, no wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _say_built(index: ShardIndex) -> None:
    num_exams = sum(shard.num_exams for shard in index.shards)
    _say(Console(), f"{index.root}: {num_exams} exams in {len(index.shards)} shards")


def _show_version(wanted: bool) -> None:
    if wanted:
        Console().print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    """Pretrain ophthalmic foundation models."""


@recipe_app.command("show")
def recipe_show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print the resolved recipe, with where each value came from."""
    from fundusfm.objectives import config_of
    from fundusfm.recipe.load import load_recipe
    from fundusfm.recipe.show import show_recipe

    show_recipe(load_recipe(recipe, overrides or (), objective_config=config_of), Console())


@recipe_app.command("diff")
def recipe_diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A recipe file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="A recipe file to compare with it.")],
    overrides: Overrides = None,
) -> None:
    """Print what differs between two resolved recipes; overrides hold for both."""
    from fundusfm.objectives import config_of
    from fundusfm.recipe.load import load_recipe
    from fundusfm.recipe.show import show_diff

    resolved = [load_recipe(one, overrides or (), objective_config=config_of) for one in (a, b)]
    show_diff(resolved[0], resolved[1], (str(a), str(b)), Console())


@recipe_app.command("folder")
def recipe_folder(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print the run folder; before anything is started, refuses a recipe that cannot be, or not there."""
    from fundusfm.objectives import config_of
    from fundusfm.recipe.load import load_recipe
    from fundusfm.training.runfolder import RunFolder
    from fundusfm.training.starting import refuse_other_recipe

    loaded = load_recipe(recipe, overrides or (), objective_config=config_of).recipe
    refuse_other_recipe(RunFolder.of(loaded), loaded)
    _say(Console(), f"{loaded.runs_dir}/{loaded.name}")


@shards_app.command("build")
def shards_build(
    source: Annotated[Path, typer.Argument(metavar="CARD|TABLE", help="A dataset card, or a cohort table.")],
    out: OutFolder,
    workers: Workers,
    size: Annotated[int, typer.Option(min=16, help="Short side of a stored image in pixels.")] = 512,
    max_rejects: Annotated[float, typer.Option(min=0, max=1, help="Share of bad rows that ends it.")] = 0.01,
    exams_per_shard: ExamsPerShard = 512,
    key: Annotated[Path | None, typer.Option(help="Key file of the pseudonyms, to reuse one.")] = None,
    crop: Annotated[
        Crop | None, typer.Option(help="fov cuts the dark frame; default: as the card says.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="K/N", help="Only part K of N; once all are built, publish them without this."),
    ] = None,
) -> None:
    """Make shards from a table of images and reports."""
    from fundusfm.shards.build import build_part, build_shards
    from fundusfm.shards.plan import Part

    options: dict[str, Any] = {
        "size": size,
        "workers": workers,
        "max_rejects": max_rejects,
        "exams_per_shard": exams_per_shard,
        "key": key,
        "crop": crop.value if crop else None,
    }
    if part is not None:
        num_shards = build_part(source, out, Part.parse(part), **options)
        _say(Console(), f"{out}: the {num_shards} shards of part {part} are built, not published")
    else:
        _say_built(build_shards(source, out, **options))


@shards_app.command("check")
def shards_check(folder: ShardFolder, workers: Workers) -> None:
    """Verify digests, counts, offsets and images; find the same image or patient in two splits."""
    from fundusfm.shards.check import check_shards

    report = check_shards(folder, workers=workers)
    console = Console()
    for problem in report.problems:
        _say(console, str(problem))
    if report.problems:
        raise UserError(f"the shards have {len(report.problems)} problems", where=folder)
    _say(console, f"{folder}: nothing wrong")


@shards_app.command("stats")
def shards_stats(
    folder: ShardFolder,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE", help="PNG of sample exams to write.")] = None,
) -> None:
    """Count exams, images, eyes, modalities, labels and sources by split."""
    from fundusfm.shards.stats import show_stats

    show_stats(folder, sheet=sheet)


@shards_app.command("adopt")
def shards_adopt(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of tars.")],
    workers: Workers,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the index; default: the tars' own.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of all tars; default: as their paths say.")] = None,
) -> None:
    """Index WebDataset tars that another tool wrote, in place."""
    from fundusfm.shards.adopt import adopt_shards

    _say_built(adopt_shards(folder, out=out, split=split, workers=workers))


@shards_app.command("synth")
def shards_synth(
    out: OutFolder,
    workers: Workers,
    patients: Annotated[int, typer.Option(min=1, help="Patients, one exam each.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    size: Annotated[int, typer.Option(min=48, help="Side of an image in pixels.")] = 224,
    exams_per_shard: ExamsPerShard = 512,
) -> None:
    """Draw a cohort with known truth, so that nothing needs a download."""
    from fundusfm.shards.synth import synthesise

    index = synthesise(
        out, patients=patients, seed=seed, size=size, workers=workers, exams_per_shard=exams_per_shard
    )
    _say_built(index)


@tokens_app.command("train")
def tokens_train(
    shards: Annotated[list[str], typer.Option(metavar="DIR", help="Shards to read; repeat it for several.")],
    out: OutFile,
    vocab_size: Annotated[int, typer.Option(min=16, help="Most words.")] = 8000,
) -> None:
    """Train a tokenizer on the reports of the train split."""
    from fundusfm.stream.vocabulary import train_tokenizer

    size = train_tokenizer(shards, out, vocab_size=vocab_size)
    _say(Console(), f"{out}: {size} words")


@weights_app.command("import")
def weights_import(
    system: Annotated[
        str,
        typer.Argument(
            metavar="SYSTEM",
            help="Whose weights: ret_clip, flair, keepfit, eyeclip, retfound or urfound.",
        ),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The published file.")],
    out: OutFile,
) -> None:
    """Translate a published weight file, with an account of every key."""
    from fundusfm.models.published import import_weights

    audit = import_weights(system, file, out)
    console = Console()
    for theirs, ours in sorted(audit.matched.items()):
        _say(console, f"{theirs} -> {ours}")
    for theirs in audit.ignored:
        _say(console, f"{theirs} is not used")
    for part in audit.absent:
        _say(console, f"{part}: not in the file; what starts from it has a fresh one")
    _say(console, f"{out}: {len(audit.matched)} tensors, {len(audit.ignored)} not used")


CheckpointPath = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint or a run folder.")]


@checkpoint_app.command("list")
def checkpoint_list(run: CheckpointPath) -> None:
    """Show each checkpoint of a run: step, exams, who wrote it, its size, and whether it is whole."""
    from fundusfm.training.audit import look_at

    console = Console()
    for one in look_at(run):
        if one.manifest is None:
            _say(console, f"{one.folder.name}  torn: {one.fault}")
            continue
        manifest = one.manifest
        _say(
            console,
            f"{one.folder.name}  whole  {manifest.exams_seen} exams  {manifest.strategy} on "
            f"{manifest.world_size} ranks  {one.size_gib:.3f} GiB",
        )


@checkpoint_app.command("verify")
def checkpoint_verify(checkpoint: CheckpointPath) -> None:
    """Read every file of a checkpoint, or of all checkpoints of a run, against its digest."""
    from fundusfm.training.audit import look_at

    console = Console()
    found = look_at(checkpoint)
    for one in found:
        _say(console, f"{one.folder}: {one.fault or 'whole'}")
    if torn := [one.folder.name for one in found if one.fault]:
        raise UserError(
            f"not whole: {', '.join(torn)}", where=str(checkpoint), fix="--resume passes over them by itself"
        )


@checkpoint_app.command("consolidate")
def checkpoint_consolidate(checkpoint: CheckpointPath, out: OutFile) -> None:
    """Write all weights of a checkpoint to one safetensors file, with an account of every tensor."""
    from fundusfm.training.audit import consolidate

    audit = consolidate(checkpoint, out)
    console = Console()
    for name, what in audit.items():
        _say(console, f"{name}: {what}")
    counts = {kind: sum(w.startswith(kind) for w in audit.values()) for kind in _KINDS}
    _say(console, f"{out}: " + ", ".join(f"{number} {kind}" for kind, number in counts.items()))


@app.command("pretrain")
def pretrain(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    resume_if_any: Annotated[
        bool, typer.Option("--resume-if-any", help="Start the run, or go on if it has begun; for launchers.")
    ] = False,
    fork: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="Begin a new run with the state of this one.")
    ] = None,
) -> None:
    """Train what a recipe describes."""
    from fundusfm.training import fit

    outcome = fit.pretrain(recipe, overrides or (), resume=resume, resume_if_any=resume_if_any, fork=fork)
    if outcome.signal_number is not None:
        raise typer.Exit(128 + outcome.signal_number)


@app.command("evaluate")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint or a run folder.")],
    shards: Annotated[str, typer.Option(metavar="DIR", help="Shards to measure on.")],
    workers: Loaders,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the report.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images at once; default: as the recipe says.")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Images a label for few-shot methods.")] = None,
) -> None:
    """Measure a checkpoint: probes, zero-shot, retrieval, with intervals and baselines, as a report."""
    from fundusfm.evaluation.evaluate import evaluate as measure

    measure(checkpoint, shards, out=out, batch_size=batch_size, shots=shots, workers=workers)


@app.command("compare")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; the first is the base.")],
    out: OutFolder,
) -> None:
    """Put several runs side by side: curves, results with intervals, what their recipes change."""
    from fundusfm.evaluation.compare import compare as compare_runs

    compare_runs(runs, out)
