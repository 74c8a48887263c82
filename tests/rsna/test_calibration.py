# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Calibration: what it may never change, what a fit must recover, and what it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from bundles.rsna_cnn_lstm.scripts.calibrate import Calibrator, cross_fit, fit_calibration, read_predictions
from bundles.rsna_cnn_lstm.scripts.calibration import METHODS, WEIGHTINGS, Calibration, GroupCalibration
from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from bundles.rsna_cnn_lstm.scripts.score import combine_series, rsna_score

ROOT = Path(__file__).parents[2]
TABLE = LabelTable.from_file(ROOT / "bundles/rsna_cnn_lstm/configs/labels.json")
COLUMNS = list(TABLE.columns)
PROBABILITIES = npst.arrays(np.float64, (7, 13), elements=st.floats(1e-6, 1))


def frame(values: np.ndarray, patients: list[str] | None = None) -> pd.DataFrame:
    """Series with normalised groups."""
    values = np.array(values, dtype=np.float64)
    for part in TABLE.column_slices.values():
        values[:, part] /= values[:, part].sum(axis=1, keepdims=True)
    ids = [f"p{row}" for row in range(len(values))] if patients is None else patients
    ids = {"patient_id": ids, "series_id": [f"s{row}" for row in range(len(values))]}
    return pd.DataFrame(ids).join(pd.DataFrame(values, columns=COLUMNS))


def calibration(temperature: float = 1.0, factor: float = 1.0, method: str = "vector") -> Calibration:
    groups = {
        group.name: GroupCalibration((1.0, *[factor] * (len(group.classes) - 1)), temperature) for group in TABLE.groups
    }
    return Calibration(TABLE, method, "max", groups)


