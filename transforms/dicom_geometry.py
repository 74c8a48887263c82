# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Order of the slices of a DICOM series and the affine of the volume they form, or why they form none.

highdicom orders the slices and builds the affine; the checks around it exist to say what is wrong, and to be stricter
about shear, for which highdicom's tolerance is an angle of 2.6 degrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from highdicom.spatial import create_affine_matrix_from_attributes, get_normal_vector, get_volume_positions

from .dicom_headers import SliceHeader
from .errors import SeriesError
from .geometry import check_size

__all__ = ["SliceStack", "stack_slices"]

INDEX_CONVENTION = ("R", "D")  # pixel indices as (column, row); slices ascend along row direction x column direction
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MAX_OBLIQUE = 30.0  # degrees between slice normal and body axis; beyond it slices are not axial
SAME_POSITION = 0.01  # mm
SPACING_RTOL = 0.01  # highdicom's default
ROUNDED_POSITION = 0.1  # mm; positions rounded to one decimal make steps differ by up to this
MAX_TILT = 45.0  # degrees; gantries tilt by up to 30
MAX_GAP = 1.5  # in usual steps: what is resampled is uneven sampling, not anatomy that no slice shows


@dataclass(frozen=True)
class SliceStack:
    """Slices of a volume in order, what repeats them, and where they lie."""

    slices: list[SliceHeader]
    duplicates: list[tuple[int, SliceHeader]]  # (index into `slices`, another image at its position)
    affine: np.ndarray  # (column, row, slice) -> RAS mm, [4, 4] float64; by the mean step where irregular
    positions: np.ndarray  # [slices, 3] centre of each slice's first pixel, LPS mm
    normal: np.ndarray  # [3] unit vector along which the slices ascend, LPS
    irregular: str  # why the slices are no regular grid as they are; empty where they are one

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        rows, columns = self.slices[0].matrix.tolist()
        return columns, rows, len(self.slices)


def stack_slices(folder: Path, headers: Sequence[SliceHeader], *, resample: bool = False) -> SliceStack:
    """Order `headers` along the normal and check that they are one regular axial volume.

    With `resample` a tilted gantry and uneven steps are told in `irregular` instead of refused; missing slices, a slice
    out of line and a gap of more than `MAX_GAP` usual steps are not.
    """
    rows, columns = headers[0].matrix.tolist()
    _check_agreement(folder, headers)
    orientation = np.median([h.orientation for h in headers], axis=0)
    normal = _axial_normal(folder, orientation)
    ordered = sorted(headers, key=lambda h: float(h.position @ normal))
    slices, duplicates = _split_duplicates(folder, ordered, normal)
    if len(slices) == 1 and duplicates:
        raise SeriesError(
            f"{folder}: expected slices at different positions, found all {len(headers)} at the same one."
        )
    check_size(folder, (columns, rows, len(slices)))
    positions = np.stack([h.position for h in slices])
    distances = (positions - positions[0]) @ normal
    irregular = _explain_shear(folder, slices, positions, distances, normal)
    step = distances[-1] / (len(slices) - 1)
    spacing, order = get_volume_positions(
        positions[0] + distances[:, None] * normal,
        orientation.tolist(),
        atol=max(SPACING_RTOL * step, min(ROUNDED_POSITION, 0.2 * step)),
        index_convention=INDEX_CONVENTION,
    )
    if spacing is None or order != list(range(len(slices))):
        _check_gaps(folder, slices, np.diff(distances))
        irregular += " and " * bool(irregular) + _explain_steps(np.diff(distances))
    if irregular and not resample:
        expected = "slices stacked along their normal" if irregular.startswith("a gantry") else "evenly spaced slices"
        raise SeriesError(f"{folder}: expected {expected}, found {irregular}. resample=True makes it a regular grid.")
    affine = create_affine_matrix_from_attributes(
        slices[0].position.tolist(),
        orientation.tolist(),
        np.median([h.spacing for h in slices], axis=0).tolist(),
        spacing_between_slices=step if irregular else spacing,
        index_convention=INDEX_CONVENTION,
    )
    if irregular:
        affine[:3, 2] = (positions[-1] - positions[0]) / (len(slices) - 1)
    return SliceStack(slices, duplicates, LPS_TO_RAS @ affine, positions, normal, irregular)


def _check_agreement(folder: Path, headers: Sequence[SliceHeader]) -> None:
    """Refuse slices that differ in matrix, pixel spacing, orientation or frame of reference, naming the odd one out."""
    for name, what, tolerance in (
        ("matrix", "rows and columns", 0.0),
        ("spacing", "pixel spacing in mm", 1e-3),
        ("orientation", "orientation", 1e-3),
    ):
        values = np.stack([getattr(h, name) for h in headers])
        usual = np.median(values, axis=0)
        odd = np.flatnonzero((np.abs(values - usual) > tolerance).any(axis=1))
        if len(odd):
            raise SeriesError(
                f"{headers[odd[0]].path}: expected the {what} of the series, {usual.tolist()}, found"
                f" {values[odd[0]].tolist()} ({len(odd)} of {len(headers)} slices in {folder} differ)."
            )
    frames = {h.frame_of_reference for h in headers} - {""}
    if len(frames) > 1:
        raise SeriesError(f"{folder}: expected one FrameOfReferenceUID, found {len(frames)}: positions do not compare.")


