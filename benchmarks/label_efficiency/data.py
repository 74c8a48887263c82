# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Synthetic patients by the demo's generator, straight to uint8 volumes as the bundles' preparation would give."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Resize, ScaleIntensityRange
from transforms.body import CropBody

from demo.anatomy import LABELS
from demo.dataset import COLUMNS, Options, Volume, make_patient
from demo.injuries import GROUPS

from .plan import FIRST_LEVEL, Plan

WINDOW = (-175.0, 250.0)  # HU
ORGAN_AREA = 100.0  # mm2 of an organ that make it present in a slice


@dataclass(frozen=True)
class Patients:
    """N prepared patients.

    Args:
        volumes: [N, Z, X, Y] uint8, RAS, memory-mapped.
        classes: [N, G] class indices in the order of the bundle's groups.
        organs: [N, Z, O] bool, organ present in the slice, in the order of ``demo.anatomy.LABELS``.
    """

    volumes: np.ndarray
    classes: np.ndarray
    organs: np.ndarray

    @property
    def depth(self) -> int:
        """Slices of a volume."""
        return self.volumes.shape[1]


def options(plan: Plan, level: str) -> Options:
    """The generator's options at a level."""
    data = plan["data"]
    return Options(
        size=data["size"],
        slices=data["depth"],
        prevalence=data["prevalence"],
        conspicuity=plan["levels"][level],
        series_per_patient=1.0,
    )


def prepare(volume: Volume, size: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """One rendered series as the bundles prepare it: crop to the body, window, regrid by area, round to uint8.

    Returns:
        [depth, size, size] uint8 (Z, X, Y in RAS) and [depth, O] bool, see `Patients`.
    """
    scan = volume.scan
    affine = np.diag([scan.pixel, scan.pixel, scan.spacing, 1.0])
    hu, labels = (np.ascontiguousarray(array.transpose(2, 1, 0)[::-1, ::-1]) for array in (volume.hu, volume.labels))
    image = MetaTensor(torch.from_numpy(hu)[None].float(), affine=torch.from_numpy(affine))
    cropper = CropBody()
    box = cropper.bounding_box(image)
    # 0.5 to 255.5: the cast cuts off, so this rounds
    rest = Compose([ScaleIntensityRange(*WINDOW, 0.5, 255.5, clip=True), Resize((size, size, depth), mode="area")])
    prepared = rest(cropper.crop(image, box)).as_tensor()[0].permute(2, 0, 1).to(torch.uint8)
    inside = labels[tuple(slice(start, end) for start, end in zip(*box, strict=True))]
    areas = np.stack([(inside == value).sum(axis=(0, 1)) for value in LABELS.values()], axis=1) * scan.pixel**2
    return prepared.contiguous().numpy(), regrid_presence(areas >= ORGAN_AREA, depth)


def regrid_presence(present: np.ndarray, depth: int) -> np.ndarray:
    """[Z, O] bool -> [depth, O]: an organ is in a new slice if it is in one of those averaged into it."""
    count = len(present)
    starts = [k * count // depth for k in range(depth)]
    ends = [-(-(k + 1) * count // depth) for k in range(depth)]
    return np.stack([present[start:end].any(axis=0) for start, end in zip(starts, ends, strict=True)])


def class_indices(labels: dict[str, int]) -> list[int]:
    """Class index of each group from the generator's 0/1 columns."""
    rows = [[labels[column] for column in COLUMNS if column.startswith(f"{group}_")] for group in GROUPS]
    return [row.index(1) for row in rows]


def number(plan: Plan, level: str, split: str) -> int:
    """Patients to render: of the other levels no more than is labelled, as nothing is pretrained there."""
    patients = plan["data"]["splits"][split]["patients"]
    return plan["data"]["labelled"] if split == "pool" and level != FIRST_LEVEL else patients


def write_patients(plan: Plan, level: str, split: str, folder: Path) -> dict[str, Any]:
    """Render a split and store it as ``<level>-<split>.npy`` and ``.npz``; how many patients have which injury."""
    size, depth = plan["data"]["size"], plan["data"]["depth"]
    seed, drawn, patients = plan["data"]["splits"][split]["seed"], options(plan, level), number(plan, level, split)
    folder.mkdir(parents=True, exist_ok=True)
    volumes = np.empty((patients, depth, size, size), np.uint8)
    classes, organs = [], []
    for index in range(patients):
        patient = make_patient(seed, index, drawn)
        volumes[index], present = prepare(patient.render(), size, depth)
        classes.append(class_indices(patient.labels))
        organs.append(present)
    _save(folder / f"{level}-{split}.npy", volumes)
    _save(folder / f"{level}-{split}.npz", classes=np.asarray(classes, np.int64), organs=np.stack(organs))
    injured = (np.asarray(classes) > 0).sum(axis=0)
    return {"patients": patients, "injured": dict(zip(GROUPS, injured.tolist(), strict=True))}


def _save(path: Path, array: np.ndarray | None = None, **arrays: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array) if array is not None else np.savez(file, **arrays)
    os.replace(temporary, path)


def load_patients(folder: Path, level: str, split: str) -> Patients:
    """What `write_patients` stored."""
    with np.load(folder / f"{level}-{split}.npz") as tables:
        volumes = np.load(folder / f"{level}-{split}.npy", mmap_mode="r")
        return Patients(volumes, tables["classes"], tables["organs"])
