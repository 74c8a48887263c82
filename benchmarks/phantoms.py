# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Synthetic series for benchmarks, made once. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path


def make_phantoms(work: Path, number: int, size: int, slices: int, seed: int, segmentations: bool = False) -> Path:
    """A synthetic RSNA tree in `work`, one series a patient, with organ labels where asked for; made anew where an
    earlier call was cut short."""
    from demo.dataset import Options, write_dataset

    folder = work / f"phantoms_{number}_{size}_{slices}_{seed}{'_segmented' * segmentations}"
    complete = folder.with_suffix(".complete")
    if not complete.is_file():
        options = Options(size=size, slices=slices, series_per_patient=1.0, segmentations=float(segmentations))
        write_dataset(folder, patients=number, seed=seed, options=options, workers=1, overwrite=True, progress=False)
        complete.touch()
    return folder


def phantom_series(tree: Path) -> list[str]:
    """The series of such a tree, by patient."""
    return sorted(str(path) for path in (tree / "train_images").glob("*/*"))
