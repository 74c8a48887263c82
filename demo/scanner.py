# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""One acquisition of a phantom: field of view, slices, contrast phase, table, point spread and noise.

Everything here is drawn without a look at the injuries, so that no property of a scan can betray a label.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .anatomy import Anatomy
from .canvas import AIR, Canvas
from .phantom import Enhancement, body_half_sizes

PADDING_HU = -3024  # a stored value of -2000 under the intercept of -1024


@dataclass(frozen=True)
class Scan:
    """The parameters of one series.

    Args:
        size: rows and columns.
        pixel: pixel size, mm.
        first_pixel: x and y of the centre of the first voxel, mm.
        depth: number of slices.
        spacing: distance between slices, mm.
        thickness: nominal slice thickness, mm.
        lowest: z of the lowest slice, mm.
        phase: name of the contrast phase.
        tissue: HU of the tissues.
        kvp: tube voltage; only a header value.
        sigma: noise in the middle of the image, HU.
        kernel: reconstruction kernel, 0 smooth to 2 sharp.
        padded: whether voxels outside the round field of view hold padding.
        head_first: the file with the lowest number is the top slice (else the bottom one).
        first_number: InstanceNumber of that file.
        table: gap under the patient and thickness of the table's shell, mm.
    """

    size: int
    pixel: float
    first_pixel: tuple[float, float]
    depth: int
    spacing: float
    thickness: float
    lowest: float
    phase: str
    tissue: Enhancement
    kvp: int
    sigma: float
    kernel: int
    padded: bool
    head_first: bool
    first_number: int
    table: tuple[float, float]

    def axis(self, k: int) -> np.ndarray:
        """Voxel centres along x (0), y (1) or z (2), mm, float32."""
        if k == 2:
            return (self.lowest + self.spacing * np.arange(self.depth)).astype(np.float32)
        return (self.first_pixel[k] + self.pixel * np.arange(self.size)).astype(np.float32)

    def instance_number(self, k: int) -> int:
        """The number of the file that holds slice ``k``, counted from the feet."""
        return self.first_number + (self.depth - 1 - k if self.head_first else k)


def draw_scan(rng: np.random.Generator, anatomy: Anatomy, size: int, slices: int) -> Scan:
    """Draw one acquisition.

    Args:
        rng: a generator that is used for nothing else.
        anatomy: the patient; only the body's size matters.
        size: rows and columns.
        slices: number of slices on average; a series has 85 to 115 % of it.
    """
    side, front, back = body_half_sizes(anatomy)
    fov = max(2 * side * rng.uniform(0.98, 1.2), (front + back) * 1.12)
    pixel = round(fov / size, 6)
    corner = tuple(
        round(float(middle + shift - (size - 1) / 2 * pixel), 3)
        for middle, shift in zip((0.0, (back - front) / 2 + 8), rng.normal(0, 5, 2), strict=True)
    )
    depth = max(4, round(slices * rng.uniform(0.85, 1.15)))
    top, bottom = rng.uniform(128, 175), rng.uniform(-232, -165)
    spacing = round((top - bottom) / (depth - 1), 2)
    phase, tissue = _draw_phase(rng)
    return Scan(
        size=size,
        pixel=pixel,
        first_pixel=corner,
        depth=depth,
        spacing=spacing,
        thickness=round(spacing * rng.choice([0.8, 1.0, 1.25]), 2),
        lowest=round(bottom, 2),
        phase=phase,
        tissue=tissue,
        kvp=int(rng.choice([100, 120, 140])),
        sigma=rng.uniform(8, 20),
        kernel=int(rng.integers(0, 3)),
        padded=bool(rng.random() < 0.3),
        head_first=bool(rng.random() < 0.6),
        first_number=int(rng.integers(1, 60)),
        table=(rng.uniform(2, 8), rng.uniform(3, 5)),
    )


