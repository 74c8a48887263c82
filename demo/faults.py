# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Sows faults of real CT into a synthetic RSNA tree, to see whether a reader finds exactly those.

    python -m demo.faults TREE --share 0.05 --seed 0

The truth is written to ``TREE/faults.csv``: ``patient_id, series_id, fault, harmful``. ``share`` of the series become
unusable (harmful 1); as many others get a peculiarity that no reader may stumble over (harmful 0). This module knows
DICOM through pydicom alone and shares no code with the reader that it tests.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import MPEG2MPML, EnhancedCTImageStorage, XRayRadiationDoseSRStorage, generate_uid
from tqdm import tqdm

__all__ = ["HARMFUL", "HARMLESS", "sow"]

Slices = list[Path]  # the files of a series from the feet up
MIN_SLICES = 8


def _edit(files: Iterable[Path], change: Callable[[int, Dataset], None]) -> None:
    """Read each file, change it and write it back."""
    for k, file in enumerate(files):
        ds = pydicom.dcmread(file)
        change(k, ds)
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.save_as(file)


def _add(files: Slices, source: Path, change: Callable[[Dataset], None]) -> None:
    """A further instance in the folder, made from one that is there."""
    number = max(int(file.stem) for file in files[0].parent.glob("*.dcm")) + 1
    ds = pydicom.dcmread(source)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid(
        entropy_srcs=[ds.SOPInstanceUID, str(number)]
    )
    ds.InstanceNumber = number
    change(ds)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.save_as(source.with_name(f"{number}.dcm"))


def _set(**tags: object) -> Callable[..., None]:
    """A change that sets tags; None deletes one."""

    def change(*slice_and_dataset: object) -> None:
        ds = slice_and_dataset[-1]
        for tag, value in tags.items():
            if value is None:
                delattr(ds, tag)
            else:
                setattr(ds, tag, value)

    return change


