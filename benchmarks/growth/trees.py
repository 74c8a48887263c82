# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Synthetic series to measure on: thousands of tiny ones as an RSNA 2023 tree, and long ones of full size."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd

from demo.dataset import Options, Patient, Volume, make_patient
from demo.dicom import write_series

SEED = 0
PHANTOMS = 25  # rendered for a tree; a further series repeats the pixels of one under ids and UIDs of its own
PATIENT, SERIES = 10001, 20001  # the first ids
WRITERS = 2
RENDERED = 150  # slices of a long series' phantom; more than these repeat their pixels, and no step looks at that


@lru_cache(maxsize=PHANTOMS)
def _phantom(index: int, size: int, slices: int) -> tuple[Patient, Volume]:
    patient = make_patient(SEED, index, Options(size=size, slices=slices, series_per_patient=1.0))
    return patient, patient.render()


def _write_one(number: int, tree: Path, size: int, slices: int) -> dict[str, Any]:
    """Series `number` of a tree, of a patient of its own; returns the patient's row of train.csv."""
    patient, volume = _phantom(number % PHANTOMS, size, slices)
    ids = PATIENT + number, SERIES + number
    write_series(tree / "train_images" / str(ids[0]) / str(ids[1]), volume.hu, volume.scan, SEED, (*ids, 1))
    return {"patient_id": ids[0]} | patient.labels


def write_tree(tree: Path, series: int, size: int, slices: int) -> Path:
    """An RSNA 2023 tree with one series a patient, each with UIDs of its own.

    Args:
        tree: is created.
        series: how many.
        size: rows and columns, at least 32.
        slices: mean number of a series, at least 8.
    """
    write = partial(_write_one, tree=tree, size=size, slices=slices)
    if series <= PHANTOMS:
        rows = [write(number) for number in range(series)]
    else:
        with ProcessPoolExecutor(WRITERS, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(write, range(series), chunksize=PHANTOMS))
    pd.DataFrame(rows).to_csv(tree / "train.csv", index=False)
    return tree


def write_long(folder: Path, slices: int, size: int) -> Path:
    """One series of exactly so many equally spaced slices of a whole phantom."""
    patient, volume = _phantom(0, size, min(slices, RENDERED))
    depth = volume.scan.depth
    extent = volume.scan.spacing * (depth - 1)
    hu = volume.hu[[k * depth // slices for k in range(slices)]]
    scan = replace(volume.scan, depth=slices, spacing=extent / max(slices - 1, 1))
    write_series(folder, hu, scan, SEED, (patient.patient_id, SERIES, 1))
    _phantom.cache_clear()
    return folder


def every_nth(series: Path, folder: Path, slices: int) -> Path:
    """A shorter series of the same body: links to so many equally spaced files of `series`.

    Raises:
        ValueError: if the spacing would not be equal.
    """
    files = sorted(series.glob("*.dcm"), key=lambda path: int(path.stem))
    if slices < 1 or len(files) % slices:
        raise ValueError(f"slices: expected numbers that divide the largest, {len(files)}, found {slices}")
    folder.mkdir(parents=True)
    for file in files[:: len(files) // slices]:
        (folder / file.name).symlink_to(file)
    return folder


def check_divisors(numbers: Sequence[int]) -> None:
    """Raises ValueError where `every_nth` would, before anything is written."""
    bad = [number for number in numbers if number < 1 or max(numbers) % number]
    if bad:
        raise ValueError(f"slices: expected numbers that divide the largest, {max(numbers)}, found {bad}")
