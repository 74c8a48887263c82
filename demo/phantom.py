# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Paints a patient's anatomy into a HU volume, from the outside in, with the enhancement of one contrast phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .anatomy import LABELS, Anatomy, Loop
from .canvas import AIR, FAT, Box, Canvas, Ellipsoid


@dataclass(frozen=True)
class Enhancement:
    """HU of the tissues in one contrast phase."""

    aorta: float
    cava: float
    liver: float
    spleen: float
    cortex: float
    medulla: float
    urine: float
    muscle: float
    bowel_wall: float


def paint_anatomy(canvas: Canvas, anatomy: Anatomy, tissue: Enhancement) -> None:
    """Fill the canvas: everything of a healthy patient, from the outside in.

    Args:
        canvas: grid to paint on; every voxel of ``hu`` and ``cavity`` is written.
        anatomy: shapes, mm.
        tissue: HU of this series.
    """
    _paint_body(canvas, anatomy, tissue)
    _paint_skeleton(canvas, anatomy, tissue)
    _paint_solid(canvas, anatomy, tissue)
    for loop in anatomy.loops:
        paint_loop(canvas, loop, tissue.bowel_wall, anatomy.contrast_hu)
    for vessel in anatomy.mesentery:
        canvas.paint(vessel, 0.8 * tissue.cava + 20, over=(-150.0, -30.0))
    _paint_vessels(canvas, anatomy, tissue)


def _outline(grid: np.ndarray, half: tuple[float, float], power: tuple[float, float], scale: np.ndarray) -> np.ndarray:
    """[Z, N] float32: one axis' share of a superellipse, with other half-lengths at the negative and positive side."""
    negative = grid < 0
    length = np.where(negative, half[0], half[1])[None] * scale[:, None]
    return ((np.abs(grid)[None] / length) ** np.where(negative, *power)[None]).astype(np.float32)


def body_half_sizes(anatomy: Anatomy) -> tuple[float, float, float]:
    """Distance from the origin to the skin at the sides, in front and behind, in mm."""
    side = anatomy.half_width + anatomy.wall + anatomy.fat[0]
    front = anatomy.half_depth + anatomy.wall + anatomy.fat[1]
    return side, front, anatomy.half_depth + anatomy.wall + 16 + anatomy.fat[2]


def _paint_body(canvas: Canvas, anatomy: Anatomy, tissue: Enhancement) -> None:
    """Air, skin, fat, the muscular wall with the ribs in it, the cavity's fat and the lungs."""
    a, b, wall = anatomy.half_width, anatomy.half_depth, anatomy.wall
    side, front, back = body_half_sizes(anatomy)
    z = canvas.z
    wave = 1 + (anatomy.waviness[:, :1] * np.sin(z[None] / 90.0 + anatomy.waviness[:, 1:])).astype(np.float32)
    inner = wave[0] * wave[1] * (1 - 0.08 * np.clip((z - 90) / 90, 0, 1)) * (1 - 0.1 * np.clip((-z - 120) / 90, 0, 1))
    outer = 0.5 * inner + 0.5 * wave[2]
    rings = []
    for half_x, half_y, scale, power in (
        (side, (front, back), outer, (2.2, 2.6)),
        (a + wall, (b + wall, b + wall + 16), inner, (2.2, 2.4)),
        (a, (b, b), inner, (2.2, 2.4)),
    ):
        fx = _outline(canvas.x, (half_x, half_x), (2.3, 2.3), scale)
        rings.append((fx, _outline(canvas.y, half_y, power, scale), np.float32(0.45 * half_x / canvas.pixel)))
    ribs = _rib_rows(canvas, anatomy)
    lung_floor = _lung_floor(canvas, anatomy)
    beside = np.clip((np.abs(canvas.x) - 20) / 6, 0, 1).astype(np.float32)[None]
    skin = np.float32(2.0 / canvas.pixel)
    for k in range(len(z)):
        (rx, ry, ko), (wx, wy, kw), (cx, cy, kc) = [(fx[k][None], fy[k][:, None], s) for fx, fy, s in rings]
        depth = (1 - (rx + ry)) * ko + np.float32(0.5)
        image = AIR + np.clip(depth, 0, 1) * np.float32(1020) + np.clip(depth - skin, 0, 1) * np.float32(FAT - 20)
        image += np.clip((1 - (wx + wy)) * kw + np.float32(0.5), 0, 1) * np.float32(tissue.muscle - FAT)
        shell = cx + cy
        cavity = np.clip((1 - shell) * kc + np.float32(0.5), 0, 1)
        image += cavity * np.float32(FAT - tissue.muscle)
        if ribs[k].any():
            bone = (shell > 1.05) & (shell < 1.20) & ribs[k][:, None]
            image[bone] = 260
        if z[k] > lung_floor.min():
            lung = np.clip((z[k] - lung_floor) / 6 + 0.5, 0, 1) * cavity * beside
            image += lung * (np.float32(-840) - image)
        canvas.hu[k], canvas.cavity[k] = image, cavity


