# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""RSNA score: golden values, scikit-learn on random data, refusals; baseline and series -> patient."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from sklearn.metrics import log_loss

from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.score import (
    align_patients,
    combine_series,
    frequency_baseline,
    rsna_score,
    term_losses,
)

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
TABLE = LabelTable.from_file(ROOT / "bundles/rsna_cnn_lstm/configs/labels.json")
COLUMNS = list(TABLE.columns)
HEALTHY = [group.columns[0] for group in TABLE.groups]


@pytest.fixture
def solution() -> pd.DataFrame:
    return pd.read_csv(GOLDEN / "rsna_solution.csv")


@pytest.fixture
def submission() -> pd.DataFrame:
    return pd.read_csv(GOLDEN / "rsna_submission.csv")


def _frame(values: np.ndarray) -> pd.DataFrame:
    frame = pd.DataFrame(values, columns=COLUMNS)
    frame.insert(0, "patient_id", [f"p{row}" for row in range(len(values))])
    return frame


def test_golden(solution, submission):
    expected = json.loads((GOLDEN / "rsna_score.json").read_text(encoding="utf-8"))
    assert rsna_score(solution, submission, TABLE) == pytest.approx(expected, abs=1e-6)


def test_order_of_patients_and_type_of_ids_play_no_part(solution, submission):
    shuffled = submission.sample(frac=1, random_state=1).astype({"patient_id": str})
    assert rsna_score(solution, shuffled, TABLE) == rsna_score(solution, submission, TABLE)


def test_term_losses_give_the_same_terms(solution, submission):
    submission[COLUMNS[:2]] = [1.0, 0.0]  # certain, and wrong for some: clipped as scikit-learn clips
    losses, weights = term_losses(align_patients(solution, submission, TABLE), TABLE)
    expected = rsna_score(solution, submission, TABLE)
    found = (losses * weights).sum(axis=0) / weights.sum(axis=0)
    np.testing.assert_allclose(found, list(expected.values())[:-1], rtol=1e-12)
    assert expected["score"] == pytest.approx(found.mean())


_classes = st.lists(st.tuples(*[st.integers(0, len(g.classes) - 1) for g in TABLE.groups]), min_size=1, max_size=8)


@settings(deadline=None, max_examples=50)
@given(_classes, st.integers(0, 2**32 - 1))
def test_equals_scikit_learn_on_random_data(classes, seed):
    true = np.array(classes)
    values = np.random.default_rng(seed).uniform(0.01, 3, (len(true), len(COLUMNS)))
    found = rsna_score(_frame(TABLE.one_hot(true)), _frame(values), TABLE)
    wanted, healthy = [], []
    weights = [[1, 2], [1, 6], [1, 2, 4], [1, 2, 4], [1, 2, 4]]
    for column, (part, weight) in enumerate(zip(TABLE.column_slices.values(), weights, strict=True)):
        p = values[:, part] / values[:, part].sum(axis=1, keepdims=True)
        y = true[:, column]
        wanted.append(log_loss(y, p, labels=range(len(weight)), sample_weight=[weight[k] for k in y]))
        healthy.append(p[:, 0])
    injured = (true > 0).any(axis=1)
    p_any = (1 - np.stack(healthy)).max(axis=0)
    wanted.append(log_loss(injured, p_any, labels=[False, True], sample_weight=np.where(injured, 6, 1)))
    np.testing.assert_allclose(list(found.values()), [*wanted, np.mean(wanted)], rtol=1e-9)


_tables = st.lists(st.lists(st.sampled_from([1, 2, 4, 6]), min_size=2, max_size=4), min_size=1, max_size=3)


