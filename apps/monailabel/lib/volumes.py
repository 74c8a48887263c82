# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Volumes for a viewer: a series exactly as the bundle's own configuration reads it, as NIfTI in a small cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import nibabel as nib
import numpy as np
from monai.bundle import ConfigParser
from transforms.errors import SeriesError
from workflow.cache import describe, fingerprint
from workflow.run import whole_file

from .errors import Unusable
from .paths import renamed

__all__ = ["FileCache", "VolumeReader"]


class VolumeReader:
    """Reads a series by the first transform of the bundle's `inference.json`, with the settings of the app.

    Args:
        bundle: folder of the classifier's bundle; it must be importable (`bundles.use_bundle`).
        overrides: the app's settings of that config.
    """

    def __init__(self, bundle: Path, overrides: Mapping[str, Any]) -> None:
        parser = ConfigParser()
        parser.read_config(str(bundle / "configs" / "inference.json"))
        parser["bundle_root"] = str(bundle)
        parser.update(dict(overrides))
        self._load = parser.get_parsed_content("preprocessing#transforms#0")
        self.window = [float(value) for value in parser.get_parsed_content("window")]  # HU, what the network sees
        self._description = json.dumps(describe(self._load), sort_keys=True, default=str)

    def key(self, path: Path, image: str, *more: object) -> str:
        """Changes with the files at `path` (names, sizes, times) and with how they are read."""
        try:
            parts = [self._description, fingerprint(path), image, *more]
        except OSError as error:
            raise Unusable(f"image {image!r} cannot be read: {error.strerror}.") from error
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def write(self, path: Path, image: str, file: IO[bytes]) -> None:
        """Writes the volume [X, Y, Z] in HU, RAS, as an uncompressed NIfTI file.

        Raises:
            Unusable: it is no series that the classifier would take; the message is the bundle's, with the image's id
                in place of its path.
        """
        try:
            volume = self._load({"image": str(path)})["image"]
        except SeriesError as error:
            raise Unusable(renamed(str(error), {path: image})) from error
        affine = np.asarray(volume.affine, dtype=np.float64)
        nifti = nib.Nifti1Image(np.asarray(volume)[0], affine)
        nifti.header.set_xyzt_units("mm")
        nifti.set_sform(affine, code="scanner")
        nifti.set_qform(affine, code="scanner")
        nifti.to_stream(file)


class FileCache:
    """Files of a folder by keys, at most `limit`: the one that was not asked for longest goes first.

    One file is made at a time, so that many requests at once need the memory of one.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()

    def get(self, key: str, suffix: str, make: Callable[[IO[bytes]], None]) -> Path:
        """The file of `key`, which `make` writes unless it is there."""
        path = self.folder / f"{key}{suffix}"
        if _used(path):  # it waits for no other file
            return path
        with self._lock:
            if not _used(path):
                with whole_file(path) as file:
                    make(file)
                self._evict(path)
        return path

    def _evict(self, kept: Path) -> None:
        files = sorted((file for file in self.folder.iterdir() if file != kept), key=lambda file: file.stat().st_mtime)
        for file in files[: max(0, len(files) + 1 - self.limit)]:
            with contextlib.suppress(OSError):  # another system may hold it open
                file.unlink()


def _used(path: Path) -> bool:
    """Whether the file is there; then it was asked for just now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
