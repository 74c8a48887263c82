# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Patient metrics: against scikit-learn, undefined values, intervals."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from bundles.rsna_cnn_lstm.scripts.intervals import weighted_calls
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.metrics import (
    bootstrap_interval,
    evaluate_patients,
    summary_table,
    weighted_auc,
    weighted_average_precision,
)
from bundles.rsna_cnn_lstm.scripts.score import frequency_baseline, rsna_score

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
TABLE = LabelTable.from_file(ROOT / "bundles/rsna_cnn_lstm/configs/labels.json")
COLUMNS = list(TABLE.columns)
SOLUTION = pd.read_csv(GOLDEN / "rsna_solution.csv")
SUBMISSION = pd.read_csv(GOLDEN / "rsna_submission.csv")


@pytest.fixture(scope="module")
def golden() -> dict:
    return evaluate_patients(SOLUTION, SUBMISSION, TABLE, n_resamples=200, seed=3)


def _normalised() -> pd.DataFrame:
    frame = SUBMISSION.copy()
    for part in TABLE.column_slices.values():
        frame[COLUMNS[part]] = frame[COLUMNS[part]].div(frame[COLUMNS[part]].sum(axis=1), axis=0)
    return frame


def test_point_values_are_scikit_learns(golden):
    p = _normalised()
    p_any = 1 - p[[group.columns[0] for group in TABLE.groups]].min(axis=1)
    ap = {name: average_precision_score(SOLUTION[name], p[name]) for name in TABLE.injury_columns}
    ap["any_injury"] = average_precision_score(SOLUTION["any_injury"], p_any)
    assert {name: figure["value"] for name, figure in golden["average_precision"].items()} == pytest.approx(ap)
    assert golden["mAP"]["value"] == pytest.approx(np.mean(list(ap.values())))
    auc = {g.name: roc_auc_score(1 - SOLUTION[g.columns[0]], 1 - p[g.columns[0]]) for g in TABLE.groups}
    auc["any_injury"] = roc_auc_score(SOLUTION["any_injury"], p_any)
    assert {name: figure["value"] for name, figure in golden["auc"].items()} == pytest.approx(auc)
    high = {name: roc_auc_score(SOLUTION[f"{name}_high"], p[f"{name}_high"]) for name in ("kidney", "liver", "spleen")}
    assert {name: figure["value"] for name, figure in golden["auc_high_grade"].items()} == pytest.approx(high)
    terms = {name: figure["value"] for name, figure in golden["score_terms"].items()}
    assert {**terms, "score": golden["score"]["value"]} == rsna_score(SOLUTION, SUBMISSION, TABLE)


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_calls_are_scikit_learns(threshold):
    found = evaluate_patients(SOLUTION, SUBMISSION, TABLE, n_resamples=0, threshold=threshold)
    p = _normalised()
    any_called = np.zeros(len(p), dtype=bool)
    for group in TABLE.groups:
        values = p[list(group.columns)].to_numpy()
        healthy = values[:, 0]
        any_called |= (values.argmax(axis=1) > 0) if threshold is None else (1 - healthy >= threshold)
        for index, column in enumerate(group.columns[1:], start=1):
            called = values.argmax(axis=1) == index if threshold is None else values[:, index] >= threshold
            row = found["classes"][column]
            assert (row["positives"], row["called"]) == (SOLUTION[column].sum(), called.sum())
            assert row["precision"] == pytest.approx(precision_score(SOLUTION[column], called))
            assert row["recall"] == pytest.approx(recall_score(SOLUTION[column], called))
            assert row["f1"] == pytest.approx(f1_score(SOLUTION[column], called))
        injured, called = 1 - SOLUTION[group.columns[0]], values.argmax(axis=1) > 0
        if threshold is not None:
            called = 1 - healthy >= threshold
        assert found["precision"][group.name]["value"] == pytest.approx(precision_score(injured, called))
        assert found["recall"][group.name]["value"] == pytest.approx(recall_score(injured, called))
        assert found["f1"][group.name]["value"] == pytest.approx(f1_score(injured, called))
        assert found["f1"][group.columns[-1]]["value"] == found["classes"][group.columns[-1]]["f1"]
        for column in group.columns[1:]:
            brier = brier_score_loss(SOLUTION[column], p[column])
            assert found["brier"][column]["value"] == pytest.approx(brier)
    assert found["classes"]["any_injury"]["called"] == any_called.sum()
    assert found["macro"]["recall"] == pytest.approx(np.mean([row["recall"] for row in found["classes"].values()]))


def test_intervals_hold_the_values(golden):
    figures = [golden["score"], golden["mAP"]]
    sections = ("auc", "score_terms", "precision", "recall", "f1", "brier")
    figures += [figure for section in sections for figure in golden[section].values()]
    for figure in figures:
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["resamples"] == 200


