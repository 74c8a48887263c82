# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Folds by patient: every one once, stratified, the same each time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workflow.datalist import DatalistError, select_part
from workflow.folds import make_folds, write_folds


def cohort(labels: dict[str, list[int]], series: int = 1) -> list[dict]:
    return [
        {"image": f"{patient}/{k}", "patient_id": patient, "series_id": str(k), "label": np.array(label)}
        for patient, label in labels.items()
        for k in range(series)
    ]


@given(
    labels=st.lists(st.lists(st.integers(-1, 2), min_size=5, max_size=5), min_size=2, max_size=40),
    num_folds=st.integers(2, 5),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=100)
def test_every_patient_is_in_exactly_one_fold_of_fair_size(labels, num_folds, seed):
    items = cohort({f"p{i}": label for i, label in enumerate(labels)}, series=2)
    if len(labels) < num_folds:
        with pytest.raises(ValueError, match=f"folds: expected at least {num_folds} patients, found {len(labels)}"):
            make_folds(items, num_folds, seed)
        return
    folds = make_folds(items, num_folds, seed)
    assert folds["patient_id"].tolist() == sorted(f"p{i}" for i in range(len(labels)))
    sizes = Counter(folds["fold"])
    assert set(sizes) == set(range(num_folds))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    pd.testing.assert_frame_equal(make_folds(items[::-1], num_folds, seed), folds)


def test_injuries_are_spread_evenly_and_the_rarest_decides():
    labels = {f"h{i:02d}": [0, 0, 0] for i in range(50)}
    labels |= {f"b{i:02d}": [1, 0, 0] for i in range(20)}
    labels |= {f"k{i:02d}": [1, 2, 0] for i in range(10)}  # the kidney is rarer than the bowel
    folds = make_folds(cohort(labels), 5, seed=3)
    table = folds.assign(stratum=folds["patient_id"].str[0]).groupby(["fold", "stratum"]).size().unstack()
    assert (table["h"] == 10).all()
    assert (table["b"] == 4).all()
    assert (table["k"] == 2).all()


def test_patients_with_several_series_are_spread_too():
    items = cohort({f"a{i}": [0] for i in range(10)}, series=3) + cohort({f"b{i}": [0] for i in range(10)})
    folds = make_folds(items, 5)
    assert (folds.assign(many=folds["patient_id"].str[0]).groupby(["fold", "many"]).size() == 2).all()


def test_the_worst_series_of_a_patient_counts():
    items = cohort({f"p{i}": [0] for i in range(10)})
    for i in range(5):
        items.append({"image": "x", "patient_id": f"p{i}", "series_id": "9", "label": np.array([2])})
        items.append({"image": "y", "patient_id": f"p{i + 5}", "series_id": "9", "label": np.array([0])})
    folds = make_folds(items, 5)
    injured = folds[folds["patient_id"].isin([f"p{i}" for i in range(5)])]
    assert sorted(injured["fold"]) == [0, 1, 2, 3, 4]


def test_a_seed_gives_the_same_folds_and_another_seed_others():
    items = cohort({f"p{i}": [i % 2] for i in range(40)})
    assert make_folds(items, 5, 1).equals(make_folds(items, 5, 1))
    assert not make_folds(items, 5, 1).equals(make_folds(items, 5, 2))


def test_strata_of_few_patients_are_pooled_without_a_warning(recwarn):
    labels = {f"h{i}": [0, 0] for i in range(12)} | {"a": [1, 0], "b": [0, 1]}  # two rare ones, fewer than folds
    assert len(make_folds(cohort(labels), 4)) == 14
    labels |= {"c": [2, 0], "d": [0, 2]}  # four rare ones make a stratum of their own
    folds = make_folds(cohort(labels), 4).set_index("patient_id")["fold"]
    assert sorted(folds[list("abcd")]) == [0, 1, 2, 3]
    assert len(recwarn) == 0


def test_a_written_fold_file_is_what_both_bundles_read(tmp_path):
    items = cohort({f"{i:03d}": [i % 3] for i in range(12)}, series=2)
    folds = make_folds(items, 3)
    write_folds(tmp_path / "new" / "folds.csv", folds)
    options = {"folds_file": str(tmp_path / "new" / "folds.csv"), "fold": 1, "val_fraction": 0.0, "seed": 0}
    held_out = {i["patient_id"] for i in select_part(items, "validation", **options)}
    assert held_out == set(folds.loc[folds["fold"] == 1, "patient_id"])
    assert "007" in {i["patient_id"] for i in items}