def _draw_phase(rng: np.random.Generator) -> tuple[str, Enhancement]:
    """Draw a contrast phase and the HU of the tissues in it."""
    ranges = {
        "ARTERIAL": ((270, 370), (70, 120), (65, 85), (108, 135), (150, 190), (80, 105), (15, 40)),
        "PORTAL": ((140, 190), (130, 165), (98, 122), (108, 132), (155, 195), (140, 160), (15, 40)),
        "DELAYED": ((98, 125), (96, 120), (85, 102), (88, 105), (125, 150), (125, 150), (250, 500)),
    }
    phase = str(rng.choice(list(ranges), p=[0.25, 0.6, 0.15]))
    values = [float(rng.uniform(*limits)) for limits in ranges[phase]]
    return phase, Enhancement(*values, muscle=float(rng.uniform(48, 64)), bowel_wall=float(rng.uniform(60, 85)))


def table_image(scan: Scan, anatomy: Anatomy) -> np.ndarray:
    """[Y, X] float32 HU: a curved couch with a foam core under the patient's back, air elsewhere."""
    gap, shell = scan.table
    x, y = scan.axis(0)[None], scan.axis(1)[:, None]
    back = body_half_sizes(anatomy)[2] * 1.05 + gap
    below = y - (back - x**2 / 1500.0)
    lower = y - (back + 42 - x**2 / 700.0)
    inside = (below > 0) & (lower < 0)
    skin = inside & ((below < shell) | (lower > -shell))
    return np.where(skin, -60.0, np.where(inside, -930.0, AIR)).astype(np.float32)


@lru_cache(maxsize=8)
def noise_bank(size: int, kernel: int, textures: int = 12) -> np.ndarray:
    """Noise textures of unit variance with the spectrum of filtered back-projection: a ramp under an apodising window.

    Args:
        size: in-plane size of the images that will be cut out of it.
        kernel: 0 smooth, 1 standard, 2 sharp: how far the spectrum reaches.
        textures: how many independent ones.

    Returns:
        [textures, 2 size, 2 size] float32; always the same for the same arguments.
    """
    side = 2 * size
    rng = np.random.default_rng([20230726, size, kernel])
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]).astype(np.float32)
    cutoff = (0.10, 0.15, 0.22)[kernel]
    transfer = (frequency + np.float32(0.02)) * np.exp(-((frequency / np.float32(cutoff)) ** 2))
    white = rng.standard_normal((textures, side, side), dtype=np.float32)
    shaped = np.fft.irfft2(np.fft.rfft2(white) * transfer, s=(side, side)).astype(np.float32)
    shaped /= shaped.std(axis=(1, 2), keepdims=True)
    shaped.flags.writeable = False
    return shaped


def acquire(canvas: Canvas, rng: np.random.Generator, scan: Scan, anatomy: Anatomy) -> np.ndarray:
    """What the scanner adds: the point spread, the table, the noise, which is stronger in the middle, and padding.

    Args:
        canvas: the painted phantom.
        rng: draws the noise.
        scan: the acquisition.
        anatomy: the patient, on whose back the height of the table depends.

    Returns:
        [Z, Y, X] int16 HU, -1024 to 3071, and ``PADDING_HU`` outside the round field of view where the scan is padded.
    """
    depth, height, width = canvas.hu.shape
    bank, table = noise_bank(scan.size, scan.kernel), table_image(scan, anatomy)
    u, v = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    radius = np.hypot(u, v)
    gain = (scan.sigma * (1.0 - 0.4 * np.clip(radius, 0, 1.2))).astype(np.float32)
    result = np.empty(canvas.hu.shape, np.int16)
    pick = rng.integers(0, len(bank), depth)
    offsets = rng.integers(0, (bank.shape[1] - height + 1, bank.shape[2] - width + 1), (depth, 2))
    flips = rng.integers(0, 2, depth)
    for k in range(depth):
        image = np.maximum(canvas.hu[k], table)
        image[1:-1] = 0.5 * image[1:-1] + 0.25 * (image[:-2] + image[2:])
        image[:, 1:-1] = 0.5 * image[:, 1:-1] + 0.25 * (image[:, :-2] + image[:, 2:])
        top, left = offsets[k]
        noise = bank[pick[k], top : top + height, left : left + width]
        image += gain * (noise[:, ::-1] if flips[k] else noise)
        np.rint(image, out=image)
        result[k] = np.clip(image, -1024, 3071, out=image)
    if scan.padded:
        result[:, radius > 1] = PADDING_HU
    return result
