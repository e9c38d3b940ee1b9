"""The colour histogram against numpy's, and the baseline that only knows the source."""

from __future__ import annotations

import numpy as np
import torch

from fundusfm.evaluation.baselines import NUM_BINS, color_histogram, source_scores


def test_color_histogram__equals_numpy_inside_the_field_of_view() -> None:
    image_NCHW = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    image_NCHW[:, :, :5] = 0.03
    image_NCHW[0, :, 10, 10] = 1.0
    histogram_NB = color_histogram(image_NCHW)
    for image_CHW, row_B in zip(image_NCHW.numpy(), histogram_NB, strict=True):
        pixels_PC = image_CHW.reshape(3, -1).T
        pixels_PC = pixels_PC[pixels_PC.max(axis=1) > 16 / 255]
        count_RGB, _ = np.histogramdd(pixels_PC, bins=NUM_BINS, range=[(0, 1)] * 3)
        np.testing.assert_allclose(row_B, np.sqrt(count_RGB.ravel() / count_RGB.sum()), rtol=1e-5)


def test_color_histogram__black_image_and_moved_pixels() -> None:
    assert not color_histogram(torch.zeros(1, 3, 8, 8)).any()
    image_NCHW = torch.rand(1, 3, 8, 8)
    np.testing.assert_array_equal(color_histogram(image_NCHW.flip(2)), color_histogram(image_NCHW))


def test_source_scores__share_of_the_label_in_the_source() -> None:
    target_ML = np.array([[1, 0], [1, 0], [0, 0], [0, 1]], dtype=bool)
    score_NL = source_scores(["a", "a", "b", "b"], target_ML, ["b", "a", "new"])
    np.testing.assert_allclose(score_NL, [[0, 0.5], [1, 0], [0.5, 0.25]])
