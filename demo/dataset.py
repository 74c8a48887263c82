# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes synthetic abdominal trauma CT as an RSNA 2023 tree.

    python -m demo.dataset OUT --patients 300 --seed 0 --size 256 --slices 48

Patient ``i`` depends on ``(seed, i)`` and the options alone, not on the number of patients or of workers.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from .anatomy import LABELS, Anatomy, draw_anatomy
from .canvas import Canvas
from .dicom import write_series
from .injuries import CODES, GROUPS, ORGANS, Plan, draw_injuries, paint_injuries
from .phantom import paint_anatomy
from .scanner import Scan, acquire, draw_scan

COLUMNS = [f"{g}_{c}" for g in GROUPS for c in (("healthy", "low", "high") if g in ORGANS else ("healthy", "injury"))]
IMAGE_LEVEL = {"bowel": "Bowel", "extravasation": "Active_Extravasation"}
WRITTEN = (
    "train_images",
    "segmentations",
    "train.csv",
    "train_series_meta.csv",
    "image_level_labels.csv",
    "README.txt",
)
README = """SYNTHETIC abdominal trauma CT. Every voxel is computed from a seed; no patient is involved.
Not for clinical use.

Written by `python -m demo.dataset` in the layout of the RSNA 2023 Abdominal Trauma Detection data, which it does not
contain, resemble statistically or replace. Prevalence and conspicuity of the injuries are chosen so that a small
network learns quickly: results on it say that the software works, and nothing about patients.

"""