def _middle(files: Slices) -> Path:
    return files[len(files) // 2]


def _missing_slices(files: Slices) -> None:
    for file in files[len(files) // 2 :][:2]:
        file.unlink()


def _different_duplicate(files: Slices) -> None:
    def other_pixels(ds: Dataset) -> None:
        ds.PixelData = (np.frombuffer(ds.PixelData, np.uint16) ^ 64).tobytes()

    _add(files, _middle(files), other_pixels)


def _two_series(files: Slices) -> None:
    other = generate_uid(entropy_srcs=[str(files[0].parent.name), "second series"])
    for file in files[:3]:
        _add(files, file, _set(SeriesInstanceUID=other, SeriesNumber=99))


def _mixed_pixel_spacing(files: Slices) -> None:
    _edit([_middle(files)], lambda k, ds: setattr(ds, "PixelSpacing", [1.1 * float(v) for v in ds.PixelSpacing]))


def _mixed_orientation(files: Slices) -> None:
    c, s = math.cos(math.radians(8)), math.sin(math.radians(8))
    _edit([_middle(files)], _set(ImageOrientationPatient=[1, 0, 0, 0, round(c, 6), round(s, 6)]))


def _move(files: Slices, where: Callable[[int, np.ndarray, float], np.ndarray]) -> None:
    """New positions from (slice, position, distance between slices)."""
    heights = [float(pydicom.dcmread(f, stop_before_pixels=True).ImagePositionPatient[2]) for f in files[:2]]

    def change(k: int, ds: Dataset) -> None:
        position = where(k, np.array(ds.ImagePositionPatient, dtype=float), heights[1] - heights[0])
        ds.ImagePositionPatient = [f"{v:.4f}" for v in position]

    _edit(files, change)


def _gantry_tilt(files: Slices) -> None:
    slope = math.tan(math.radians(15))
    _move(files, lambda k, position, step: position + np.array([0, slope * k * step, 0]))


def _uneven_spacing(files: Slices) -> None:
    half = len(files) // 2
    _move(files, lambda k, position, step: position + np.array([0, 0, 0.4 * step * max(k - half, 0)]))


def _mixed_matrix(files: Slices) -> None:
    def halve(k: int, ds: Dataset) -> None:
        pixels = np.frombuffer(ds.PixelData, np.uint16).reshape(ds.Rows, ds.Columns)[::2, ::2]
        ds.Rows, ds.Columns = pixels.shape
        ds.PixelData = pixels.tobytes()

    _edit([_middle(files)], halve)


def _truncated(files: Slices) -> None:
    file = _middle(files)
    ds = pydicom.dcmread(file, stop_before_pixels=True)
    os.truncate(file, file.stat().st_size - ds.Rows * ds.Columns)  # half of its pixels


def _several_frames_of_reference(files: Slices) -> None:
    frame = generate_uid(entropy_srcs=[str(files[0].parent.name), "another frame"])
    _edit(files[: len(files) // 2], _set(FrameOfReferenceUID=frame))


def _coronal(files: Slices) -> None:
    def turn(k: int, ds: Dataset) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        ds.ImagePositionPatient = [0, 3 * k, 0]

    _edit(files, turn)


def _one_slice(files: Slices) -> None:
    for file in files[1:]:
        file.unlink()


def _empty_files(files: Slices) -> None:
    for file in files:
        os.truncate(file, 0)


def _eight_bit(files: Slices) -> None:
    def shrink(k: int, ds: Dataset) -> None:
        ds.PixelData = (np.frombuffer(ds.PixelData, np.uint16) >> 8).astype(np.uint8).tobytes()
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        if "PixelPaddingValue" in ds:
            del ds.PixelPaddingValue

    _edit(files, shrink)


def _undecodable(files: Slices) -> None:
    def video(k: int, ds: Dataset) -> None:
        ds.PixelData = pydicom.encaps.encapsulate([b"no picture at all "])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
        ds.file_meta.TransferSyntaxUID = MPEG2MPML

    _edit(files, video)


def _shuffled_numbers(files: Slices) -> None:
    numbers = [(5 * k + 3) % len(files) for k in range(len(files))] if len(files) % 5 else list(range(len(files)))[::-1]
    _edit(files, lambda k, ds: setattr(ds, "InstanceNumber", numbers[k]))


def _text_file(files: Slices) -> None:
    (files[0].parent / "notes.txt").write_text("SYNTHETIC: not a DICOM file\n")


def _localizer(files: Slices) -> None:
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}
    _add(files, files[0], _set(**scout))


def _dose_report(files: Slices) -> None:
    _add(files, files[0], _set(SOPClassUID=XRayRadiationDoseSRStorage, Modality="SR", PixelData=None))


# The rows of the fault table come first: a small tree has those at least.
HARMFUL: dict[str, Callable[[Slices], None]] = {
    "missing slices": _missing_slices,
    "different duplicate": _different_duplicate,
    "two series": _two_series,
    "mixed pixel spacing": _mixed_pixel_spacing,
    "mixed orientation": _mixed_orientation,
    "gantry tilt": _gantry_tilt,
    "non-uniform spacing": _uneven_spacing,
    "mixed matrix size": _mixed_matrix,
    "truncated pixel data": _truncated,
    "no rescale slope": lambda files: _edit(files[:1], _set(RescaleSlope=None)),
    "8-bit images": _eight_bit,
    "undecodable transfer syntax": _undecodable,
    "coronal": _coronal,
    "multi-frame": lambda files: _edit(files, _set(SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=2)),
    "one slice": _one_slice,
    "0-byte files": _empty_files,
    "0-byte first slice": lambda files: os.truncate(files[0], 0),
    "absurd rows": lambda files: _edit(files, _set(Rows=60000)),
    "no position": lambda files: _edit([_middle(files)], _set(ImagePositionPatient=None)),
    "several frames of reference": _several_frames_of_reference,
}
HARMLESS: dict[str, Callable[[Slices], None]] = {
    "shuffled InstanceNumber": _shuffled_numbers,
    "no InstanceNumber": lambda files: _edit(files, _set(InstanceNumber=None)),
    "MONOCHROME1": lambda files: _edit(files, _set(PhotometricInterpretation="MONOCHROME1")),
    "identical duplicate": lambda files: _add(files, _middle(files), _set()),
    "a file that is no DICOM": _text_file,
    "no FrameOfReferenceUID": lambda files: _edit(files, _set(FrameOfReferenceUID=None)),
    "a localizer": _localizer,
    "a dose report": _dose_report,
}


def sow(tree: Path, share: float = 0.05, seed: int = 0) -> pd.DataFrame:
    """Damage ``share`` of the series and make as many others peculiar.

    Args:
        tree: a synthetic tree of ``demo.dataset``; it is changed in place.
        share: of the series, above 0 to 0.5. Kinds are taken in order and again from the start, so that where there are
            enough series each kind occurs.
        seed: decides which series, at least 0.

    Returns:
        The content of ``tree/faults.csv``: ``patient_id`` and ``series_id`` (text), ``fault``, ``harmful`` (0 or 1).

    Raises:
        ValueError: ``tree`` is no synthetic one, was sown already, or is too small.
    """
    tree = Path(tree)
    readme, listing = tree / "README.txt", tree / "faults.csv"
    if not readme.is_file() or not readme.read_text().startswith("SYNTHETIC"):
        raise ValueError(f"{tree}: expected a synthetic tree, found no README.txt that says so; nothing was touched")
    if listing.exists():
        raise ValueError(f"{tree}: expected a tree without faults, found {listing.name}; nothing was touched")
    if not 0 < share <= 0.5:
        raise ValueError(f"share: expected above 0 to 0.5, found {share}")
    folders = sorted(path for path in (tree / "train_images").glob("*/*") if path.is_dir())
    number = round(share * len(folders))
    if number < 1:
        raise ValueError(
            f"{tree}: expected at least {math.ceil(0.5 / share)} series for one fault, found {len(folders)}"
        )
    order = np.random.default_rng(seed).permutation(len(folders))
    rows = []
    for harmful, kinds, chosen in ((1, HARMFUL, order[:number]), (0, HARMLESS, order[number : 2 * number])):
        for k, fault in tqdm(list(zip(chosen, cycle(kinds), strict=False)), desc=f"harmful {harmful}", leave=False):
            kinds[fault](_from_the_feet(folders[k]))
            rows.append((folders[k].parent.name, folders[k].name, fault, harmful))
    frame = pd.DataFrame(rows, columns=["patient_id", "series_id", "fault", "harmful"])
    frame = frame.sort_values(["patient_id", "series_id"], ignore_index=True)
    frame.to_csv(listing, index=False)
    return frame


def _from_the_feet(folder: Path) -> Slices:
    heights = {f: pydicom.dcmread(f, specific_tags=["ImagePositionPatient"]) for f in folder.glob("*.dcm")}
    files = sorted(heights, key=lambda file: float(heights[file].ImagePositionPatient[2]))
    if len(files) < MIN_SLICES:
        raise ValueError(f"{folder}: expected at least {MIN_SLICES} slices, found {len(files)}")
    return files


def main(argv: list[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m demo.faults",
        description="Sow faults of real CT into a synthetic tree of demo.dataset, in place.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("tree", metavar="TREE", type=Path, help="a tree written by demo.dataset")
    parser.add_argument("--share", type=float, default=0.05, help="of the series that become unusable")
    parser.add_argument("--seed", type=int, default=0, help="decides which series")
    try:
        sow(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
