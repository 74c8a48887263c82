# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Injuries of a phantom: drawn independently of anatomy and scanner, then painted over the healthy anatomy.

Each needs its surroundings to be recognised: a laceration is no darker than a gallbladder, a bleeding no brighter than
bone, contrast in the bowel or an aorta in its first phase, and free gas no different from the gas inside the bowel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .anatomy import LABELS, Anatomy, Loop
from .canvas import Canvas, Ellipsoid
from .phantom import paint_loop
from .scanner import Scan

GROUPS = ("bowel", "extravasation", "kidney", "liver", "spleen")
ORGANS = ("kidney", "liver", "spleen")
CODES = {"liver": 1, "spleen": 2, "kidney": 3, "bowel": 4, "extravasation": 5, "fluid": 6}
FLUID_HU, LACERATION_HU, GAS_HU = 42.0, 2.0, -950.0
FATTY, NOT_BONE, SOFT = (-200.0, -20.0), (-1100.0, 215.0), (-300.0, 90.0)


@dataclass(frozen=True)
class Plan:
    """What happened to one patient.

    Args:
        grades: group -> 0 healthy, 1 injury (organs: low grade), 2 high grade.
        lacerations: organ label name and shape.
        fluid: blood in the fat around a badly injured organ.
        subcapsular: blood that dents a badly injured liver from the side.
        haematoma: the clot around a bleeding vessel; it displaces bowel.
        bleeding: active extravasation; empty where there is none.
        thick: loops of injured bowel.
        gas: free gas.
        conspicuity: factor on the contrast; the shapes are scaled already.
    """

    grades: dict[str, int]
    lacerations: tuple[tuple[str, Ellipsoid], ...]
    fluid: tuple[Ellipsoid, ...]
    subcapsular: tuple[Ellipsoid, ...]
    haematoma: tuple[Ellipsoid, ...]
    bleeding: tuple[Ellipsoid, ...]
    thick: tuple[Ellipsoid, ...]
    gas: tuple[Ellipsoid, ...]
    conspicuity: float


def draw_injuries(
    streams: dict[str, np.random.Generator], anatomy: Anatomy, prevalence: float, conspicuity: float
) -> Plan:
    """Draw the grade of every group, independently, and the shapes that go with it.

    Args:
        streams: one generator a group.
        anatomy: where the organs are.
        prevalence: probability that a group is injured; an injured organ is low or high grade with equal chances.
        conspicuity: 1.0 plain, 0.3 subtle; contrast grows with it, size with its square root.
    """
    grades = {}
    for name in GROUPS:
        injured, high = streams[name].random(2) < (prevalence, 0.5)
        grades[name] = int(injured) * (1 + int(high and name in ORGANS))
    scale = 1.2 * float(np.sqrt(conspicuity))  # a small CNN on 200 patients learns conspicuity 1 within minutes
    lacerations, fluid = [], []
    for organ in ORGANS:
        label = organ
        if organ == "kidney":
            label = ("left_kidney", "right_kidney")[int(streams[organ].integers(2))]
        lacerations += [(label, s) for s in _lacerations(streams[organ], anatomy, label, grades[organ], scale)]
        if grades[organ] == 2:
            fluid += _organ_fluid(anatomy, label, scale)
    bleeding, haematoma = _bleeding(streams["extravasation"], anatomy, scale) if grades["extravasation"] else ((), ())
    thick, gas = _bowel_injury(streams["bowel"], anatomy, scale) if grades["bowel"] else ((), ())
    rim = _subcapsular(anatomy, scale) if grades["liver"] == 2 else ()
    return Plan(grades, tuple(lacerations), tuple(fluid), rim, haematoma, bleeding, thick, gas, conspicuity)


def _lacerations(rng: np.random.Generator, anatomy: Anatomy, label: str, grade: int, scale: float) -> list[Ellipsoid]:
    """Elongated, ragged tears that run from the capsule inwards: one in low grade, two or three in high grade."""
    organ = anatomy.organ(label)[0]
    axes = np.array({"liver": (31, 14, 26), "spleen": (24, 14, 24)}.get(label, (21, 13, 22)), dtype=float)
    axes *= scale * (1.0 if grade < 2 else 1.3)
    toward = {"liver": 180.0, "spleen": 0.0, "left_kidney": 10.0, "right_kidney": 170.0}[label]
    shapes = []
    for k in range((0, 1, int(rng.integers(2, 4)))[grade]):
        angle = toward + rng.uniform(-75, 75) if k == 0 else rng.uniform(0, 360)
        height = rng.uniform(-0.45, 0.45)
        direction = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle)), height])
        centre = organ.at(organ.rotation.T @ direction, rng.uniform(0.5, 0.72))
        size = tuple(float(v) for v in axes * rng.uniform(0.85, 1.15, 3))
        shapes.append(Ellipsoid(centre, size, angle + rng.normal(0, 20), rng.normal(0, 15), 0.18, rng.uniform(0, 6.28)))
    return shapes


def _organ_fluid(anatomy: Anatomy, label: str, scale: float) -> list[Ellipsoid]:
    """Blood around a badly injured organ: a rim, and a pool where it runs to."""
    organ = anatomy.organ(label)[0]
    a, b = anatomy.half_width, anatomy.half_depth
    if label == "liver":
        return [
            *_subcapsular(anatomy, scale),
            Ellipsoid((-0.82 * a, 0.25 * b, -30.0), (22 * scale, 33 * scale, 50), 10),
        ]
    if label == "spleen":
        return [organ.grown(15 * scale), Ellipsoid((0.88 * a, 0.2 * b, -5.0), (19 * scale, 30 * scale, 46), -10)]
    return [organ.grown(12 * scale)]


