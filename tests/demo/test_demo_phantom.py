# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The phantoms: prevalence, how injuries change the image, look-alikes, noise, and the absence of leaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from scipy.ndimage import binary_dilation
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from demo.canvas import Canvas, Ellipsoid
from demo.dataset import GROUPS, Options, Patient, Volume, make_patient
from demo.dicom import series_template
from demo.injuries import CODES
from demo.scanner import PADDING_HU, noise_bank

TINY = Options(size=64, slices=16)


def _twin(index: int, conspicuity: float, prevalence: float = 1.0) -> Volume:
    options = Options(size=96, slices=24, prevalence=prevalence, conspicuity=conspicuity)
    return make_patient(11, index, options).render()


# ----------------------------------------------------------------------------------------------- injuries
@pytest.mark.parametrize("prevalence", [0.1, 0.35, 0.8])
def test_prevalence_is_about_what_was_asked(prevalence: float) -> None:
    options = Options(prevalence=prevalence)
    grades = np.array([list(make_patient(1, i, options).plan.grades.values()) for i in range(250)])
    tolerance = 4 * np.sqrt(prevalence * (1 - prevalence) / 250)
    assert np.abs((grades > 0).mean(0) - prevalence).max() < tolerance
    organs = grades[:, 2:]
    assert abs((organs == 2).sum() / (organs > 0).sum() - 0.5) < 0.2
    correlation = np.corrcoef((grades > 0).T) - np.eye(len(GROUPS))
    assert np.abs(correlation).max() < 4 / np.sqrt(250)


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 10_000))
def test_an_injury_changes_its_own_voxels_and_no_others(index: int) -> None:
    """A healthy twin has the same anatomy, scan and noise: nothing but the injury can tell the two apart."""
    injured, healthy = _twin(index, 1.0), _twin(index, 1.0, prevalence=0.0)
    assert injured.scan == healthy.scan
    assert not healthy.injury.any()
    outside = ~binary_dilation(injured.injury > 0, iterations=4)
    different = injured.hu != healthy.hu
    assert (different & outside).mean() < 1e-3  # voxels of which an injury fills less than half
    assert not different[:, :4].any()  # above the patient
    for group in GROUPS:
        assert (injured.injury == CODES[group]).any(), group


@pytest.mark.parametrize("group", GROUPS)
def test_conspicuity_scales_contrast_and_size(group: str) -> None:
    """Mean size and contrast over patients grow with conspicuity."""
    figures = []
    for conspicuity in (0.3, 0.6, 1.0):
        sizes, contrasts = [], []
        for index in range(6):
            injured, healthy = _twin(index, conspicuity), _twin(index, conspicuity, prevalence=0.0)
            mask = injured.injury == CODES[group]
            sizes.append(mask.sum() * injured.scan.pixel**2 * injured.scan.spacing)
            contrasts.append(np.abs(injured.hu[mask].astype(float) - healthy.hu[mask]).mean())
        figures.append((np.mean(sizes), np.mean(contrasts)))
    size, contrast = np.transpose(figures)
    assert (np.diff(size) > 0).all()
    assert (np.diff(contrast) > 0).all()
    assert contrast[-1] > 50


def test_injuries_need_context() -> None:
    """Values of each injury occur in healthy patients too, and plentifully."""
    volumes = [make_patient(2, i, Options(size=96, slices=24, prevalence=0.0)).render() for i in range(6)]
    inner = [volume.hu[4:-4, 20:-20, 16:-16] for volume in volumes]
    for low, high in ((0, 30), (250, 400), (-1000, -850)):  # lacerations, extravasation, free gas
        assert all(((v >= low) & (v <= high)).mean() > 3e-4 for v in inner)


def test_low_and_high_grade_differ_in_extent_and_fluid() -> None:
    extent = {1: [], 2: []}
    fluid = {1: [], 2: []}
    for index in range(80):
        patient = make_patient(4, index, Options(size=64, slices=16, prevalence=0.5))
        grades = patient.plan.grades
        if grades["liver"] and not (grades["extravasation"] or grades["kidney"] or grades["spleen"]):
            injury = patient.render().injury
            extent[grades["liver"]].append((injury == CODES["liver"]).sum())
            fluid[grades["liver"]].append((injury == CODES["fluid"]).sum())
    assert min(len(extent[1]), len(extent[2])) >= 2
    assert np.mean(extent[2]) > 1.5 * np.mean(extent[1])
    assert max(fluid[1]) == 0 < min(fluid[2])


def test_look_alikes_occur_at_a_few_per_cent() -> None:
    patients = [make_patient(0, i) for i in range(250)]
    contrast = np.mean([any(loop.content == "contrast" for loop in p.anatomy.loops) for p in patients])
    cysts = np.mean([bool(p.anatomy.cysts) for p in patients])
    assert 0.05 < contrast < 0.15
    assert 0.08 < cysts < 0.28


# ------------------------------------------------------------------------------------------------- images
def test_patients_and_series_differ() -> None:
    patients = [make_patient(0, i, Options(series_per_patient=2)) for i in range(12)]
    for values in (
        [p.scans[0].pixel for p in patients],
        [p.scans[0].lowest for p in patients],
        [p.scans[0].sigma for p in patients],
        [p.anatomy.half_width for p in patients],
        [p.scans[1].sigma / p.scans[0].sigma for p in patients],
    ):
        assert len(set(values)) == len(values)
    assert {len(p.scans) for p in patients} == {2}
    counts = [len(make_patient(0, i, Options(series_per_patient=1.3)).scans) for i in range(200)]
    assert np.mean(counts) == pytest.approx(1.3, abs=0.12)