def simulated(n: int, temperature: float, seed: int = 0, weighting: str = "score") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Patients whose classes are drawn as their true probabilities say; what is predicted is off by a temperature."""
    rng = np.random.default_rng(seed)
    true, predicted = np.zeros((n, len(TABLE.groups)), dtype=int), np.zeros((n, len(COLUMNS)))
    for number, (group, part) in enumerate(zip(TABLE.groups, TABLE.column_slices.values(), strict=True)):
        # the score's optimum is the class-weighted probability, so that is what a perfect model for it would say
        logits = rng.normal(size=(n, len(group.classes))) * 1.5
        weighted = np.exp(logits)
        plain = weighted / np.asarray(group.score_weights if weighting == "score" else 1.0)
        plain /= plain.sum(axis=1, keepdims=True)
        true[:, number] = (plain.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
        predicted[:, part] = np.exp(logits * temperature)
    solution = pd.DataFrame(TABLE.one_hot(true), columns=COLUMNS)
    solution.insert(0, "patient_id", [f"p{row}" for row in range(n)])
    return frame(predicted), solution


def fitted_for(weighting: str) -> LabelTable:
    """The table by whose score a calibration of this weighting is judged."""
    if weighting == "score":
        return TABLE
    groups = [
        {"name": group.name, "classes": [{"name": item.name} for item in group.classes]} for group in TABLE.groups
    ]
    return LabelTable.from_dict({
        "groups": groups, "any_injury": {"name": "any_injury", "healthy_weight": 1, "injury_weight": 1},
    })  # fmt: skip


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "calibration.json").read_text(encoding="utf-8"))


@settings(deadline=None, max_examples=40)
@given(PROBABILITIES)
def test_identity_changes_nothing(values):
    series = frame(values)
    pd.testing.assert_frame_equal(calibration().apply(series), series, rtol=1e-14)


@settings(deadline=None, max_examples=40)
@given(PROBABILITIES, st.floats(0.05, 20), st.floats(0.05, 20))
def test_groups_sum_to_one_and_the_formula_holds(values, temperature, factor):
    series = frame(values)
    found = calibration(temperature, factor).apply(series)
    assert list(found.columns) == list(series.columns)
    for part in TABLE.column_slices.values():
        columns = COLUMNS[part]
        np.testing.assert_allclose(found[columns].sum(axis=1), 1)
        for row in range(len(series)):  # slow and obvious
            raised = [series[c][row] ** (1 / temperature) * (1 if k == 0 else factor) for k, c in enumerate(columns)]
            np.testing.assert_allclose(found.loc[row, columns].astype(float), np.array(raised) / sum(raised))


@settings(deadline=None, max_examples=40)
@given(PROBABILITIES, st.floats(0.05, 20))
def test_temperature_keeps_the_order_of_patients_and_of_classes(values, temperature):
    series = frame(np.round(values, 3) + 1e-3)
    found = calibration(temperature).apply(series)
    for column in ("bowel_injury", "extravasation_injury"):
        order = np.argsort(series[column].to_numpy(), kind="stable")
        assert (np.diff(found[column].to_numpy()[order]) >= 0).all()
    for part in TABLE.column_slices.values():
        before, after = series[COLUMNS[part]].to_numpy(), found[COLUMNS[part]].to_numpy()
        order = np.argsort(before, axis=1)
        assert (np.diff(np.take_along_axis(after, order, axis=1), axis=1) >= -1e-15).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("temperature", [0.5, 2.5])
def test_fit_recovers_the_temperature(temperature, weighting):
    series, solution = simulated(4000, temperature, weighting=weighting)
    fitted = fit_calibration(series, solution, TABLE, "temperature", weighting=weighting)
    assert {part.factors for part in fitted.groups.values()} == {(1.0, 1.0), (1.0, 1.0, 1.0)}
    found = [fitted.groups[name].temperature for name in TABLE.group_names]
    np.testing.assert_allclose(found, temperature, rtol=0.12)
    target = fitted_for(weighting)
    before = rsna_score(solution, series, target)
    after = rsna_score(solution, fitted.apply(series), target)
    assert all(after[name] < before[name] for name in TABLE.group_names)


@pytest.mark.parametrize(("weighting", "overstated"), [("none", False), ("score", True)])
def test_unweighted_probabilities_mean_what_they_say(weighting, overstated):
    """Predictions that are right already stay so; fitted to the weighted score they overstate injuries."""
    series, solution = simulated(3000, 1.0, weighting="none")
    fitted = fit_calibration(series, solution, TABLE, "factor", weighting=weighting).apply(series)
    healthy = [column for column in COLUMNS if column.endswith("_healthy")]
    ratio = (1 - fitted[healthy]).mean() / (1 - solution[healthy]).mean()
    assert (ratio > 1.1).all() if overstated else ((ratio > 0.95) & (ratio < 1.05)).all(), ratio


def test_fit_recovers_factors():
    series, solution = simulated(4000, 1.0)
    wrong = calibration(factor=0.2).apply(series)
    fitted = fit_calibration(wrong, solution, TABLE, "factor", weighting="score")
    for part in fitted.groups.values():
        assert part.temperature == 1
        np.testing.assert_allclose(part.factors[1:], 5, rtol=0.25)
    vector = fit_calibration(
        calibration(temperature=0.5, factor=0.2).apply(series), solution, TABLE, "vector", weighting="score"
    )
    found = [vector.groups[name].temperature for name in TABLE.group_names]
    np.testing.assert_allclose(found, 2, rtol=0.2)


def test_fit_minimises_the_patients_term_whatever_the_series():
    """No neighbour of the fitted temperature has a lower term once series are combined."""
    series, solution = simulated(600, 2.0)
    second = simulated(600, 1.5, seed=1)[0].assign(series_id=[f"t{k}" for k in range(600)])
    both = pd.concat([series, second], ignore_index=True)
    fitted = fit_calibration(both, solution, TABLE, "temperature", weighting="score")
    term = lambda c: rsna_score(solution, combine_series(c.apply(both), TABLE), TABLE)["spleen"]  # noqa: E731
    at = fitted.groups["spleen"]
    for factor in (0.8, 0.9, 1.1, 1.25):
        other = {**fitted.groups, "spleen": GroupCalibration(at.factors, at.temperature * factor)}
        assert term(fitted) < term(Calibration(TABLE, "temperature", "max", other))


def test_calibrated_predictions_stay_as_they_are():
    series, solution = simulated(4000, 1.0)
    fitted = fit_calibration(series, solution, TABLE, "vector", weighting="score")
    for part in fitted.groups.values():
        np.testing.assert_allclose([part.temperature, *part.factors], 1, rtol=0.15)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.sampled_from(METHODS))
def test_a_handful_of_patients_explodes_nothing(seed, n, method):
    series, solution = simulated(n, 3.0, seed)
    fitted = fit_calibration(series, solution, TABLE, method)
    numbers = [number for part in fitted.groups.values() for number in (part.temperature, *part.factors)]
    assert np.isfinite(numbers).all()
    assert min(numbers) > 1 / 20.001
    assert max(numbers) < 20.001
    after = rsna_score(solution, fitted.apply(series), TABLE)
    assert after["score"] < rsna_score(solution, series, TABLE)["score"] + 0.5


def test_group_without_positives_keeps_identity_and_says_so(caplog):
    series, solution = simulated(300, 2.0)
    solution = solution.assign(bowel_healthy=1.0, bowel_injury=0.0)
    solution[["kidney_healthy", "kidney_low", "kidney_high"]] = np.nan
    high = solution["liver_high"] == 1
    solution.loc[high, ["liver_low", "liver_high"]] = [1.0, 0.0]
    with caplog.at_level(logging.WARNING):
        fitted = fit_calibration(series, solution, TABLE, "vector")
    assert fitted.groups["bowel"].factors == (1.0, 1.0)
    assert fitted.groups["bowel"].temperature == fitted.groups["kidney"].temperature == 1
    assert "needs patients of two classes, found 300 bowel_healthy, 0 bowel_injury" in fitted.groups["bowel"].note
    assert "calibration of bowel left as it is" in caplog.text
    assert fitted.groups["liver"].factors[2] == 1  # nobody to fit it to
    assert fitted.groups["liver"].factors[1] != 1
    assert fitted.groups["liver"].note == "no patient with liver_high"


def test_predictions_that_know_the_answer_stop_at_the_bound(caplog):
    _, solution = simulated(2000, 1.0)
    sure = frame(solution[COLUMNS].to_numpy() + 20)
    with caplog.at_level(logging.WARNING):
        fitted = fit_calibration(sure, solution, TABLE)
    assert fitted.groups["liver"].temperature == pytest.approx(1 / 20)
    assert "at the bound" in fitted.groups["liver"].note
    assert "held out?" in caplog.text


def test_cross_fit_uses_the_other_patients_alone():
    """Turning the truth of one fold round changes nothing in that fold's own calibration."""
    series, solution = simulated(60, 2.0)
    held_out = cross_fit(series, solution, TABLE, num_folds=3, seed=1)
    assert held_out[["patient_id", "series_id"]].equals(series[["patient_id", "series_id"]])
    distinct = {}
    for row in range(60):  # the temperature that each patient got, from its own numbers
        before, after = series.loc[row, COLUMNS[:2]].astype(float), held_out.loc[row, COLUMNS[:2]].astype(float)
        ratio = np.log(before.iloc[1] / before.iloc[0]) / np.log(after.iloc[1] / after.iloc[0])
        distinct.setdefault(round(ratio, 6), []).append(row)
    assert len(distinct) == 3
    for temperature, rows in distinct.items():
        others = [row for row in range(60) if row not in rows]
        fitted = fit_calibration(series.loc[others], solution.loc[others], TABLE)
        assert fitted.groups["bowel"].temperature == pytest.approx(temperature, abs=1e-5)