def _rib_rows(canvas: Canvas, anatomy: Anatomy) -> np.ndarray:
    """[Z, Y] bool: where a rib crosses the chest wall; ribs run downwards to the front and end at the costal margin."""
    z, y = canvas.z[:, None], canvas.y[None]
    crossing = np.cos(2 * np.pi * (z - 0.45 * y + anatomy.rib_phase) / 29.0) > 0.35
    return crossing & (z > 32 - 0.35 * y) & (y > -0.92 * anatomy.half_depth)


def _lung_floor(canvas: Canvas, anatomy: Anatomy) -> np.ndarray:
    """[Y, X] float32: the height of the diaphragm, mm; domes that fall towards the recesses at the sides and behind."""
    a, b = anatomy.half_width, anatomy.half_depth
    x, y = canvas.x[None], canvas.y[:, None]
    sides = ((np.abs(x) - 0.40 * a) / (0.6 * a)) ** 2 + ((y + 0.15 * b) / (1.15 * b)) ** 2
    return (anatomy.liver[0].centre[2] + anatomy.liver[0].axes[2] - 8 - 62 * np.clip(sides, 0, 1.3)).astype(np.float32)


def _paint_skeleton(canvas: Canvas, anatomy: Anatomy, tissue: Enhancement) -> None:
    """Vertebrae with discs, canal and processes, the muscles beside them, and the pelvis."""
    z, radius, y0 = canvas.z, anatomy.vertebra, anatomy.spine_y
    everywhere = (float(z[0]) - 1, float(z[-1]) + 1)
    for side in (-1, 1):
        back = anatomy.centre_line(z, side * 0.27 * anatomy.half_width, y0 + 1.9 * radius)
        canvas.paint_tube(back, (29, 19), tissue.muscle + 3, everywhere)
        psoas = Ellipsoid((side * 0.31 * anatomy.half_width, y0 - 4, -100.0), (19, 21, 92))
        canvas.paint(psoas, tissue.muscle + 5)
    spine = anatomy.centre_line(z, 0.0, y0)
    posterior = spine + np.array([0, 1.45 * radius], np.float32)
    canvas.paint_tube(posterior + np.array([0, 14], np.float32), (4.5, 17), 330, everywhere)
    disc = np.cos(2 * np.pi * z / 36.0) > 0.8
    for low, high in _runs(disc):
        span = (float(z[low]) - 0.1, float(z[high]) + 0.1)
        if disc[low]:
            canvas.paint_tube(spine, (radius, 0.85 * radius), 95, span)
        else:
            canvas.paint_tube(posterior, (2.4 * radius, 4.5), 240, span)
            canvas.paint_tube(spine, (radius, 0.85 * radius), 420, span)
            canvas.paint_tube(spine, (radius - 2.5, 0.85 * radius - 2.5), 190, span)
    canvas.paint_tube(posterior, (14, 12), 420, everywhere)
    canvas.paint_tube(posterior, (9.5, 8), 25, everywhere)
    for side in (-1, 1):
        wing = Ellipsoid((side * 0.78 * anatomy.half_width, 0.30 * anatomy.half_depth, -182.0), (8, 50, 62), side * 32)
        gluteus = wing.moved(dx=side * 20, dy=22).grown(14)
        canvas.paint(gluteus, tissue.muscle, inside=False, over=(-200, 0))
        canvas.paint(wing, 430, inside=False)
        canvas.paint(wing.grown(-3.5), 140, inside=False)
    sacrum = Ellipsoid((0.0, y0 + 8, -205.0), (48, 20, 52))
    canvas.paint(sacrum, 380, inside=False)
    canvas.paint(sacrum.grown(-4), 130, inside=False)


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last index of every run of equal flags."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8)))
    yield from zip([0, *(edges + 1)], [*edges, len(flags) - 1], strict=True)