def test_padding_fills_the_corners_of_padded_series_only() -> None:
    seen = set()
    for index in range(12):
        volume = make_patient(0, index, TINY).render()
        corner = volume.hu[:, 0, 0]
        assert (corner == PADDING_HU).all() == volume.scan.padded
        assert (volume.hu[:, 32, 32] > -1100).all()
        seen.add(volume.scan.padded)
    assert seen == {True, False}


def test_noise_is_correlated_and_of_unit_variance() -> None:
    lags = []
    for kernel in range(3):
        bank = noise_bank(64, kernel)
        assert bank.std() == pytest.approx(1, abs=0.01)
        assert abs(bank.mean()) < 0.05
        lags.append((bank[:, :, 1:] * bank[:, :, :-1]).mean())
    assert lags[0] > lags[1] > lags[2] > 0.2


@settings(deadline=None, max_examples=30)
@given(
    centre=st.tuples(*[st.floats(-20, 20)] * 3),
    axes=st.tuples(*[st.floats(8, 30)] * 3),
    turn=st.floats(-180, 180),
    tilt=st.floats(-90, 90),
    wobble=st.sampled_from([0.0, 0.1, 0.18]),
)
def test_bounding_box_holds_the_whole_ellipsoid(
    centre: tuple, axes: tuple, turn: float, tilt: float, wobble: float
) -> None:
    """The volume found in the box is that of the ellipsoid: 4/3 pi abc, whatever its rotation."""
    grid = np.arange(-80, 81, 2, dtype=np.float32)
    box, alpha = Canvas(grid, grid, grid).coverage(Ellipsoid(centre, axes, turn, tilt, wobble))
    edges = [alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1]]
    assert all(edge.max() < 0.75 for edge in edges)
    if not wobble:
        assert alpha.sum() * 8 == pytest.approx(4 / 3 * np.pi * np.prod(axes), rel=0.08)
    assert alpha.shape == tuple(s.stop - s.start for s in box)


# --------------------------------------------------------------------------------------------------- leaks
def _headers(ds: Dataset) -> list[float]:
    """Every element of a series that is no identifier, as numbers."""
    values = []
    for name in sorted(ds.dir()):
        if name.endswith(("UID", "ID")) or name in ("PixelData", "PixelPaddingValue"):
            continue
        item = ds[name].value
        for value in item if ds[name].VM > 1 else [item]:
            try:
                values.append(float(value))
            except (TypeError, ValueError):
                values.append(float(sum(str(value).encode())))
    return values


def _features(patient: Patient) -> list[float]:
    """Headers, number of slices, file numbers, noise and background of the first series."""
    volume, scan = patient.render(), patient.scans[0]
    template = series_template(scan, patient.seed, patient.patient_id, patient.series_id(0), 1)
    background = volume.hu[:, :3, 12:-12].astype(float)
    roughness = np.diff(volume.hu[:, :3, 12:-12].astype(float), axis=2).std()
    numbers = [scan.instance_number(0), scan.instance_number(scan.depth - 1), scan.depth, len(patient.scans)]
    geometry = [scan.pixel * scan.size, scan.lowest, *scan.first_pixel, scan.tissue.aorta, float(scan.padded)]
    return [*_headers(template), *numbers, *geometry, background.mean(), background.std(), roughness]


@pytest.fixture(scope="module")
def probe() -> tuple[np.ndarray, np.ndarray]:
    """Features [patients, F] and grades [patients, 5] of one data set."""
    patients = [make_patient(21, i, Options(size=48, slices=10)) for i in range(300)]
    return np.array([_features(p) for p in patients]), np.array([list(p.plan.grades.values()) for p in patients])


def _auc(features: np.ndarray, target: np.ndarray, model: str) -> float:
    chosen = {
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500)),
        "boosting": HistGradientBoostingClassifier(max_iter=25, max_leaf_nodes=8, random_state=0),
    }[model]
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return roc_auc_score(target, cross_val_predict(chosen, features, target, cv=folds, method="predict_proba")[:, 1])


@pytest.mark.parametrize("model", ["logistic", "boosting"])
@pytest.mark.parametrize("group", [*GROUPS, "any"])
def test_headers_noise_and_field_of_view_tell_nothing(
    probe: tuple[np.ndarray, np.ndarray], group: str, model: str
) -> None:
    features, grades = probe
    target = (grades.max(1) if group == "any" else grades[:, GROUPS.index(group)]) > 0
    positive, negative = target.sum(), (~target).sum()
    chance = 0.5 + 3 * np.sqrt((positive + negative + 1) / (12 * positive * negative))  # of the Mann-Whitney U
    assert _auc(features, target, model) < chance


@pytest.mark.parametrize("model", ["logistic", "boosting"])
def test_the_leak_probe_finds_a_leak(probe: tuple[np.ndarray, np.ndarray], model: str) -> None:
    """A label that moves one header by a standard deviation is found."""
    features, grades = probe
    target = grades[:, 0] > 0
    leaky = features.copy()
    varying = int(np.argmax(features.std(0) > 0))
    leaky[:, varying] += target * 1.5 * features[:, varying].std()
    assert _auc(leaky, target, model) > 0.7