@settings(deadline=None, max_examples=80)
@given(_tables, st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_equals_scikit_learn_for_any_table_with_gaps_and_certainty(weights, n, seed, with_any):
    """Other organs, blank groups and probabilities of exactly 0 and 1, patients in another order."""
    groups = [
        {"name": f"g{g}", "classes": [{"name": f"c{k}", "score_weight": w} for k, w in enumerate(row)]}
        for g, row in enumerate(weights)
    ]
    table = LabelTable.from_dict({"groups": groups, "any_injury": {"name": "any"} if with_any else None})
    rng = np.random.default_rng(seed)
    true = np.stack([rng.integers(-1, len(row), n) for row in weights], axis=1)  # -1: no label
    true[0] = 0
    values = rng.integers(0, 3, (n, len(table.columns))) * rng.uniform(0.1, 1, (n, len(table.columns)))
    for part in table.column_slices.values():
        values[values[:, part].sum(axis=1) == 0, part.start] = 1
    frames = [pd.DataFrame(part, columns=list(table.columns)) for part in (table.one_hot(true), values)]
    for frame in frames:
        frame.insert(0, "patient_id", np.arange(n))
    found = rsna_score(frames[0], frames[1].sample(frac=1, random_state=seed % 1000), table)
    wanted, healthy = {}, []
    for g, (row, part) in enumerate(zip(weights, table.column_slices.values(), strict=True)):
        p, known = values[:, part] / values[:, part].sum(axis=1, keepdims=True), true[:, g] >= 0
        healthy.append(p[:, 0])
        sample_weight = np.array(row)[true[known, g]]
        wanted[f"g{g}"] = log_loss(true[known, g], p[known], labels=range(len(row)), sample_weight=sample_weight)
    if with_any:
        known = (true >= 0).all(axis=1)
        injured, p_any = (true[known] > 0).any(axis=1), (1 - np.stack(healthy)).max(axis=0)[known]
        weight = np.where(injured, 6, 1)
        wanted["any"] = log_loss(injured, np.stack((1 - p_any, p_any), 1), labels=[0, 1], sample_weight=weight)
    wanted["score"] = np.mean(list(wanted.values()))
    assert found == pytest.approx(wanted, rel=1e-9)


def test_missing_groups_are_masked(solution, submission):
    part = solution.astype(dict.fromkeys(COLUMNS, float))
    part.loc[:9, ["liver_healthy", "liver_low", "liver_high"]] = np.nan
    found, whole = rsna_score(part, submission, TABLE), rsna_score(solution, submission, TABLE)
    later = rsna_score(solution[10:], submission[10:], TABLE)
    assert found["liver"] == pytest.approx(later["liver"])
    assert found["any_injury"] == pytest.approx(later["any_injury"])  # unknown where a group is
    assert found["kidney"] == whole["kidney"]


def test_unlabelled_group_is_none(solution, submission):
    part = solution.astype(dict.fromkeys(COLUMNS, float))
    part.loc[:, ["liver_healthy", "liver_low", "liver_high"]] = np.nan
    found = rsna_score(part, submission, TABLE)
    assert found["liver"] is None
    assert found["any_injury"] is None
    assert found["score"] == pytest.approx(np.mean([found[k] for k in ("bowel", "extravasation", "kidney", "spleen")]))
    part[COLUMNS] = np.nan
    with pytest.raises(ValueError, match="nothing to score"):
        rsna_score(part, submission, TABLE)


def test_other_table(solution, submission):
    whole = rsna_score(solution, submission, TABLE)
    found = rsna_score(solution, submission, TABLE.select(["liver"]))
    assert found == {"liver": whole["liver"], "score": whole["liver"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, p: (s, p[2:]), r"submission lacks 2 of \d+ patients: 10000, 10001"),
        (lambda s, p: (s[1:], p), r"solution lacks 1 of \d+ patients: 10000"),
        (
            lambda s, p: (s, p.drop(columns=["liver_low", "patient_id"])),
            "submission lacks 2 columns: patient_id, liver_low",
        ),
        (lambda s, p: (s.drop(columns="liver_low"), p), "solution lacks 1 columns: liver_low"),
        (lambda s, p: (s, pd.concat([p, p[:1]])), "submission has 1 patients more than once: 10000"),
        (lambda s, p: (pd.concat([s, s[:1]]), p), "solution has 1 patients more than once: 10000"),
        (lambda s, p: (s[:0], p), "solution has no rows"),
        (lambda s, p: (s, p.assign(liver_low=np.nan)), "NaN or infinite values in .*: liver_low"),
        (lambda s, p: (s, p.assign(liver_low=np.inf)), "NaN or infinite"),
        (lambda s, p: (s, p.assign(liver_low=-0.1)), "negative values in .* rows .*: liver_low"),
        (lambda s, p: (s, p.assign(liver_low="a")), "not numbers"),
        (lambda s, p: (s, p.assign(bowel_healthy=0, bowel_injury=0)), "group 'bowel' sums to 0"),
        (
            lambda s, p: (s.assign(bowel_healthy=1, bowel_injury=1), p),
            "'bowel': 200 of 200 rows .*must sum to 1.*: 10000, 10001",
        ),
    ],
)
def test_refuses(solution, submission, change, message):
    with pytest.raises(ValueError, match=message):
        rsna_score(*change(solution, submission), TABLE)


def test_frequency_baseline_counts(solution):
    plain = frequency_baseline(solution, ["a", 7], TABLE, weighted=False, pseudocount=0)
    assert plain["patient_id"].tolist() == ["a", "7"]
    np.testing.assert_allclose(plain[COLUMNS].to_numpy(), np.tile(solution[COLUMNS].mean(), (2, 1)))
    weighted = frequency_baseline(solution, ["a"], TABLE, pseudocount=0).loc[0]
    injured = solution["extravasation_injury"].mean()
    assert weighted["extravasation_injury"] == pytest.approx(6 * injured / (6 * injured + 1 - injured))