def simulated_rsna(patients: int, seed: int) -> list[dict]:
    """Injuries about as frequent as in RSNA 2023, some patients with many of them, half with two series."""
    rng = np.random.default_rng(seed)
    severity = rng.gamma(0.4, 1 / 0.4, patients)
    labels = np.zeros((patients, 5), dtype=int)
    for group, (low, high) in enumerate([(0.02, 0), (0.06, 0), (0.04, 0.02), (0.08, 0.02), (0.06, 0.05)]):
        injured = rng.random(patients) < np.minimum((low + high) * severity, 0.9)
        labels[:, group] = injured * np.where(rng.random(patients) < high / (low + high), 2, 1)
    many = rng.random(patients) < 0.5
    return [
        {"patient_id": f"{i:05d}", "series_id": str(k), "label": labels[i]}
        for i in range(patients)
        for k in range(1 + many[i])
    ]


def spread(items: list[dict], folds: pd.DataFrame) -> dict[object, list[int]]:
    """Patients with each class, with any injury and with several series in each fold, from the items alone."""
    of_patient = dict(zip(folds["patient_id"], folds["fold"], strict=True))
    names = [f for f in dict.fromkeys(sorted(of_patient.values(), key=str)) if f != "test"]
    counts: dict[object, Counter] = {}
    series = Counter(item["patient_id"] for item in items)
    for patient, label in {item["patient_id"]: item["label"] for item in items}.items():
        traits = [(g, int(c)) for g, c in enumerate(label) if c > 0]
        for trait in [*traits, *(["injured"] if traits else []), *(["several"] if series[patient] > 1 else [])]:
            counts.setdefault(trait, Counter())[of_patient[patient]] += 1
    return {trait: [count[name] for name in names] for trait, count in counts.items()}


@pytest.mark.parametrize("seed", range(4))
def test_at_the_size_of_rsna_every_class_is_within_a_fifth_of_its_mean_in_every_fold(seed):
    items = simulated_rsna(3147, seed)
    table = spread(items, make_folds(items, 5, seed))
    assert len(table) == 10
    for trait, counts in table.items():
        mean = np.mean(counts)
        assert np.abs(np.asarray(counts) - mean).max() <= max(1, 0.2 * mean), (trait, counts)


def test_a_small_cohort_is_balanced_to_about_a_patient():
    items = simulated_rsna(300, 0)
    for trait, counts in spread(items, make_folds(items, 5)).items():
        assert max(counts) - min(counts) <= 3, (trait, counts)


def test_a_test_part_is_stratified_too_and_no_fold_has_it():
    items = simulated_rsna(1000, 1)
    folds = make_folds(items, 5, seed=2, test_fraction=0.2)
    assert Counter(folds["fold"]) == {**dict.fromkeys(range(5), 160), "test": 200}
    tested = set(folds.loc[folds["fold"] == "test", "patient_id"])
    injured = {item["patient_id"] for item in items if (item["label"] > 0).any()}
    assert abs(len(injured & tested) / len(injured) - 0.2) < 0.01


@pytest.mark.parametrize("options", [{"num_folds": 1}, {"test_fraction": 1.0}, {"test_fraction": -0.1}])
def test_numbers_out_of_range_are_named(options):
    with pytest.raises(ValueError, match="need num_folds >= 2 and 0 <= test_fraction < 1"):
        make_folds(cohort({f"p{i}": [0] for i in range(9)}), **options)


def test_a_test_part_of_no_patient_is_an_error():
    with pytest.raises(ValueError, match=r"found 10 and a test part of 0\.01"):
        make_folds(cohort({f"p{i}": [0] for i in range(10)}), 5, test_fraction=0.01)


def test_a_fold_file_is_written_once(tmp_path):
    folds = make_folds(cohort({f"p{i}": [0] for i in range(10)}))
    write_folds(tmp_path / "folds.csv", folds)
    before = (tmp_path / "folds.csv").read_bytes()
    with pytest.raises(DatalistError, match=r"folds.csv: exists already and is never overwritten"):
        write_folds(tmp_path / "folds.csv", folds.iloc[::-1])
    assert (tmp_path / "folds.csv").read_bytes() == before
