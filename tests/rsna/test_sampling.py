# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""How often series are drawn."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from workflow.sampler import EpochSampler

from bundles.rsna_cnn_lstm.scripts.sampling import inverse_frequency, sampling_weights


def slow(items: list[dict]) -> list[float]:
    """The definition, word by word."""
    patients = {}
    for item in items:
        patients.setdefault(item["patient_id"], []).append(item["label"])
    worst = {name: [max(column) for column in zip(*labels, strict=True)] for name, labels in patients.items()}
    weights = []
    for item in items:
        shares = [1.0]
        for group, own in enumerate(worst[item["patient_id"]]):
            if own >= 0:
                known = [label[group] for label in worst.values() if label[group] >= 0]
                shares.append(known.count(own) / len(known))
        weights.append(1 / min(shares))
    return weights


@given(st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(-1, 2), min_size=3, max_size=3)), min_size=1))
@settings(deadline=None)
def test_weights_are_those_of_the_definition(rows):
    items = [{"patient_id": str(patient), "label": np.asarray(label)} for patient, label in rows]
    np.testing.assert_allclose(inverse_frequency(items), slow(items))


def test_each_rarest_class_is_drawn_about_equally_often():
    labels = [[0, 0]] * 90 + [[1, 0]] * 6 + [[1, 2]] * 2 + [[0, 2]] * 2
    items = [{"patient_id": str(i), "label": np.asarray(label)} for i, label in enumerate(labels)]
    weights = sampling_weights(SimpleNamespace(data=items), weighted=True)
    assert sampling_weights(SimpleNamespace(data=items), weighted=False) is None
    sampler = EpochSampler(len(items), seed=3, weights=weights)
    drawn = np.zeros(len(items))
    for epoch in range(200):
        sampler.set_epoch(epoch)
        numbers = list(sampler)
        assert len(numbers) == len(items)
        drawn += np.bincount(np.asarray(numbers) % len(items), minlength=len(items))
    share = drawn / drawn.sum()
    np.testing.assert_allclose(share, weights / weights.sum(), atol=0.006)
    # kidney injury (4 patients) against bowel injury alone (6 of 8): weights 1 / 0.04 and 1 / 0.08
    assert 1.7 < share[96:].mean() / share[90:96].mean() < 2.3