def test_weighted_frequencies_are_each_groups_best_constant(solution):
    ids = list(solution["patient_id"])
    best = frequency_baseline(solution, ids, TABLE, pseudocount=0)
    terms = rsna_score(solution, best, TABLE)
    plain = rsna_score(solution, frequency_baseline(solution, ids, TABLE, weighted=False), TABLE)
    assert all(terms[name] < plain[name] for name in TABLE.group_names)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = best.assign(**{name: best[name].iloc[0] * rng.uniform(0.8, 1.25) for name in COLUMNS})
        found = rsna_score(solution, other, TABLE)
        assert all(terms[name] <= found[name] for name in TABLE.group_names)


def test_baseline_of_a_small_training_set_forbids_nothing(solution):
    healthy = solution[(solution[HEALTHY] == 1).all(axis=1)][:3]
    frame = frequency_baseline(healthy, list(solution["patient_id"]), TABLE)
    assert (frame[COLUMNS] > 0).all(axis=None)
    assert rsna_score(solution, frame, TABLE)["score"] < 3
    blank = frequency_baseline(healthy.assign(bowel_healthy=np.nan, bowel_injury=np.nan), ["a"], TABLE, pseudocount=0)
    assert blank.loc[0, ["bowel_healthy", "bowel_injury"]].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="pseudocount"):
        frequency_baseline(healthy, ["a"], TABLE, pseudocount=-1)


def _series(values: np.ndarray, patients: list[object]) -> pd.DataFrame:
    return _frame(values).assign(patient_id=patients, series_id=[f"s{row}" for row in range(len(values))])


def test_combine_series_by_hand():
    table = TABLE.select(["bowel", "liver"])
    rows = [["1", "a", 0.9, 0.1, 0.7, 0.2, 0.1], ["1", "b", 0.4, 0.6, 0.5, 0.1, 0.4], ["2", "c", 2, 2, 1, 0, 0]]
    frame = pd.DataFrame(rows, columns=["patient_id", "series_id", *table.columns])
    found = combine_series(frame, table)
    assert found["patient_id"].tolist() == ["1", "2"]
    np.testing.assert_allclose(found.loc[0, list(table.columns)].astype(float), [0.4, 0.6, 5 / 11, 2 / 11, 4 / 11])
    np.testing.assert_allclose(found.loc[1, list(table.columns)].astype(float), [0.5, 0.5, 1, 0, 0])
    mean = combine_series(frame, table, how="mean")
    np.testing.assert_allclose(mean.loc[0, list(table.columns)].astype(float), [0.65, 0.35, 0.6, 0.15, 0.25])


@settings(deadline=None, max_examples=50)
@given(
    npst.arrays(np.float64, (6, 13), elements=st.floats(1e-6, 10)),
    st.lists(st.integers(0, 2), min_size=6, max_size=6),
    st.sampled_from(["max", "mean"]),
)
def test_combined_groups_sum_to_one(values, patients, how):
    frame = _series(values, patients)
    found = combine_series(frame, TABLE, how).set_index("patient_id")
    single = combine_series(frame.assign(patient_id=frame["series_id"]), TABLE, how)
    for part in TABLE.column_slices.values():
        columns = COLUMNS[part]
        np.testing.assert_allclose(found[columns].sum(axis=1), 1)
        np.testing.assert_allclose(  # one series: only divided by the sum
            single[columns], frame[columns].div(frame[columns].sum(axis=1), axis=0), rtol=1e-9
        )
        if how == "max":  # never more healthy than the most injured series
            lowest = single[columns[0]].groupby(np.array(patients)).min()
            assert (found[columns[0]].to_numpy() <= lowest[found.index.astype(int)].to_numpy() + 1e-12).all()


def test_combine_series_refuses():
    frame = _series(np.ones((2, 13)), ["1", "1"])
    with pytest.raises(ValueError, match="'max' or 'mean', got 'min'"):
        combine_series(frame, TABLE, "min")
    with pytest.raises(ValueError, match="1 series more than once: 1"):
        combine_series(frame.assign(series_id="s"), TABLE)
    with pytest.raises(ValueError, match="lack 1 columns: liver_low"):
        combine_series(frame.drop(columns="liver_low"), TABLE)
    with pytest.raises(ValueError, match="NaN"):
        combine_series(frame.assign(liver_low=np.nan), TABLE)
