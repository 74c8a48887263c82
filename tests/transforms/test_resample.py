# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A tilted or unevenly sampled series on a regular grid: an object known at every point of space stays where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from transforms import LoadSeries, SeriesError

from tests.transforms.ct_factory import set_stored

WriteSeries = Callable[..., Path]
CENTRE = np.array([3.0, -5.0, 130.0])  # LPS mm, inside every stack below


def ramp(points: np.ndarray) -> np.ndarray:
    """HU that linear interpolation finds exactly."""
    return (points - CENTRE) @ [9.0, -7.0, 5.0]


def ball(points: np.ndarray) -> np.ndarray:
    """A soft ball of 100 HU in water, 12 mm wide."""
    return 100 * np.exp(-(np.linalg.norm(points - CENTRE, axis=-1) ** 2) / (2 * 12.0**2))


def scanned(
    hu: Callable[[np.ndarray], np.ndarray],
    heights: list[float],
    *,
    tilt: float = 0.0,
    table: float = 0.0,
    turned: bool = False,
) -> Callable[[int, Dataset], None]:
    """Slices of `hu` at `heights`: images tilted about x by `tilt` degrees, moved along y by `table` mm a mm."""
    c, s = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    row, column = np.array([1.0, 0, 0]), np.array([0, c, s])
    if turned:  # rows run from front to back
        row, column = column, row

    def edit(k: int, ds: Dataset) -> None:
        size, pixel = 64, 1.25
        middle = CENTRE + np.array([0, table * (heights[k] - CENTRE[2]), heights[k] - CENTRE[2]])
        first = middle - (row + column) * pixel * (size - 1) / 2
        v, u = np.indices((size, size))[..., None]
        points = first + u * pixel * row + v * pixel * column
        ds.ImageOrientationPatient = [f"{x:.10f}" for x in (*row, *column)]
        ds.ImagePositionPatient = [f"{x:.8f}" for x in first]
        ds.PixelSpacing, ds.RescaleIntercept, ds.RescaleSlope = [pixel, pixel], "-1024", "0.0625"
        set_stored(ds, np.rint((hu(points) + 1024) * 16), signed=False)

    return edit


def compare(volume: object, hu: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, float]:
    """Error in HU at every voxel that the scan reached, and the share of those."""
    found = volume[0].numpy()
    points = nib.affines.apply_affine(volume.affine.numpy(), np.moveaxis(np.indices(found.shape), 0, -1))
    reached = found != -1024
    return (found - hu(points * [-1, -1, 1]))[reached], reached.mean()


EVEN = [100 + 4.0 * k for k in range(16)]
UNEVEN = [100 + 3.0 * k + (0.9 * (k - 8) if k > 8 else 0) for k in range(16)]
SCANS = {
    "tilted images": (EVEN, {"tilt": 17.0}),
    "tilted the other way": (EVEN, {"tilt": -12.5}),
    "moving table": (EVEN, {"table": 0.2}),
    "tilted and turned": (EVEN, {"tilt": 14.0, "turned": True}),
    "uneven": (UNEVEN, {}),
    "uneven and tilted": (UNEVEN, {"tilt": 10.0}),
    "uneven and oblique": (UNEVEN, {"tilt": 9.0, "table": -np.tan(np.radians(9.0))}),
}


@pytest.mark.parametrize("scan", SCANS)
def test_every_point_keeps_its_hu(write_series: WriteSeries, scan: str) -> None:
    heights, geometry = SCANS[scan]
    folder = write_series(scanned(ramp, heights, **geometry), slices=16)
    with pytest.raises(SeriesError, match=r"resample=True makes it a regular grid"):
        LoadSeries()(folder)
    volume = LoadSeries(dtype="float32", resample=True)(folder)
    error, reached = compare(volume, ramp)
    assert np.abs(error).max() < 0.1  # stored to 1/16 HU
    assert reached > 0.6  # the rest are the wedges before, behind, above and below a tilted stack
    assert np.count_nonzero(volume.affine.numpy()[:3, :3]) == 3  # along the axes of the body
    assert (np.diag(volume.affine)[:3] > 0).all()
    assert volume.pixdim[:2].tolist() == pytest.approx([1.25, 1.25], rel=0.02)
    assert volume.meta["resampled"] == 1
    assert volume.meta["spatial_shape"].tolist() == [64, 64, 16]