@dataclass(frozen=True)
class Options:
    """How a data set is made (the command line's options of the same names).

    Args:
        size: rows and columns of an image, 32 to 1024.
        slices: mean number of slices of a series, 8 to 1000.
        prevalence: probability of an injury in each of the five groups.
        conspicuity: contrast and size of the injuries, above 0 to 2.
        series_per_patient: mean number of series, 1 to 2.
        segmentations: fraction of the series whose segmentation is written.
    """

    size: int = 256
    slices: int = 48
    prevalence: float = 0.35
    conspicuity: float = 1.0
    series_per_patient: float = 1.2
    segmentations: float = 0.1

    def __post_init__(self) -> None:
        limits = {"size": (32, 1024), "slices": (8, 1000), "prevalence": (0, 1), "conspicuity": (0.01, 2)}
        limits |= {"series_per_patient": (1, 2), "segmentations": (0, 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, found {value}")


@dataclass(frozen=True)
class Volume:
    """One rendered series; arrays are [Z, Y, X], feet first, rows to the back, columns to the patient's left.

    Args:
        hu: int16.
        labels: uint8, 1 liver, 2 spleen, 3 left kidney, 4 right kidney, 5 bowel.
        injury: uint8, see ``demo.injuries.CODES``.
        scan: geometry and acquisition.
    """

    hu: np.ndarray
    labels: np.ndarray
    injury: np.ndarray
    scan: Scan

    @property
    def affine(self) -> np.ndarray:
        """[4, 4] float64: index (x, y, z) of the transposed array to RAS mm."""
        scan = self.scan
        affine = np.diag([-scan.pixel, -scan.pixel, scan.spacing, 1.0])
        affine[:3, 3] = -scan.first_pixel[0], -scan.first_pixel[1], scan.lowest
        return affine

    def incomplete_organ(self) -> int:
        """1 where the scan's first or last slice cuts a solid organ."""
        ends = self.labels[[0, -1]]
        return int(((ends > 0) & (ends < LABELS["bowel"])).any())

    def injured_slices(self, group: str, area: float = 20.0) -> list[int]:
        """Indices of the slices that show at least ``area`` mm2 of an injury of this group."""
        counts = (self.injury == CODES[group]).sum(axis=(1, 2))
        return np.flatnonzero(counts * self.scan.pixel**2 >= area).tolist()


@dataclass(frozen=True)
class Patient:
    """One synthetic patient: what :func:`make_patient` drew; ``scans`` and ``segmented`` have one item a series."""

    seed: int
    index: int
    anatomy: Anatomy
    plan: Plan
    scans: tuple[Scan, ...]
    segmented: tuple[bool, ...]

    @property
    def patient_id(self) -> int:
        """As in ``train.csv``."""
        return 10001 + self.index

    @property
    def labels(self) -> dict[str, int]:
        """Column -> 0 or 1; the columns of a group sum to 1."""
        row = dict.fromkeys(COLUMNS, 0)
        for group, grade in self.plan.grades.items():
            row[[c for c in COLUMNS if c.startswith(group)][grade]] = 1
        return row | {"any_injury": int(any(self.plan.grades.values()))}

    def series_id(self, k: int) -> int:
        """As in ``train_series_meta.csv``."""
        return 20001 + 2 * self.index + k

    def render(self, k: int = 0) -> Volume:
        """Paint series ``k`` (at most 0.2 s of one core for 48 slices of 256 x 256)."""
        scan = self.scans[k]
        canvas = Canvas(scan.axis(0), scan.axis(1), scan.axis(2))
        paint_anatomy(canvas, self.anatomy, scan.tissue)
        paint_injuries(canvas, self.plan, self.anatomy, scan)
        hu = acquire(canvas, _stream(self.seed, self.index, f"noise{k}"), scan, self.anatomy)
        return Volume(hu, canvas.labels, canvas.injury, scan)


def _stream(seed: int, index: int, purpose: str) -> np.random.Generator:
    """A random generator for one purpose in one patient, independent of all others."""
    return np.random.default_rng([seed, index, *purpose.encode()])


def make_patient(seed: int, index: int, options: Options | None = None) -> Patient:
    """Draw one patient; nothing is rendered yet.

    Args:
        seed: of the data set, at least 0.
        index: the patient's place in the data set, from 0.
        options: see :class:`Options`.
    """
    options = options or Options()
    anatomy = draw_anatomy(_stream(seed, index, "anatomy"))
    streams = {group: _stream(seed, index, group) for group in GROUPS}
    choice = _stream(seed, index, "series")
    count = 1 + int(choice.random() < options.series_per_patient - 1)
    scans = tuple(
        draw_scan(_stream(seed, index, f"scan{k}"), anatomy, options.size, options.slices) for k in range(count)
    )
    segmented = tuple(bool(v) for v in choice.random(count) < options.segmentations)
    plan = draw_injuries(streams, anatomy, options.prevalence, options.conspicuity)
    return Patient(seed, index, anatomy, plan, scans, segmented)


def _write_patient(index: int, seed: int, out: Path, options: Options) -> tuple[dict, list[dict], list[dict]]:
    """Write one patient's files; returns the rows for ``train.csv``, the series table and the image-level table."""
    patient = make_patient(seed, index, options)
    series, images = [], []
    for k, scan in enumerate(patient.scans):
        volume = patient.render(k)
        ids = {"patient_id": patient.patient_id, "series_id": patient.series_id(k)}
        folder = out / "train_images" / str(ids["patient_id"]) / str(ids["series_id"])
        write_series(folder, volume.hu, scan, seed, (*ids.values(), k + 1))
        series.append(ids | {"aortic_hu": round(scan.tissue.aorta, 2), "incomplete_organ": volume.incomplete_organ()})
        for group, name in IMAGE_LEVEL.items():
            numbers = sorted(scan.instance_number(z) for z in volume.injured_slices(group))
            images += [ids | {"instance_number": n, "injury_name": name} for n in numbers]
        if patient.segmented[k]:
            image = nib.Nifti1Image(volume.labels.transpose(2, 1, 0), volume.affine)
            image.header["descrip"] = b"SYNTHETIC PHANTOM"
            image.header.set_xyzt_units("mm")
            nib.save(image, out / "segmentations" / f"{ids['series_id']}.nii")
    return {"patient_id": patient.patient_id} | patient.labels, series, images


def _prepare(out: Path, overwrite: bool) -> None:
    """An empty folder; with ``overwrite`` an older synthetic data set is removed, and nothing else ever."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: expected a folder, found a file")
    present = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if present and not overwrite:
        raise FileExistsError(
            f"{out}: expected an empty folder, found {len(present)} entries; --overwrite replaces them"
        )
    marker = out / "README.txt"
    if present and not (
        marker.is_file() and marker.read_text().startswith("SYNTHETIC") and set(present) <= set(WRITTEN)
    ):
        raise FileExistsError(
            f"{out}: expected an older synthetic data set to overwrite, found {', '.join(present[:5])}"
        )
    for name in present:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    (out / "train_images").mkdir(parents=True)
    (out / "segmentations").mkdir()
    marker.write_text(README + "Not complete: the writing was interrupted.\n")


def _write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_dataset(
    out: str | Path,
    *,
    patients: int = 300,
    seed: int = 0,
    options: Options | None = None,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a synthetic data set in RSNA 2023's layout.

    Args:
        out: folder; must be absent or empty, or with ``overwrite`` hold an older synthetic data set.
        patients: number of patients, at least 1.
        seed: at least 0. The same seed gives the same bytes, whatever ``workers`` and ``patients``.
        options: see :class:`Options`.
        workers: processes; 1 works in this one.
        progress: show a progress bar.

    Returns:
        ``out``.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: ``out`` holds something that must not be replaced.
    """
    for name, value, low in (("patients", patients, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if value < low:
            raise ValueError(f"{name}: expected at least {low}, found {value}")
    options, out = options or Options(), Path(out)
    _prepare(out, overwrite)
    write = partial(_write_patient, seed=seed, out=out, options=options)
    bar = partial(tqdm, total=patients, desc="synthetic patients", unit="patient", disable=not progress)
    if workers == 1:
        results = list(bar(map(write, range(patients))))
    else:
        with ProcessPoolExecutor(min(workers, patients), mp_context=get_context("spawn")) as pool:
            results = list(bar(pool.map(write, range(patients), chunksize=2)))
    rows, series, images = zip(*results, strict=True)
    _write_csv(out / "train.csv", ["patient_id", *COLUMNS, "any_injury"], rows)
    ids = ["patient_id", "series_id"]
    _write_csv(out / "train_series_meta.csv", [*ids, "aortic_hu", "incomplete_organ"], (r for s in series for r in s))
    _write_csv(out / "image_level_labels.csv", [*ids, "instance_number", "injury_name"], (r for s in images for r in s))
    settings = "\n".join(f"{k}: {v}" for k, v in ({"patients": patients, "seed": seed} | asdict(options)).items())
    (out / "README.txt").write_text(f"{README}{settings}\n")
    return out


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    default = Options()
    parser = argparse.ArgumentParser(
        prog="python -m demo.dataset",
        description="Write SYNTHETIC abdominal trauma CT (computed phantoms, no patients) in the layout of RSNA 2023.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must be absent or empty")
    parser.add_argument("--patients", type=int, default=300, help="number of patients")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    parser.add_argument("--size", type=int, default=default.size, help="rows and columns of an image")
    parser.add_argument("--slices", type=int, default=default.slices, help="mean number of slices of a series")
    parser.add_argument(
        "--prevalence", type=float, default=default.prevalence, help="probability of an injury, per group"
    )
    parser.add_argument(
        "--conspicuity",
        type=float,
        default=default.conspicuity,
        help="contrast and size of injuries: 1 plain, 0.3 subtle",
    )
    parser.add_argument(
        "--series-per-patient", type=float, default=default.series_per_patient, help="mean number of series, 1 to 2"
    )
    parser.add_argument(
        "--segmentations", type=float, default=default.segmentations, help="fraction of series with a segmentation"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace an older synthetic data set in OUT")
    args = vars(parser.parse_args(argv))
    chosen = {name: args.pop(name) for name in asdict(default)}
    try:
        write_dataset(args.pop("out"), options=Options(**chosen), **args)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