def test_cross_fitted_gain_is_smaller_where_there_is_nothing_to_gain():
    series, solution = simulated(40, 1.0, seed=4)
    fitted = fit_calibration(series, solution, TABLE, "vector", weighting="score").apply(series)
    held_out = cross_fit(series, solution, TABLE, "vector", weighting="score")
    scores = [rsna_score(solution, part, TABLE)["score"] for part in (fitted, series, held_out)]
    assert scores[0] < scores[1]
    assert scores[0] < scores[2]


def run_folder(path: Path, series: pd.DataFrame, solution: pd.DataFrame) -> Path:
    path.mkdir()
    series.to_csv(path / "series_predictions.csv", index=False)
    combine_series(series, TABLE).to_csv(path / "predictions.csv", index=False)
    solution.to_csv(path / "solution.csv", index=False)
    return path


def test_the_run_writes_parameters_and_an_honest_comparison(tmp_path, caplog):
    series, solution = simulated(200, 2.0)
    parts = [run_folder(tmp_path / str(k), series[k::2], solution[k::2]) for k in (0, 1)]
    with caplog.at_level(logging.INFO):
        fitted = Calibrator(
            tmp_path / "out", TABLE, [str(part) for part in parts], weighting="score", n_resamples=100
        ).run()
    figures = pd.read_csv(tmp_path / "out" / "before_after.csv", index_col="figure")
    assert list(figures.columns) == ["before", "after", "cross_fitted"]
    assert list(figures.index) == [*TABLE.group_names, "any_injury", "score", "unweighted"]
    plain = rsna_score(solution, series, fitted_for("none"))["score"]
    assert (
        figures.loc["unweighted", "before"]
        == pytest.approx(plain)
        == pytest.approx(content_of(tmp_path)["unweighted"]["before"])
    )
    figures = figures.drop("unweighted")
    assert figures["before"].to_dict() == pytest.approx(rsna_score(solution, series, TABLE))
    assert figures["after"].to_dict() == pytest.approx(rsna_score(solution, fitted.apply(series), TABLE))
    assert figures.loc["score", "after"] < figures.loc["score", "cross_fitted"] < figures.loc["score", "before"]
    content = content_of(tmp_path)
    assert content["weighting"] == "score"
    gain = content["cross_fitted_minus_before"]
    assert gain["value"] == pytest.approx(figures.loc["score", "cross_fitted"] - figures.loc["score", "before"])
    assert gain["low"] < gain["value"] < gain["high"] < 0
    assert content["fitted_to"]["patients"] == 200
    again = Calibration.from_file(tmp_path / "out" / "calibration.json", TABLE)
    pd.testing.assert_frame_equal(again.apply(series), fitted.apply(series), check_exact=True)
    assert "cross_fitted" in caplog.text