def _paint_solid(canvas: Canvas, anatomy: Anatomy, tissue: Enhancement) -> None:
    """Heart, liver, spleen, pancreas, kidneys, bladder and their contents."""
    canvas.paint(anatomy.heart, 0.5 * (tissue.aorta + tissue.cava))
    for shape in anatomy.liver:
        canvas.paint(shape, tissue.liver, label=LABELS["liver"], over=(-1100, 25))
    for vessel in anatomy.vessels:
        canvas.paint(vessel, 0.5 * (tissue.liver + max(tissue.cava, tissue.liver)), only=(LABELS["liver"],))
    canvas.paint(anatomy.gallbladder, 10.0, label=0)
    for shape in anatomy.pancreas:
        canvas.paint(shape, 0.6 * tissue.liver + 35, over=(-200, 0))
    canvas.paint(anatomy.spleen[0].grown(3), FAT, only=(LABELS["liver"],), label=0)
    canvas.paint(anatomy.spleen[0], tissue.spleen, label=LABELS["spleen"])
    for name in ("left_kidney", "right_kidney"):
        shape = anatomy.organ(name)[0]
        inward = -1 if name == "left_kidney" else 1
        canvas.paint(shape.grown(6).moved(dx=inward * 6, dy=20), FAT, label=0, over=(-1100, 240), only=(0, 1, 2))
        canvas.paint(shape.grown(5), FAT, label=0)
        canvas.paint(shape, tissue.cortex, label=LABELS[name])
        canvas.paint(shape.grown(-8), tissue.medulla, only=(LABELS[name],))
        sinus = Ellipsoid(shape.moved(dx=inward * 11, dy=-6).centre, (13, 9, 22), shape.turn)
        canvas.paint(sinus, -50, only=(LABELS[name],))
        canvas.paint(sinus.grown(-5), tissue.urine, only=(LABELS[name],))
    for name, cyst in anatomy.cysts:
        canvas.paint(cyst, 6.0, only=(LABELS[name],))
    if anatomy.ascites:
        pouch = anatomy.bladder.moved(dy=30, dz=38)
        canvas.paint(pouch.grown(6), 12.0, over=(-200, 0))
    canvas.paint(anatomy.bladder, min(tissue.urine, 200.0))


def paint_loop(canvas: Canvas, loop: Loop, wall_hu: float, contrast_hu: float) -> tuple[Box, np.ndarray] | None:
    """One loop of bowel: wall, content, and gas at the front of what is not full of fluid; returns what it covers."""
    fill = {"fluid": 18.0, "contrast": contrast_hu, "gas": 18.0, "stool": -20.0}[loop.content]
    free = (0, LABELS["bowel"])  # organs give way to nothing
    painted = canvas.paint(loop.outline, wall_hu, label=loop.label, only=free)
    if painted is None:
        return None
    lumen = loop.outline.grown(-loop.wall)
    canvas.paint(lumen, fill, only=free)
    y, depth = lumen.centre[1], lumen.axes[1]
    if loop.content == "gas":
        canvas.paint(lumen, -950.0, only=free, above=y + 0.7 * depth)
    elif loop.content == "stool":
        canvas.paint(lumen.grown(-2).moved(dx=3, dy=-2), -420.0, only=free, above=y + 0.2 * depth)
    elif loop.label is None:
        canvas.paint(lumen, -950.0, only=free, above=y - 0.35 * depth)
    return painted


def _paint_vessels(canvas: Canvas, anatomy: Anatomy, tissue: Enhancement) -> None:
    """Aorta with a calcified speck of wall, iliac arteries, cava and portal vein."""
    z = canvas.z
    front = anatomy.spine_y - 0.85 * anatomy.vertebra
    top, bottom = float(z[-1]) + 1, float(z[0]) - 1
    cava = anatomy.centre_line(z, -0.15 * anatomy.half_width, front - 9)
    canvas.paint_tube(cava, (13, 10), tissue.cava, (-82, top))
    canvas.paint_tube(anatomy.centre_line(z, 0.07 * anatomy.half_width, front - 12), (11, 11), tissue.aorta, (-85, top))
    fork = np.clip((-80 - z) / 70, 0, 1.2)
    for side in (-1, 1):
        drift = np.stack([side * fork * 42, fork * 12], axis=1).astype(np.float32)
        leg = anatomy.centre_line(z, side * 8.0, front - 12) + drift
        canvas.paint_tube(leg, (7, 7), tissue.aorta, (bottom, -78))
        canvas.paint_tube(leg + np.array([side * 4, 11], np.float32), (8, 7), tissue.cava, (bottom, -78))
    portal = Ellipsoid((-0.20 * anatomy.half_width, -0.12 * anatomy.half_depth, 36.0), (30, 7, 9), 20, 10)
    canvas.paint(portal, tissue.cava + 10)
