"""Whole runs in this process: what they say, write and refuse."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fundusfm.errors import UserError
from fundusfm.shards.synth import synthesise
from fundusfm.stream.vocabulary import train_tokenizer
from fundusfm.training import fit, keeper
from fundusfm.training.audit import consolidate
from fundusfm.training.boundary import NonFiniteError
from fundusfm.training.checkpoint import find_checkpoint, load_weights, newest_whole, read_manifest, verify
from fundusfm.training.header import show_header
from fundusfm.training.loading import load_objective
from fundusfm.training.strategies import memory
from tests.conftest import Cohort
from tests.models.bert import BERT_FOLDER, needs_bert
from tests.training.conftest import SHORT, Finished
from tests.training.launch import break_val_exam, losses, write_recipe
from tests.training.own import BREAKS_AT


def test_header__brackets_in_names_are_no_markup() -> None:
    with (console := Console(width=100)).capture() as capture:
        show_header(console, {"run folder": "runs/[red]x [/a]"}, "step [b]")
    assert "runs/[red]x [/a]" in capture.get() and "step [b]" in capture.get()


def test_header__one_screen_with_the_arithmetic(short_run: Finished) -> None:
    said = " ".join(short_run.said.split())
    assert "12 exams = 12 a rank x 1 micro-batch x 1 ranks" in said
    assert "6 steps = 72 exams = " in said
    assert "CPU" in said
    assert "fp32" in said
    assert "from the beginning" in said
    assert len(short_run.said.splitlines()) < 25


def test_progress__a_line_where_there_is_no_terminal(short_run: Finished) -> None:
    lines = [line for line in short_run.said.splitlines() if line.startswith("step ")]
    assert len(lines) == 1
    for word in ("step 6/6", "patient", "left", "right", "exams/s", "data wait", "min left"):
        assert word in short_run.said
    assert "\x1b[" not in lines[0]


def test_metrics__a_line_a_step_and_one_a_validation(short_run: Finished) -> None:
    lines = [json.loads(line) for line in short_run.metrics.read_text().splitlines()]
    training = [line for line in lines if "train/loss" in line]
    validation = [line for line in lines if "val/loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in validation] == [3, 6]
    for line in training:
        assert line["exams"] == 12 * line["step"]
        terms = sum(line[f"train/loss_{term}"] for term in ("patient", "left", "right"))
        assert line["train/loss"] == pytest.approx(terms, rel=1e-5)
        assert line["exams_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["scale_left"] == pytest.approx(14.3, rel=0.05)
    assert validation[0]["val/loss"] != validation[1]["val/loss"]


def test_tensorboard__scalars_and_pictures(short_run: Finished) -> None:
    events = EventAccumulator(str(short_run.folder))
    events.Reload()
    wanted = {"train/loss", "train/loss_left", "val/loss", "lr", "scale_patient", "exams_per_s", "data_wait"}
    assert wanted <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    first = json.loads(short_run.metrics.read_text().splitlines()[0])
    assert events.Scalars("train/loss")[0].value == pytest.approx(first["train/loss"], rel=1e-6)
    tags = events.Tags()["images"]
    assert "similarity" in tags
    assert any(tag.startswith("samples") for tag in tags)
    picture = events.Images("similarity")[0]
    assert (picture.width, picture.height, picture.step) == (12, 12, 3)


def test_checkpoint__gives_the_objective_back(short_run: Finished) -> None:
    folder = find_checkpoint(short_run.folder)
    assert folder == short_run.outcome.checkpoint.resolve()
    manifest = verify(folder)
    assert (manifest.step, manifest.exams_seen, manifest.world_size) == (6, 72, 1)
    assert {"torch", "fundusfm", "revision"} <= manifest.made_with.keys()
    assert len(manifest.shards) == 1
    objective, recipe = load_objective(folder)
    assert not objective.training
    torch.testing.assert_close(objective.state_dict(), load_weights(folder), rtol=0, atol=0)
    assert Path(recipe.data.tokenizer).parent == folder


def test_signals__given_back_after_the_run(short_run: Finished) -> None:
    assert short_run.outcome.signal_number is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_resume__newest_torn_is_named_and_passed_over(short_run: Finished, tmp_path: Path) -> None:
    shutil.copytree(short_run.folder, tmp_path / "run", symlinks=True)
    recipe = Path(shutil.copy(short_run.recipe, tmp_path))
    weights = tmp_path / "run" / "checkpoints" / "step-00000006" / "weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    moved = f"runs_dir={tmp_path}"
    again = Finished(recipe, *SHORT, moved, "telemetry.images_every_steps=3", resume=True)
    said = " ".join(again.said.split())
    assert "passed over: a file of the checkpoint is damaged" in said
    assert "step-00000006/weights-00000.safetensors" in said.replace(" ", "")
    assert "step-00000003, as it was left" in said
    assert losses(again.metrics) == losses(short_run.metrics)
    assert verify(weights.parent).step == 6


def test_resume__another_recipe_refused_by_key(short_run: Finished) -> None:
    with pytest.raises(UserError, match="the recipe differs") as refused:
        Finished(
            short_run.recipe, *SHORT, "optim.lr=0.5", "data.image_size=48", "data.workers=1", resume=True
        )
    assert "optim.lr was 0.001, is 0.5" in refused.value.what
    assert "data.image_size was 32, is 48" in refused.value.what
    assert "workers" not in refused.value.what


def test_resume__data_made_anew_under_the_old_names_refused(synth_cohort: Cohort, tmp_path: Path) -> None:
    """Other exams, or other numbers for the same words, would go on as if nothing had happened."""
    places = [Path(shutil.copytree(synth_cohort.shards, tmp_path / name)) for name in ("one", "two")]
    tokenizer = Path(shutil.copy(synth_cohort.tokenizer, tmp_path))
    recipe = write_recipe(tmp_path / "recipe.yaml", Cohort(places[0], tokenizer))
    options = [
        *SHORT,
        "trainer.val_every_steps=null",
        f"data.sources={json.dumps([{'shards': str(place)} for place in places])}",
    ]
    run = Finished(recipe, *options, "trainer.max_steps=4")
    assert list(verify(run.outcome.checkpoint).shards) == [str(place) for place in places]  # both are `synth`
    shutil.rmtree(places[1])
    synthesise(places[1], patients=20, seed=4, size=48, workers=1)
    train_tokenizer([str(places[1])], tokenizer, vocab_size=300)
    with pytest.raises(UserError, match=r"began with other data: shards .*two; tokenizer .* changed since"):
        Finished(recipe, *options, "trainer.max_steps=4", resume=True)


def test_validation__unreadable_exams_are_listed(synth_cohort: Cohort, tmp_path: Path) -> None:
    """Left out without a word, they would make a better number of a smaller split."""
    place = Path(shutil.copytree(synth_cohort.shards, tmp_path / "synth"))
    shard, key = break_val_exam(place, 0)
    recipe = write_recipe(tmp_path / "recipe.yaml", Cohort(place, synth_cohort.tokenizer))
    options = ("data.modalities=[CFP, OCT, FFA]", "data.error_budget=0.2", "trainer.max_steps=4")
    run = Finished(recipe, *SHORT, *options)
    listed = [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(fault["shard"], fault["key"], fault["cause"]) for fault in listed] == [
        (shard, key, "unreadable image or text")
    ]


def test_bf16__a_few_steps(recipe: Path) -> None:
    run = Finished(recipe, *SHORT, "trainer.precision=bf16", "model.vision.gradient_checkpointing=true")
    table = losses(run.metrics)
    assert all(0 < line["train/loss"] < 20 for (_, is_val), line in table.items() if not is_val)
    assert "bf16" in run.said
    state = load_weights(run.outcome.checkpoint)
    assert all(tensor.dtype == torch.float32 for tensor in state.values() if tensor.is_floating_point())


def test_max_exams__rounded_up_to_whole_batches(recipe: Path) -> None:
    run = Finished(
        recipe,
        "data.workers=0",
        "trainer.max_steps=null",
        "trainer.max_exams=50",
        "trainer.val_every_steps=null",
    )
    assert run.outcome.step == 5  # 50 exams are 4.2 batches of 12
    assert "5 steps = 60 exams" in " ".join(run.said.split())
    assert not any(is_val for _, is_val in losses(run.metrics))


def test_batch_norm__refused_on_several_devices(recipe: Path) -> None:
    text = recipe.read_text()
    options = text[text.index('"options"') :].partition("}")[0] + "}"
    recipe.write_text(text.replace(options, '"options": {}'))
    with pytest.raises(UserError, match="batch normalisation") as refused:
        fit.pretrain(recipe, [*SHORT, "model.vision.name=resnet18", "trainer.devices=2"])
    assert "vision" in refused.value.where
    assert not list((recipe.parent / "run" / "checkpoints").iterdir())


def test_not_finite__stops_before_the_update_and_names_the_exams(recipe: Path) -> None:
    own = "objective.name=tests.training.own:NanOnOneRank"
    with pytest.raises(NonFiniteError, match=f"nan at step {BREAKS_AT}") as refused:
        Finished(recipe, *SHORT, own, "checkpoint.every_steps=1")
    assert refused.value.where.count("train-0") == 12
    newest, torn = newest_whole(recipe.parent / "run" / "checkpoints")
    assert newest is not None
    assert not torn
    assert newest.name == f"step-{BREAKS_AT:08d}"
    assert all(tensor.isfinite().all() for tensor in load_weights(newest).values())
    assert max(step for step, _ in losses(recipe.parent / "run" / "metrics.jsonl")) == BREAKS_AT


def test_finite_loss_of_broken_weights__not_saved(recipe: Path) -> None:
    """Kept as the one checkpoint, they would end the run for good."""
    own = (
        "objective.name=tests.training.own:BreaksGradient",
        "checkpoint.every_steps=1",
        "checkpoint.keep=1",
    )
    with pytest.raises(NonFiniteError, match="weights are not finite") as refused:
        Finished(recipe, *SHORT, *own)
    assert refused.value.where.endswith(f"step-{BREAKS_AT + 1:08d}")
    newest, torn = newest_whole(recipe.parent / "run" / "checkpoints")
    assert newest is not None and not torn
    assert newest.name == f"step-{BREAKS_AT:08d}"


def test_what_a_kill_left_in_a_save__takes_no_room_from_the_next(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = (*SHORT, "trainer.max_steps=3", "optim.warmup_steps=1")
    Finished(recipe, *short)
    checkpoints = recipe.parent / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-00000003", checkpoints / ".step-00000006.partial")
    taken = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())

    def usage(folder: Path) -> SimpleNamespace:
        left = taken - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return SimpleNamespace(free=left + 50_000)

    monkeypatch.setattr(memory.shutil, "disk_usage", usage)
    assert Finished(recipe, *short, resume=True).outcome.step == 3


def test_resume__needs_no_file_that_its_checkpoint_replaces(recipe: Path, tmp_path: Path) -> None:
    """A scratch disk may have been swept since."""
    Finished(recipe, *SHORT)
    weights = tmp_path / "weights.safetensors"
    consolidate(tmp_path / "run", weights)
    shutil.rmtree(tmp_path / "run")
    options = (*SHORT, f"model.weights={weights}")
    wanted = losses(Finished(recipe, *options).metrics)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    weights.unlink()
    assert losses(Finished(recipe, *options, resume=True).metrics) == wanted
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    with pytest.raises(UserError, match="cannot be opened"):
        Finished(recipe, *options, resume=True)


def test_code__as_it_was_when_the_run_began(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is pulled into the checkout later is not what trains."""
    answers = iter(["first", "second", "third"])
    monkeypatch.setattr(keeper, "made_with", lambda: {"revision": next(answers)})
    Finished(recipe, *SHORT)
    folders = sorted((recipe.parent / "run" / "checkpoints").glob("step-*"))
    assert [read_manifest(folder).made_with["revision"] for folder in folders] == ["first", "first"]