def test_predictions_of_patients_and_a_whole_train_csv_will_do(tmp_path):
    series, solution = simulated(50, 2.0)
    folder = run_folder(tmp_path / "a", series[:40], solution[:40])
    for name in ("series_predictions.csv", "solution.csv"):
        (folder / name).unlink()
    solution.to_csv(tmp_path / "train.csv", index=False)
    for path in (folder, folder / "predictions.csv"):
        found, truth = read_predictions(str(path), str(tmp_path / "train.csv"))
        assert found["patient_id"].tolist() == truth["patient_id"].tolist() == solution["patient_id"][:40].tolist()


def test_refuses_predictions(tmp_path):
    series, solution = simulated(20, 2.0)
    one, two = (run_folder(tmp_path / name, series, solution) for name in ("one", "two"))
    with pytest.raises(ValueError, match=r"two.* and .*one.* share 20 patients: p0, .*held out in one fold only"):
        read_predictions([str(one), str(two)])
    with pytest.raises(ValueError, match=r"three: expected a CSV|three: .*no such file"):
        read_predictions(str(tmp_path / "three"))
    (two / "calibration.json").touch()
    with pytest.raises(ValueError, match="calibrated already"):
        read_predictions(str(two))
    (one / "series_predictions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected a patient_id in each row, found columns a, b"):
        read_predictions(str(one))
    (one / "series_predictions.csv").write_text("")
    with pytest.raises(ValueError, match="not a readable CSV"):
        read_predictions(str(one))
    with pytest.raises(ValueError, match="expected one of temperature, factor, vector, got 'platt'"):
        fit_calibration(series, solution, TABLE, "platt")
    with pytest.raises(ValueError, match="solution lacks 1 of 20 patients: p0"):
        fit_calibration(series, solution[1:], TABLE)


def test_refuses_files(tmp_path):
    path = tmp_path / "calibration.json"
    good = calibration(2.0).to_dict()

    def refused(content: str, message: str, table: LabelTable = TABLE) -> None:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Calibration.from_file(path, table)

    refused("{", r"calibration\.json: expected a calibration\.json")
    refused("[]", "not as calibrate.json's run writes it")
    refused(json.dumps(good), "fitted for bowel, .*, the label table has liver; differing", TABLE.select(["liver"]))
    for change in ({"temperature": 0}, {"temperature": True}, {"factors": [1]}, {"factors": [1, float("nan")]}):
        wrong = {**good, "groups": {**good["groups"], "bowel": {**good["groups"]["bowel"], **change}}}
        refused(json.dumps(wrong), "group 'bowel' needs a positive temperature and a positive factor a class")
    weights = {**good, "groups": {**good["groups"], "liver": {**good["groups"]["liver"], "score_weights": [1, 1, 1]}}}
    refused(json.dumps(weights), r"\('liver', .*\[1, 1, 1\]\)")
    with pytest.raises(ValueError, match=r"expected a calibration\.json, got .*No such file"):
        Calibration.from_file(tmp_path / "none.json", TABLE)