def _subcapsular(anatomy: Anatomy, scale: float) -> tuple[Ellipsoid, ...]:
    """A crescent between the liver and the wall at its side."""
    height = anatomy.liver[0].centre[2] - 12
    centre = (-0.96 * anatomy.half_width, 0.1 * anatomy.half_depth, height)
    return (Ellipsoid(centre, (19 * scale, 0.75 * anatomy.half_depth, 55), -8),)


def _bleeding(
    rng: np.random.Generator, anatomy: Anatomy, scale: float
) -> tuple[tuple[Ellipsoid, ...], tuple[Ellipsoid, ...]]:
    """A bright blob inside a haematoma, in the mesentery, a gutter, the retroperitoneum or the pelvis."""
    a, b = anatomy.half_width, anatomy.half_depth
    sites = [
        (0.55, -0.15, -65),
        (-0.55, -0.15, -70),
        (0.05, -0.35, -60),
        (0.4, 0.1, -140),
        (-0.4, 0.1, -140),
        (0.5, 0.0, 12),
    ]
    u, v, z = sites[int(rng.integers(len(sites)))]
    dx, dy, dz = rng.normal(0, 6, 3)
    centre = (u * a + dx, v * b + dy, z + dz)
    blood = Ellipsoid(centre, tuple(scale * rng.uniform((34, 26, 32), (44, 35, 44))), rng.uniform(0, 180), 0, 0.15)
    blood = replace(blood, phase=rng.uniform(0, 6.28))
    spot = Ellipsoid(
        blood.at(rng.normal(0, 1, 3), 0.3), tuple(scale * rng.uniform((15, 13, 19), (21, 18, 27))), 0, 0, 0.2
    )
    jet = Ellipsoid(spot.at(rng.normal(0, 1, 3), 1.2), tuple(scale * rng.uniform(6, 10, 3)))
    return (spot, jet), (blood,)


def _bowel_injury(
    rng: np.random.Generator, anatomy: Anatomy, scale: float
) -> tuple[tuple[Ellipsoid, ...], tuple[Ellipsoid, ...]]:
    """Three to five neighbouring thick-walled loops, specks of gas between them, a pocket of gas under the wall."""
    loops = anatomy.small_bowel()
    start = loops[int(rng.integers(len(loops)))]
    distance = [float(np.linalg.norm(np.subtract(s.centre, start.centre))) for s in loops]
    thick = tuple(loops[k].grown(4 * scale) for k in np.argsort(distance)[: int(rng.integers(3, 6))])
    specks = []
    for _ in range(int(rng.integers(6, 11))):
        where = thick[int(rng.integers(len(thick)))]
        radius = scale * rng.uniform(5.0, 8.0, 3)
        specks.append(Ellipsoid(where.at(rng.normal(0, 1, 3), rng.uniform(1.1, 1.6)), tuple(radius)))
    a, b = anatomy.half_width, anatomy.half_depth
    pocket = Ellipsoid(
        (rng.uniform(-0.35, 0.35) * a, -0.97 * b, rng.uniform(-70, 30)),
        tuple(scale * rng.uniform((38, 17, 33), (56, 24, 52))),
    )
    return thick, (pocket, *specks)


# ------------------------------------------------------------------------------------------------ painting
def paint_injuries(canvas: Canvas, plan: Plan, anatomy: Anatomy, scan: Scan) -> None:
    """Paint the injuries into a canvas that holds the healthy patient, and mark them in ``canvas.injury``.

    Args:
        canvas: holds the healthy patient.
        plan: what to paint.
        anatomy: the patient.
        scan: gives the HU of the organs and of the blood in this phase.
    """
    visible, tissue = plan.conspicuity, scan.tissue

    def mark(painted: tuple | None, name: str) -> None:
        if painted is not None:
            box, alpha = painted
            canvas.injury[box][alpha >= 0.5] = CODES[name]

    for shape in plan.fluid:
        mark(canvas.paint(shape, _between(-100.0, FLUID_HU, visible), over=FATTY), "fluid")
    for shape in plan.subcapsular:
        mark(canvas.paint(shape, _between(tissue.liver, FLUID_HU, visible), only=(LABELS["liver"],), label=0), "fluid")
    for label, shape in plan.lacerations:
        organ = "kidney" if "kidney" in label else label
        healthy = {"kidney": tissue.cortex, "liver": tissue.liver, "spleen": tissue.spleen}[organ]
        mark(canvas.paint(shape, _between(healthy, LACERATION_HU, visible), only=(LABELS[label],)), organ)
    for outline in plan.thick:
        wall = Loop(outline, "fluid", wall=7.0)
        mark(paint_loop(canvas, wall, _between(tissue.bowel_wall, 140.0, visible), anatomy.contrast_hu), "bowel")
    for shape in plan.haematoma:
        mark(canvas.paint(shape, _between(-20.0, 55.0, visible), over=NOT_BONE, label=0), "fluid")
    bright = max(tissue.aorta, 260.0) + 50.0
    for shape in plan.bleeding:
        mark(canvas.paint(shape, _between(55.0, bright, visible), over=NOT_BONE), "extravasation")
    for shape in plan.gas:
        mark(canvas.paint(shape, _between(-100.0, GAS_HU, visible), over=SOFT, only=(0,)), "bowel")


def _between(healthy: float, injured: float, conspicuity: float) -> float:
    """The value of an injury: ``conspicuity`` 0 leaves the healthy value, 1 gives the injured one."""
    return healthy + min(conspicuity, 1.1) * (injured - healthy)