def _axial_normal(folder: Path, orientation: np.ndarray) -> np.ndarray:
    """Unit normal of the slices, along which highdicom numbers them."""
    row, column = orientation[:3], orientation[3:]
    if abs(np.linalg.norm(row) - 1) > 0.01 or abs(np.linalg.norm(column) - 1) > 0.01 or abs(row @ column) > 0.01:
        raise SeriesError(f"{folder}: expected two orthogonal unit directions, found {orientation.tolist()}.")
    normal = get_normal_vector(orientation.tolist(), index_convention=INDEX_CONVENTION)
    oblique = np.degrees(np.arccos(min(abs(normal[2]), 1.0)))
    if oblique > MAX_OBLIQUE:
        kind = ("sagittal", "coronal", "strongly oblique")[int(np.abs(normal).argmax())]
        raise SeriesError(
            f"{folder}: expected axial slices, found {kind} ones, {oblique:.0f} degrees off the axis of the body."
        )
    return normal


def _split_duplicates(
    folder: Path, ordered: Sequence[SliceHeader], normal: np.ndarray
) -> tuple[list[SliceHeader], list[tuple[int, SliceHeader]]]:
    """Slices of distinct height, and those that repeat one of them (their pixels are compared when decoded)."""
    slices: list[SliceHeader] = []
    duplicates: list[tuple[int, SliceHeader]] = []
    for header in ordered:
        moved = header.position - slices[-1].position if slices else None
        if moved is None or abs(moved @ normal) > SAME_POSITION:
            slices.append(header)
        elif np.linalg.norm(moved) <= SAME_POSITION:
            duplicates.append((len(slices) - 1, header))
        else:
            raise SeriesError(
                f"{folder}: expected one slice at each height, found {slices[-1].path.name} and {header.path.name}"
                f" beside each other, {np.linalg.norm(moved):.1f} mm apart in their own plane."
            )
    return slices, duplicates


def _explain_shear(
    folder: Path, slices: Sequence[SliceHeader], positions: np.ndarray, distances: np.ndarray, normal: np.ndarray
) -> str:
    """The tilt where slices drift sideways by more than half a pixel, as under a tilted gantry; empty otherwise.

    Raises:
        SeriesError: a slice lies beside the line of the others, or the tilt is none of a gantry.
    """
    limit = 0.5 * slices[0].spacing.min()
    drift = positions - positions[0] - distances[:, None] * normal  # [slices, 3]
    sideways = np.linalg.norm(drift, axis=1)
    if sideways.max() <= limit:
        return ""
    beside = np.linalg.norm(drift - np.outer(distances / distances[-1], drift[-1]), axis=1)
    if beside.max() > limit:
        raise SeriesError(
            f"{folder}: expected slices stacked in a line, found {slices[int(beside.argmax())].path.name}"
            f" {beside.max():.1f} mm sideways of it."
        )
    angle = np.degrees(np.arctan2(sideways[-1], distances[-1]))
    if angle > MAX_TILT:
        raise SeriesError(f"{folder}: expected slices stacked along their normal, found them {angle:.0f} degrees off.")
    return f"a gantry tilt of {angle:.1f} degrees, {sideways.max():.1f} mm sideways"


def _explain_steps(steps: np.ndarray) -> str:
    return f"steps from {steps.min():.2f} to {steps.max():.2f} mm"


def _check_gaps(folder: Path, slices: Sequence[SliceHeader], steps: np.ndarray) -> None:
    """Refuse missing slices, where every step is a multiple of the smallest, and any other gap that none can fill."""
    multiples = steps / steps.min()
    if np.abs(multiples - multiples.round()).max() < 0.1 and multiples.max() > 1.5:
        gaps = [
            f"{int(multiples[k].round()) - 1} missing between {slices[k].path.name} and {slices[k + 1].path.name}"
            f" (a gap of {steps[k]:.2f} mm)"
            for k in np.flatnonzero(multiples > 1.5)
        ]
        shown = ", ".join(gaps[:5]) + (f" and {len(gaps) - 5} more gaps" if len(gaps) > 5 else "")
        raise SeriesError(
            f"{folder}: expected evenly spaced slices, found slices {steps.min():.2f} mm apart with {shown}."
        )
    usual, widest = np.quantile(steps, 0.5, method="lower"), int(steps.argmax())
    if steps[widest] > MAX_GAP * usual:
        raise SeriesError(
            f"{folder}: expected evenly spaced slices, found {_explain_steps(steps)}, the widest between"
            f" {slices[widest].path.name} and {slices[widest + 1].path.name}, where most are {usual:.2f} mm."
        )
