# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Curves, bands and reliability bins against scikit-learn and slow, obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from bundles.rsna_cnn_lstm.scripts.curves import GRID, average_precision, curve_band, curves_on_grid, reliability
from bundles.rsna_cnn_lstm.scripts.metrics import BinaryTask


def _task(truth: np.ndarray, probability: np.ndarray) -> BinaryTask:
    return BinaryTask("liver", "group", np.asarray(truth, dtype=float), np.asarray(probability), probability > 0.5)


def _random(seed: int, patients: int = 60, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = (rng.random(patients) < 0.4).astype(float)
    truth[:2] = 0, 1
    probability = np.clip(0.4 * truth + 0.6 * rng.random(patients), 0, 1)
    return truth, probability.round(1) if ties else probability


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_curves_on_the_grid_equal_the_slow_definition(seed):
    truth, probability = _random(seed)
    ones = np.ones((1, len(truth)))
    fpr, tpr, _ = roc_curve(truth, probability, drop_intermediate=False)
    expected = [tpr[fpr <= place + 1e-9].max() for place in GRID]
    np.testing.assert_allclose(curves_on_grid(ones, truth, probability, "roc")[:, 0], expected)
    precision, recall, _ = precision_recall_curve(truth, probability)
    reached = [max(np.flatnonzero(recall[:-1] >= max(place, 1e-6) - 1e-9)) for place in GRID]
    np.testing.assert_allclose(curves_on_grid(ones, truth, probability, "precision_recall")[:, 0], precision[reached])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["roc", "precision_recall"]))
def test_a_patient_drawn_twice_counts_twice(seed, kind):
    truth, probability = _random(seed, patients=25, ties=True)
    counts = np.random.default_rng(seed).integers(0, 3, size=(4, len(truth)))
    found = curves_on_grid(counts, truth, probability, kind)
    for row, curve in zip(counts, found.T, strict=True):
        repeated = np.repeat(truth, row), np.repeat(probability, row)
        expected = curves_on_grid(np.ones((1, row.sum())), *repeated, kind)[:, 0]
        np.testing.assert_allclose(curve, expected)


def test_areas_are_those_of_scikit_learn():
    truth, probability = _random(3, patients=400, ties=True)
    ones = np.ones((1, len(truth)))
    area = np.trapezoid(curves_on_grid(ones, truth, probability, "roc")[:, 0], GRID)
    assert area == pytest.approx(roc_auc_score(truth, probability), abs=0.01)
    mean = curves_on_grid(ones, truth, probability, "precision_recall")[:, 0].mean()
    assert mean == pytest.approx(average_precision_score(truth, probability), abs=0.01)


@pytest.mark.parametrize("kind", ["roc", "precision_recall"])
def test_band_holds_the_curve_and_narrows_with_patients(kind):
    wide = []
    for patients in (40, 4000):
        band = curve_band(_task(*_random(1, patients)), kind, 200, seed=0)
        middle = slice(20, 80)
        assert (band.low[middle] <= band.value[middle] + 0.02).all()
        assert (band.value[middle] <= band.high[middle] + 0.02).all()
        wide.append((band.high - band.low)[middle].mean())
    assert wide[1] < 0.25 * wide[0]
    again = curve_band(_task(*_random(1, 40)), kind, 200, seed=0)
    np.testing.assert_array_equal(again.low, curve_band(_task(*_random(1, 40)), kind, 200, seed=0).low)


def test_what_is_not_defined_is_no_curve():
    healthy = _task(np.zeros(5), np.linspace(0, 1, 5))
    assert curve_band(healthy, "roc", 10, 0) is None
    assert curve_band(healthy, "precision_recall", 10, 0) is None
    assert average_precision(healthy, 10, 0) == {"value": None, "low": None, "high": None}
    injured = _task(np.ones(5), np.linspace(0, 1, 5))
    assert curve_band(injured, "roc", 10, 0) is None
    assert curve_band(injured, "precision_recall", 10, 0).value.tolist() == [1.0] * len(GRID)
    assert reliability(_task(np.full(3, np.nan), np.full(3, 0.5))) is None
    with pytest.raises(ValueError, match="expected one of"):
        curve_band(injured, "lift", 10, 0)


def test_without_resamples_there_is_no_band():
    band = curve_band(_task(*_random(0)), "roc", 0, 0)
    assert band.low is None
    assert band.high is None
    assert average_precision(_task(*_random(0)), 0, 0)["low"] is None


def test_unlabelled_patients_are_left_out():
    truth, probability = _random(5)
    more = np.append(truth, [np.nan, np.nan]), np.append(probability, [0.99, 0.01])
    for kind in ("roc", "precision_recall"):
        one, other = curve_band(_task(truth, probability), kind, 20, 0), curve_band(_task(*more), kind, 20, 0)
        np.testing.assert_array_equal(one.value, other.value)
        np.testing.assert_array_equal(one.low, other.low)
    assert reliability(_task(*more))["patients"].sum() == len(truth)


def test_average_precision_is_that_of_scikit_learn_within_its_interval():
    truth, probability = _random(2)
    figure = average_precision(_task(truth, probability), 200, 0)
    assert figure["value"] == pytest.approx(average_precision_score(truth, probability))
    assert figure["low"] < figure["value"] < figure["high"]


def test_reliability_bins_are_those_of_scikit_learn():
    truth, probability = _random(4, patients=100)
    frame = reliability(_task(truth, probability))
    observed, predicted = calibration_curve(truth, probability, n_bins=10, strategy="quantile")
    assert frame["patients"].tolist() == [10] * 10
    np.testing.assert_allclose(frame["observed"], observed)
    np.testing.assert_allclose(frame["predicted"], predicted)
    assert (frame["low"] <= frame["observed"]).all()
    assert (frame["observed"] <= frame["high"]).all()


def test_reliability_of_one_probability_is_one_bin():
    frame = reliability(_task(np.array([0.0, 1, 1, 0] * 10), np.full(40, 0.3)))
    assert frame[["patients", "predicted", "observed"]].to_numpy().tolist() == [[40, pytest.approx(0.3), 0.5]]