def test_seed_decides_the_intervals(golden):
    assert evaluate_patients(SOLUTION, SUBMISSION, TABLE, n_resamples=200, seed=3) == golden
    other = evaluate_patients(SOLUTION, SUBMISSION, TABLE, n_resamples=200, seed=4)
    assert other["score"]["low"] != golden["score"]["low"]
    assert other["score"]["value"] == golden["score"]["value"]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(4, 30), st.integers(2, 20))
def test_weighted_figures_are_scikit_learns(seed, n, distinct):
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(n) % 2).astype(float)
    probability = rng.integers(0, distinct, n) / distinct  # with ties
    counts = rng.multinomial(n, np.full(n, 1 / n), size=5).astype(float)
    auc, ap = weighted_auc(counts, truth, probability), weighted_average_precision(counts, truth, probability)
    for row, (found_auc, found_ap) in enumerate(zip(auc, ap, strict=True)):
        positives, negatives = counts[row] @ truth, counts[row] @ (1 - truth)
        assert np.isnan(found_ap) == (positives == 0)
        assert np.isnan(found_auc) == (positives == 0 or negatives == 0)
        if positives and negatives:
            drawn = np.repeat(np.arange(n), counts[row].astype(int))  # the resample itself, not weights
            assert found_auc == pytest.approx(roc_auc_score(truth[drawn], probability[drawn]))
            assert found_ap == pytest.approx(average_precision_score(truth[drawn], probability[drawn]))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(3, 15))
def test_weighted_calls_are_scikit_learns(seed, n):
    rng = np.random.default_rng(seed)
    truth, decision = rng.integers(0, 2, n).astype(float), rng.integers(0, 2, n).astype(bool)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=4).astype(float)
    found = np.stack(weighted_calls(counts, truth, decision))
    for row, drawn in enumerate(np.repeat(np.arange(n), times.astype(int)) for times in counts):
        y, called = truth[drawn], decision[drawn]
        expected = [f(y, called, zero_division=np.nan) for f in (precision_score, recall_score, f1_score)]
        np.testing.assert_allclose(found[:, row], expected if y.any() else [np.nan] * 3)


def test_bootstrap_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    low, high, resamples = bootstrap_interval(lambda counts: (counts @ values / 400)[None], 400, 2000, seed=1)
    error = values.std() / 20
    assert low[0] == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high[0] == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert resamples.tolist() == [2000]


def test_bootstrap_interval_over_defined_resamples():
    figures = lambda counts: np.stack([np.where(counts[:, 0] > 0, counts[:, 0], np.nan), np.full(len(counts), np.nan)])  # noqa: E731
    low, _, resamples = bootstrap_interval(figures, 3, 500, seed=0)
    assert low[0] >= 1
    assert 300 < resamples[0] < 400  # 1 - (2/3)^3 = 70 %
    assert np.isnan(low[1])
    assert resamples[1] == 0


def _without(column: str) -> pd.DataFrame:
    """The solution in which nobody has the class."""
    group = next(group for group in TABLE.groups if column in group.columns)
    solution = SOLUTION.copy()
    rows = solution[column] == 1
    solution.loc[rows, list(group.columns)] = [1] + [0] * (len(group.columns) - 1)
    return solution


def test_class_without_positives_is_undefined():
    found = evaluate_patients(_without("liver_high"), SUBMISSION, TABLE, n_resamples=50)
    nothing = {"value": None, "low": None, "high": None, "resamples": 0}
    assert found["average_precision"]["liver_high"] == nothing
    assert found["auc_high_grade"]["liver"] == nothing
    assert [found[section]["liver_high"] for section in ("precision", "recall", "f1", "brier")] == [nothing] * 4
    row = found["classes"]["liver_high"]
    assert (row["positives"], row["precision"], row["recall"], row["f1"]) == (0, None, None, None)
    defined = [figure["value"] for figure in found["average_precision"].values() if figure["value"] is not None]
    assert len(defined) == 8
    assert found["mAP"]["value"] == pytest.approx(np.mean(defined))
    bowel = evaluate_patients(_without("bowel_injury"), SUBMISSION, TABLE, n_resamples=50)
    assert bowel["auc"]["bowel"] == nothing
    assert bowel["score_terms"]["bowel"]["value"] > 0


def test_positive_that_nobody_calls():
    healthy = SUBMISSION.assign(bowel_healthy=0.9, bowel_injury=0.1)
    row = evaluate_patients(SOLUTION, healthy, TABLE, n_resamples=0)["classes"]["bowel_injury"]
    assert (row["called"], row["precision"], row["recall"], row["f1"]) == (0, None, 0, 0)


