"""A run of two objectives over one tower: logged by part, saved, resumed, read again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from fundusfm.evaluation.features import Source
from fundusfm.evaluation.pipeline import read
from fundusfm.evaluation.results import PRETRAINED
from fundusfm.stream.tokens import load_tokens
from fundusfm.training.checkpoint import load_weights, newest_whole
from fundusfm.training.loading import load_objective
from tests.conftest import Cohort
from tests.objectives.parts import COLOUR
from tests.training.conftest import Finished
from tests.training.launch import losses

PARTS = {"ret_clip": {"temperature_init": 14.3}, COLOUR: {}}
GIVEN = (
    *("data.workers=0", "trainer.max_steps=4", "trainer.val_every_steps=2", "checkpoint.every_steps=2"),
    *("telemetry.images_every_steps=2", "objective.name=composite", "data.micro_batch_size=6"),
    f"objective.parts={json.dumps(PARTS)}",
    f"objective.weights={json.dumps({COLOUR: 0.5})}",
)


def test_composite_run__logged_saved_resumed_and_read(recipe: Path, synth_cohort: Cohort) -> None:
    run = Finished(recipe, *GIVEN)
    before = losses(run.metrics)
    term = f"{COLOUR}/loss_colour"
    for (_, is_val), line in before.items():
        kind = "val" if is_val else "train"
        parts = [line[f"{kind}/ret_clip/loss_{term}"] for term in ("patient", "left", "right")]
        # The second part weighs its term by 2 and is weighed by a half.
        assert abs(line[f"{kind}/loss"] - sum(parts) - line[f"{kind}/{term}"]) < 1e-4
    newest, _ = newest_whole(run.folder / "checkpoints")
    assert newest is not None
    objective, saved_recipe = load_objective(newest)
    parts_of = list(objective.part_objectives().values())  # type: ignore[operator]
    assert parts_of[0].vision.trunk is parts_of[1].vision.trunk
    saved = load_weights(newest)
    assert saved.keys() == objective.state_dict().keys()
    shutil.rmtree(newest)
    again = Finished(recipe, *GIVEN, resume=True)
    assert losses(again.metrics) == before
    found = load_weights(newest)
    assert all(tensor.equal(saved[name]) for name, tensor in found.items())
    tokens = load_tokens(saved_recipe.data.tokenizer, saved_recipe.data.context_length)
    source = Source(synth_cohort.index, saved_recipe, 16, 0, torch.device("cpu"))
    reading = read(source, {PRETRAINED: objective}, tokens, lambda text: None)
    image_ED, text_ED = reading.exams.rows[PRETRAINED]
    assert image_ED.shape == text_ED.shape and len(image_ED) > 3
    embedded_ND = reading.splits["test"].embeddings[PRETRAINED]
    np.testing.assert_allclose(np.linalg.norm(embedded_ND, axis=1), 1, rtol=1e-5)
