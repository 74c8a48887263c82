# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""One patient's anatomy: which shapes lie where (painting them is in ``demo.phantom``).

The origin lies in the midline, in the middle of the body cavity, at about the level of the second lumbar vertebra.
``Anatomy.half_width`` (A) and ``half_depth`` (B) are the semi-axes of the body cavity; organs are placed in units of
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .canvas import Ellipsoid, Vector

LABELS = {"liver": 1, "spleen": 2, "left_kidney": 3, "right_kidney": 4, "bowel": 5}


@dataclass(frozen=True)
class Loop:
    """A piece of stomach or bowel: its outline, and what fills it (``fluid``, ``contrast``, ``gas``, ``stool``)."""

    outline: Ellipsoid
    content: str
    wall: float
    label: int | None = LABELS["bowel"]


@dataclass(frozen=True)
class Anatomy:
    """Shapes and sizes of one patient, in mm (see :func:`draw_anatomy`)."""

    half_width: float
    half_depth: float
    wall: float
    fat: Vector  # thickness under the skin at the sides, in front and behind
    waviness: np.ndarray  # [4, 2] amplitudes and phases of the outline along z
    rib_phase: float
    vertebra: float  # radius
    spine_y: float
    bend: np.ndarray  # [2] amplitude and phase of the spine's sideways bend
    liver: tuple[Ellipsoid, ...]
    spleen: tuple[Ellipsoid, ...]
    left_kidney: tuple[Ellipsoid, ...]
    right_kidney: tuple[Ellipsoid, ...]
    gallbladder: Ellipsoid
    pancreas: tuple[Ellipsoid, ...]
    heart: Ellipsoid
    bladder: Ellipsoid
    vessels: tuple[Ellipsoid, ...]  # of the liver
    mesentery: tuple[Ellipsoid, ...]  # its vessels
    loops: tuple[Loop, ...]  # stomach, colon, small bowel, in the order of painting
    cysts: tuple[tuple[str, Ellipsoid], ...]
    contrast_hu: float  # of oral contrast
    ascites: bool

    def organ(self, name: str) -> tuple[Ellipsoid, ...]:
        """The shapes of a labelled solid organ (``liver``, ``spleen``, ``left_kidney``, ``right_kidney``)."""
        return getattr(self, name)

    def small_bowel(self) -> list[Ellipsoid]:
        """The outlines of the thin-walled loops."""
        return [loop.outline for loop in self.loops if loop.label is not None and loop.wall < 3.0]

    def centre_line(self, z: np.ndarray, x: float, y: float, lordosis: float = 8.0) -> np.ndarray:
        """[Z, 2] float32: x and y of a structure that follows the spine."""
        sway = self.bend[0] * np.sin(z / 120.0 + self.bend[1])
        return np.stack([x + sway, y - lordosis * np.cos(z / 110.0) + lordosis], axis=1).astype(np.float32)


