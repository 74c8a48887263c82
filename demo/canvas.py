# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The drawing board of the phantoms: ellipsoids and tubes blended into a HU volume, with labels beside it.

Coordinates are patient coordinates of DICOM (LPS) in mm: x grows to the patient's left, y to the back, z to the head.
Arrays are slice-major [Z, Y, X]. A shape is evaluated in its bounding box only, which is what makes a series cheap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

Vector = tuple[float, float, float]
Box = tuple[slice, slice, slice]

AIR, FAT = -1000.0, -100.0


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid whose outline may be wobbled into something less regular.

    Args:
        centre: x, y, z in mm.
        axes: the three semi-axes in mm.
        turn: rotation about z (in the axial plane), in degrees.
        tilt: rotation about the turned x axis, in degrees.
        wobble: relative amplitude of the outline's deformation, 0 to 0.35.
        phase: where the deformation's waves begin, in radians.
    """

    centre: Vector
    axes: Vector
    turn: float = 0.0
    tilt: float = 0.0
    wobble: float = 0.0
    phase: float = 0.0

    @property
    def rotation(self) -> np.ndarray:
        """[3, 3] float64: the columns are the directions of the semi-axes."""
        a, b = math.radians(self.turn), math.radians(self.tilt)
        ca, sa, cb, sb = math.cos(a), math.sin(a), math.cos(b), math.sin(b)
        return np.array([[ca, -sa * cb, sa * sb], [sa, ca * cb, -ca * sb], [0.0, sb, cb]])

    def grown(self, mm: float) -> Ellipsoid:
        """The same shape with every semi-axis longer (shorter) by ``mm``, at least 1 mm long."""
        return replace(self, axes=tuple(max(1.0, a + mm) for a in self.axes))

    def moved(self, dx: float = 0.0, dy: float = 0.0, dz: float = 0.0) -> Ellipsoid:
        """The same shape elsewhere."""
        x, y, z = self.centre
        return replace(self, centre=(x + dx, y + dy, z + dz))

    def at(self, direction: np.ndarray, fraction: float) -> Vector:
        """The point at ``fraction`` of the way from the centre to the surface along ``direction`` (own axes)."""
        unit = np.asarray(direction, dtype=float) / np.linalg.norm(direction)
        offset = (self.rotation * (np.asarray(self.axes) * unit * fraction)).sum(1)
        return tuple(float(c + o) for c, o in zip(self.centre, offset, strict=True))


@dataclass
class Canvas:
    """A HU volume being painted, with the organ labels and the injuries beside it.

    Args:
        x, y, z: voxel centres in mm along each axis, ascending, float32.

    Attributes:
        hu: [Z, Y, X] float32.
        labels: [Z, Y, X] uint8, the segmentation (1 liver, 2 spleen, 3 left kidney, 4 right kidney, 5 bowel).
        injury: [Z, Y, X] uint8, see ``demo.injuries.CODES``.
        cavity: [Z, Y, X] float32, how much of each voxel lies inside the body cavity.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    hu: np.ndarray = field(init=False)
    labels: np.ndarray = field(init=False)
    injury: np.ndarray = field(init=False)
    cavity: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shape = (len(self.z), len(self.y), len(self.x))
        self.hu = np.empty(shape, np.float32)
        self.cavity = np.empty(shape, np.float32)
        self.labels = np.zeros(shape, np.uint8)
        self.injury = np.zeros(shape, np.uint8)

    @property
    def pixel(self) -> float:
        """In-plane pixel size in mm."""
        return float(self.x[1] - self.x[0])

    def box(self, low: Vector, high: Vector) -> Box | None:
        """The index ranges of the voxels between two corners in mm; None where there is none."""
        ranges = []
        for grid, lo, hi in ((self.z, low[2], high[2]), (self.y, low[1], high[1]), (self.x, low[0], high[0])):
            start, stop = np.searchsorted(grid, (lo, hi))
            if start >= stop:
                return None
            ranges.append(slice(int(start), int(stop)))
        return tuple(ranges)

    def coverage(self, shape: Ellipsoid) -> tuple[Box, np.ndarray] | None:
        """The shape's bounding box and how much of each voxel in it the shape covers, float32 in 0..1."""
        rotation, axes = shape.rotation, np.asarray(shape.axes)
        margin = (1 - 2 * shape.wobble) ** -0.5 if shape.wobble else 1.0
        reach = np.sqrt(((rotation * axes) ** 2).sum(1)) * margin + self.pixel
        centre = np.asarray(shape.centre)
        box = self.box(tuple(centre - reach), tuple(centre + reach))
        if box is None:
            return None
        z, y, x = (
            (g[s] - np.float32(c)).astype(np.float32)
            for g, s, c in zip((self.z, self.y, self.x), box, centre[::-1], strict=True)
        )
        z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
        unit = (rotation / axes).astype(np.float32)
        squared = np.zeros((z.size, y.size, x.size), np.float32)
        for k in range(3):
            along = (y * unit[1, k] + z * unit[2, k]) + x * unit[0, k]
            np.multiply(along, along, out=along)
            squared += along
        if shape.wobble:
            wave = np.float32(4.8 / sum(shape.axes))
            squared *= 1 + np.float32(shape.wobble) * (
                np.sin(y * wave + z * wave * 0.7 + np.float32(shape.phase))
                + np.sin(x * wave * 1.3 - z * wave + np.float32(2.1 * shape.phase))
            )
        mean = 0.5 * (sum(shape.axes) - max(shape.axes))  # of the two shorter ones
        sharpness = np.float32(0.5 * mean / self.pixel)  # 1 - r^2 is about 2 (1 - r) at the surface
        np.multiply(squared, -sharpness, out=squared)
        squared += sharpness + np.float32(0.5)
        return box, np.clip(squared, 0, 1, out=squared)

    def paint(
        self,
        shape: Ellipsoid,
        hu: float,
        *,
        label: int | None = None,
        only: tuple[int, ...] | None = None,
        over: tuple[float, float] | None = None,
        inside: bool = True,
        above: float | None = None,
    ) -> tuple[Box, np.ndarray] | None:
        """Blend one value into the volume where the shape is.

        Args:
            shape: what to paint.
            hu: value of the full voxels.
            label: segmentation label for voxels covered by half or more; None leaves the labels.
            only: paint only voxels that carry one of these labels.
            over: paint only voxels whose value lies in this range (for example fat).
            inside: keep to the body cavity.
            above: paint only where y is smaller (gas rises to the front of a patient on the back).

        Returns:
            the box and the coverage painted, or None if the shape lies outside the volume.
        """
        found = self.coverage(shape)
        if found is None:
            return None
        box, alpha = found
        view = self.hu[box]
        if inside:
            alpha *= self.cavity[box]
        if only is not None:
            allowed = np.zeros(256, bool)
            allowed[list(only)] = True
            alpha *= allowed[self.labels[box]]
        if over is not None:
            alpha *= (view > over[0]) & (view < over[1])
        if above is not None:
            alpha *= np.clip((above - self.y[box[1]]) / self.pixel + 0.5, 0, 1)[None, :, None]
        view += alpha * (np.float32(hu) - view)
        if label is not None:
            self.labels[box][alpha >= 0.5] = label
        return box, alpha

    def paint_tube(self, path: np.ndarray, radii: tuple[float, float], hu: float, z_range: tuple[float, float]) -> None:
        """Blend a tube that runs along z.

        Args:
            path: [Z, 2] float32, x and y of the tube's centre in every slice, mm.
            radii: semi-axes in x and y, mm.
            hu: value inside.
            z_range: from where to where, mm.
        """
        margin = 1.5 * self.pixel
        low = (path[:, 0].min() - radii[0] - margin, path[:, 1].min() - radii[1] - margin, z_range[0])
        high = (path[:, 0].max() + radii[0] + margin, path[:, 1].max() + radii[1] + margin, z_range[1])
        box = self.box(low, high)
        if box is None:
            return
        centre = path[box[0]].astype(np.float32)
        dx = ((self.x[box[2]][None] - centre[:, :1]) / np.float32(radii[0])) ** 2
        dy = ((self.y[box[1]][None] - centre[:, 1:]) / np.float32(radii[1])) ** 2
        sharpness = np.float32(0.25 * sum(radii) / self.pixel)
        alpha = np.clip((1 - (dx[:, None, :] + dy[:, :, None])) * sharpness + np.float32(0.5), 0, 1)
        view = self.hu[box]
        view += alpha * (np.float32(hu) - view)