def test_masked_group_and_json():
    solution = SOLUTION.astype(dict.fromkeys(COLUMNS, float))
    solution.loc[:, ["liver_healthy", "liver_low", "liver_high"]] = np.nan
    solution.loc[:20, ["bowel_healthy", "bowel_injury"]] = np.nan
    found = evaluate_patients(solution, SUBMISSION, TABLE, n_resamples=50)
    assert found["score_terms"]["liver"]["value"] is None
    assert found["auc"]["any_injury"]["value"] is None
    assert found["classes"]["bowel_injury"]["labelled"] == len(solution) - 21
    p = _normalised()
    expected = roc_auc_score(SOLUTION["bowel_injury"][21:], p["bowel_injury"][21:])
    assert found["auc"]["bowel"]["value"] == pytest.approx(expected)
    json.dumps(found, allow_nan=False)


def test_baseline(golden):
    base = golden["baseline"]
    ids = list(SOLUTION["patient_id"])
    constant = frequency_baseline(SOLUTION, ids, TABLE, pseudocount=0)
    assert base["score"] == rsna_score(SOLUTION, constant, TABLE)["score"]
    assert set(base["auc"].values()) == {0.5}
    assert base["average_precision"]["liver_low"] == pytest.approx(SOLUTION["liver_low"].mean())
    difference = base["score_difference"]
    assert difference["value"] == pytest.approx(golden["score"]["value"] - base["score"])
    given_one = frequency_baseline(SOLUTION, ids, TABLE, weighted=False)
    other = evaluate_patients(SOLUTION, SUBMISSION, TABLE, n_resamples=0, baseline=given_one)
    assert other["baseline"]["source"] == "given"
    assert other["baseline"]["score"] > base["score"]


def test_difference_tells_learning_from_noise():
    """Beating the frequencies is certain with the truth at hand, and not with shuffled rows."""
    truth = SOLUTION[COLUMNS] * 0.5 + frequency_baseline(SOLUTION, SOLUTION["patient_id"], TABLE)[COLUMNS] * 0.5
    good = truth.assign(patient_id=SOLUTION["patient_id"])
    difference = evaluate_patients(SOLUTION, good, TABLE, n_resamples=200)["baseline"]["score_difference"]
    assert difference["high"] < 0
    bad = good.assign(patient_id=good["patient_id"].sample(frac=1, random_state=0).to_numpy())
    difference = evaluate_patients(SOLUTION, bad, TABLE, n_resamples=200)["baseline"]["score_difference"]
    assert difference["high"] > 0
    same = evaluate_patients(SOLUTION, good, TABLE, n_resamples=50, baseline=good)["baseline"]["score_difference"]
    assert (same["value"], same["low"], same["high"]) == (0, 0, 0)  # paired


def test_one_patient_has_no_interval():
    found = evaluate_patients(SOLUTION[:1], SUBMISSION[:1], TABLE)
    assert found["score"]["value"] > 0
    assert (found["score"]["low"], found["score"]["resamples"]) == (None, 0)


def test_other_table():
    table = LabelTable.from_dict(
        {"groups": [{"name": "liver", "classes": [{"name": "healthy"}, {"name": "injury", "score_weight": 2}]}]}
    )
    solution = pd.DataFrame({"patient_id": "abcd", "liver_healthy": [1, 1, 0, 0], "liver_injury": [0, 0, 1, 1]})
    solution["patient_id"] = list("abcd")
    submission = pd.DataFrame({"patient_id": list("abcd"), "liver_healthy": [0.9, 0.4, 0.5, 0.2]})
    submission["liver_injury"] = 1 - submission["liver_healthy"]
    found = evaluate_patients(solution, submission, table, n_resamples=20)
    assert found["auc"]["liver"]["value"] == 0.75
    assert found["auc_high_grade"] == {}
    assert list(found["score_terms"]) == ["liver"]
    assert "any_injury" not in found["classes"]


def test_summary_table(golden):
    table = summary_table(golden)
    assert list(table.columns) == ["figure", "value", "low", "high", "baseline"]
    rows = table.set_index("figure")
    assert rows.loc["score", "value"] == golden["score"]["value"]
    assert rows.loc["AUC liver high grade", "baseline"] == 0.5
    assert rows.loc["score minus baseline", "high"] == golden["baseline"]["score_difference"]["high"]
    assert rows.loc["score minus baseline", "baseline"] is None
    json.dumps(table.to_dict("records"), allow_nan=False)


def test_a_thousand_resamples_are_quick():
    start = time.perf_counter()
    evaluate_patients(SOLUTION[:150], SUBMISSION[:150], TABLE, n_resamples=1000)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("options", [{"n_resamples": -1}, {"confidence_level": 1.0}])
def test_refuses(options):
    with pytest.raises(ValueError, match="n_resamples >= 0 and 0 < confidence_level < 1"):
        evaluate_patients(SOLUTION, SUBMISSION, TABLE, **options)