# ------------------------------------------------------------------------------------------------- drawing
def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw one patient.

    Args:
        rng: a generator that is used for nothing else, so that anatomy never depends on injuries or scanner.
    """
    a, b = rng.uniform(112, 142), rng.uniform(72, 94)
    sz = rng.uniform(0.9, 1.12)
    fat = rng.uniform(0, 1)
    spine_y = 0.62 * b
    contrast = rng.random() < 0.10

    def jitter(*centre: float, spread: float = 4.0) -> Vector:
        return tuple(float(c + d) for c, d in zip(centre, rng.normal(0, spread, 3), strict=True))

    def body(centre: Vector, axes: Vector, turn: float = 0, tilt: float = 0, wobble: float = 0.1) -> Ellipsoid:
        axes = tuple(float(v) for v in np.asarray(axes) * rng.uniform(0.9, 1.1, 3))
        angles = rng.normal(0, 6, 2)
        return Ellipsoid(centre, axes, turn + angles[0], tilt + angles[1], wobble, float(rng.uniform(0, 6.28)))

    lower = rng.uniform(-8, 8)
    liver = (
        body(jitter(-0.50 * a, -0.06 * b, 50 * sz + lower), (0.58 * a, 0.95 * b, 76 * sz), turn=-12, wobble=0.08),
        body(jitter(-0.05 * a, -0.52 * b, 68 * sz + lower), (0.62 * a, 0.36 * b, 42 * sz), turn=-10, wobble=0.1),
    )
    spleen = (body(jitter(0.72 * a, 0.34 * b, 68 * sz), (24, 44, 50 * sz), turn=26, tilt=8, wobble=0.08),)
    kidney = (27.0, 24.0, 54 * sz)
    left = (body(jitter(0.48 * a, 0.56 * b, -12), kidney, turn=25, tilt=12, wobble=0.05),)
    right = (body(jitter(-0.48 * a, 0.56 * b, -26), kidney, turn=-25, tilt=12, wobble=0.05),)
    organs = {"liver": liver, "left_kidney": left, "right_kidney": right, "spleen": spleen}
    return Anatomy(
        half_width=a,
        half_depth=b,
        wall=rng.uniform(11, 16),
        fat=(5 + 32 * fat, 5 + 30 * fat * rng.uniform(0.6, 1.3), 6 + 18 * fat),
        waviness=np.stack([rng.uniform(0.01, 0.035, 4), rng.uniform(0, 6.28, 4)], axis=1),
        rib_phase=rng.uniform(0, 28),
        vertebra=rng.uniform(19, 24),
        spine_y=spine_y,
        bend=np.array([rng.normal(0, 4), rng.uniform(0, 6.28)]),
        liver=liver,
        spleen=spleen,
        left_kidney=left,
        right_kidney=right,
        gallbladder=body(jitter(-0.30 * a, -0.50 * b, 2), (14, 12, 24), tilt=20),
        pancreas=tuple(
            body(jitter(t * a, (-0.05 + 0.35 * max(t, 0.0)) * b, 22 + 26 * t, spread=1.5), (17, 11, 13))
            for t in (-0.16, -0.03, 0.12, 0.27, 0.40)
        ),
        heart=body(jitter(0.16 * a, -0.34 * b, 152 * sz), (52, 48, 44)),
        bladder=body(jitter(0, -0.12 * b, -208), (38, 30, 30)),
        vessels=tuple(_liver_vessels(rng, liver[0])),
        mesentery=tuple(
            body(jitter(rng.uniform(-0.4, 0.4) * a, rng.uniform(-0.3, 0.1) * b, rng.uniform(-110, -20)), (3, 3, 9))
            for _ in range(12)
        ),
        loops=(*_stomach(body, jitter, rng, a, b, contrast), *_bowel(body, jitter, rng, (a, b), contrast)),
        cysts=tuple(_cysts(rng, organs)),
        contrast_hu=rng.uniform(180, 380),
        ascites=bool(rng.random() < 0.04),
    )


def _liver_vessels(rng: np.random.Generator, lobe: Ellipsoid) -> Iterator[Ellipsoid]:
    """Short branches of the portal and hepatic veins inside the right lobe."""
    for _ in range(9):
        centre = lobe.at(rng.normal(0, 1, 3), rng.uniform(0.1, 0.6))
        yield Ellipsoid(centre, (rng.uniform(14, 26), 3.5, 5.0), rng.uniform(0, 180), rng.normal(0, 20))


def _cysts(rng: np.random.Generator, organs: dict[str, tuple[Ellipsoid, ...]]) -> Iterator[tuple[str, Ellipsoid]]:
    """Look-alikes of a laceration: round, sharp, of water, in a few per cent of the organs."""
    for name, shapes in organs.items():
        direction, radius = rng.normal(0, 1, 3), rng.uniform(6, 12)
        if rng.random() < 0.06 and name != "spleen":
            yield name, Ellipsoid(shapes[0].at(direction, 0.55), (radius, radius, radius))


def _content(rng: np.random.Generator, contrast: bool, gas: float, stool: float = 0.0) -> str:
    """What fills a loop."""
    draw = rng.random()
    if draw < gas:
        return "gas"
    return "stool" if draw < gas + stool else "contrast" if contrast else "fluid"


def _stomach(body, jitter, rng: np.random.Generator, a: float, b: float, contrast: bool) -> Iterator[Loop]:  # noqa: ANN001
    """The stomach's body and antrum: fluid or contrast below, a bubble of gas above."""
    for centre, axes, turn in (
        ((0.42 * a, -0.22 * b, 58.0), (0.27 * a, 0.42 * b, 44.0), 20.0),
        ((0.10 * a, -0.48 * b, 22.0), (0.28 * a, 0.24 * b, 20.0), -10.0),
    ):
        outline = body(jitter(*centre), axes, turn=turn)
        yield Loop(outline, "contrast" if contrast else "fluid", 4.0, label=None)


def _bowel(body, jitter, rng: np.random.Generator, size: tuple[float, float], contrast: bool) -> Iterator[Loop]:  # noqa: ANN001
    """Small bowel packed into the middle, framed by the colon."""
    a, b = size
    for _ in range(16):
        angle, radius = rng.uniform(0, 6.28), np.sqrt(rng.uniform(0, 1))
        centre = np.array(
            [0.5 * a * radius * np.cos(angle), (-0.25 + 0.4 * radius * np.sin(angle)) * b, rng.uniform(-175, -30)]
        )
        heading, calibre, wall = rng.uniform(0, 360), rng.uniform(11, 15), rng.uniform(2.0, 2.9)
        content = _content(rng, contrast, gas=0.12)
        for _ in range(6):
            outline = body(tuple(centre.tolist()), (1.35 * calibre, calibre, calibre), turn=heading, wobble=0.1)
            yield Loop(outline, content, wall)
            step = np.array([np.cos(np.deg2rad(heading)), np.sin(np.deg2rad(heading)), rng.normal(0, 0.5)])
            centre = centre + 1.5 * calibre * step
            heading += rng.normal(0, 45)
            low, high = np.array([-0.62 * a, -0.78 * b, -190]), np.array([0.62 * a, 0.2 * b, -25])
            centre = np.clip(centre, low, high)
    drop = rng.uniform(10, 50)
    path = [(-0.80 * a, 0.10 * b, z) for z in np.linspace(-135, -15, 6)]
    path += [(t * a, (-0.62 + 0.28 * abs(t)) * b, -8 - drop * (1 - t * t)) for t in np.linspace(-0.72, 0.72, 8)]
    path += [(0.83 * a, 0.18 * b, z) for z in np.linspace(8, -140, 7)]
    path += [(0.62 * a - 0.6 * t * a, (0.1 + 0.3 * t) * b, -150 - 35 * np.sin(3.1 * t)) for t in np.linspace(0, 1, 5)]
    calibre = rng.uniform(15, 23)
    for centre in path:
        outline = body(jitter(*centre, spread=3.0), (calibre, calibre * 0.95, calibre * 1.1), wobble=0.12)
        yield Loop(outline, _content(rng, contrast, gas=0.3, stool=0.45), 3.2)