def test_more_devices_than_there_are__refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 devices a node are asked for, and this process sees 1") as refused:
        fit.pretrain(recipe, [*SHORT, "trainer.device=auto", "trainer.devices=2"])
    assert refused.value.where == "trainer.devices"


def test_deepspeed__not_imported_without_its_strategy(recipe: Path) -> None:
    run = f"fit.pretrain(Path({str(recipe)!r}), {[*SHORT, 'trainer.max_steps=4']!r})"
    code = f"import sys; from pathlib import Path; from fundusfm.training import fit; {run}"
    code += "; sys.exit('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_two_sources__each_one_validated(synth_cohort: Cohort, tmp_path: Path) -> None:
    synthesise(tmp_path / "more", patients=30, seed=4, size=48, workers=1, exams_per_shard=7)
    more = Cohort(tmp_path / "more", synth_cohort.tokenizer)
    seen = {}
    for name, cohorts in {"one": [synth_cohort], "other": [more], "both": [synth_cohort, more]}.items():
        folder = tmp_path / name
        folder.mkdir()
        sources = json.dumps([{"shards": str(cohort.shards)} for cohort in cohorts])
        # A rate that changes nothing: all three validate the same towers.
        options = (f"data.sources={sources}", "optim.lr=1e-30", "trainer.val_batch_size=3")
        run = Finished(write_recipe(folder / "recipe.yaml", synth_cohort), *SHORT, *options)
        num_exams = sum(cohort.index.totals["val"]["exams"] for cohort in cohorts)
        seen[name] = num_exams, losses(run.metrics)[3, True]["val/loss"]
    (few, loss_one), (more_exams, loss_other), (all_exams, loss_both) = seen.values()
    assert few + more_exams == all_exams
    assert loss_both == pytest.approx((few * loss_one + more_exams * loss_other) / all_exams, rel=1e-5)
    again = Finished(run.recipe, *SHORT, *options, "trainer.max_steps=6", resume=True)
    assert again.outcome.step == 6


@needs_bert
def test_real_bert__tokenizer_and_tower_from_a_folder(recipe: Path) -> None:
    folder = json.dumps(str(BERT_FOLDER))
    run = Finished(
        recipe,
        *("data.workers=0", "trainer.max_steps=4", "trainer.val_every_steps=null", "data.languages=[en]"),
        *(f"data.tokenizer={folder}", f"model.text.weights={folder}", "data.global_batch_size=6"),
    )
    assert BERT_FOLDER is not None
    assert str(BERT_FOLDER)[:30] in run.said
    objective, _ = load_objective(run.outcome.checkpoint)
    assert objective.text.width == 384
    start = torch.nn.Embedding.from_pretrained(objective.text.trunk.embeddings.word_embeddings.weight)
    assert start.num_embeddings == 30522
    first, last = (losses(run.metrics)[step, False]["train/loss"] for step in (1, 4))
    assert last < first + 1