@pytest.mark.parametrize("scan", SCANS)
def test_a_ball_stays_a_ball(write_series: WriteSeries, scan: str) -> None:
    heights, geometry = SCANS[scan]
    volume = LoadSeries(dtype="float32", resample=True)(write_series(scanned(ball, heights, **geometry), slices=16))
    error, _ = compare(volume, ball)
    assert np.abs(error).max() < 2.5  # of 100: a 4 mm step over a Gaussian of 12 mm, interpolated linearly
    weights = np.where(volume[0].numpy() > 20, volume[0].numpy(), 0)
    centre = [np.average(index, weights=weights) for index in np.indices(weights.shape)]
    np.testing.assert_allclose(nib.affines.apply_affine(volume.affine.numpy(), centre) * [-1, -1, 1], CENTRE, atol=0.15)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.floats(2.0, 2.9), min_size=7, max_size=7), tilt=st.floats(-25, 25), table=st.floats(-0.3, 0.3))
def test_any_tilt_and_any_steps(write_series: WriteSeries, steps: list[float], tilt: float, table: float) -> None:
    heights = [float(h) for h in 120 + np.cumsum([0, *steps])]
    volume = LoadSeries(dtype="float32", resample=True)(
        write_series(scanned(ramp, heights, tilt=tilt, table=table), slices=8)
    )
    if volume.meta["resampled"]:  # else regular, or by less than half a pixel
        assert np.abs(compare(volume, ramp)[0]).max() < 0.1


def test_a_regular_series_is_not_interpolated(write_series: WriteSeries) -> None:
    folder = write_series()
    plain, asked = LoadSeries()(folder), LoadSeries(resample=True)(folder)
    np.testing.assert_array_equal(plain.numpy(), asked.numpy())
    np.testing.assert_array_equal(plain.affine, asked.affine)
    assert asked.meta["resampled"] == 0


def test_int16_is_rounded_and_outside_is_air(write_series: WriteSeries) -> None:
    folder = write_series(scanned(ramp, EVEN, tilt=17.0), slices=16)
    exact, volume = (LoadSeries(dtype=dtype, resample=True)(folder).numpy() for dtype in ("float32", "int16"))
    assert np.abs(exact - volume).max() <= 1  # slices are rounded to int16, then what is between them
    assert (volume[0, 0, 0, 0], volume[0, 0, -1, -1]) == (-1024, -1024)


def test_duplicates_are_compared_before_resampling(write_series: WriteSeries) -> None:
    heights = [*EVEN[:8], EVEN[7]]
    folder = write_series(scanned(ramp, heights, tilt=17.0), slices=9)
    assert LoadSeries(resample=True)(folder).meta["dropped_duplicates"] == 1
    (folder / "008.dcm").unlink()
    other = scanned(ball, heights, tilt=17.0)
    write_series(lambda k, ds: other(k, ds) if k == 8 else False, slices=9)
    with pytest.raises(SeriesError, match=r"008\.dcm: expected one image at each position"):
        LoadSeries(resample=True)(folder)


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0, 3, 6, 12, 15, 18], r"1 missing between 002\.dcm and 003\.dcm"),
        ([0, 3, 6, 13.4, 16.4, 19.4], r"steps from 3\.00 to 7\.40 mm, the widest between 002\.dcm and 003\.dcm"),
    ],
    ids=["missing", "gap"],
)
@pytest.mark.parametrize("tilt", [0.0, 15.0])
def test_what_no_slice_shows_is_not_made_up(
    write_series: WriteSeries, heights: list[float], expected: str, tilt: float
) -> None:
    scale = 1 / np.cos(np.radians(tilt))  # the steps along the normal are those above
    folder = write_series(scanned(ramp, [120 + scale * h for h in heights], tilt=tilt))
    with pytest.raises(SeriesError, match=expected):
        LoadSeries(resample=True)(folder)


def test_a_slice_out_of_line_is_no_tilt(write_series: WriteSeries) -> None:
    def edit(k: int, ds: Dataset) -> None:
        ds.ImagePositionPatient = [-11.0 + (k == 3), -12.0, 100.0 + 5 * k]

    with pytest.raises(SeriesError, match=r"stacked in a line, found 003\.dcm 1\.0 mm sideways"):
        LoadSeries(resample=True)(write_series(edit))


def test_no_gantry_tilts_that_far(write_series: WriteSeries) -> None:
    with pytest.raises(SeriesError, match="stacked along their normal, found them 50 degrees off"):
        LoadSeries(resample=True)(write_series(scanned(ramp, EVEN, table=1.2), slices=16))


def test_an_absurd_grid_is_refused(write_series: WriteSeries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transforms.geometry.MAX_VOXELS", 64 * 64 * 17)
    with pytest.raises(SeriesError, match=r"series: expected at most .* found 64 x \d+ x \d+"):
        LoadSeries(resample=True)(write_series(scanned(ramp, EVEN, tilt=17.0), slices=16))
