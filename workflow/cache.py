# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Prepared volumes ("slabs") on disk: the deterministic work on a series is done once.

A slab is a slice-major ``.npy`` ([Z, C, X, Y], memory-mapped when read, so that only the slices which a step needs are
touched) beside a small ``.json`` with its affine, source and where the source's slices lay. Its name is a hash of the
source (path, sizes, times), of every parameter of the preparation and of `VERSION`, so a changed window never meets an
old slab. Files are written under a temporary name and renamed; a damaged one is made again, bits that changed on the
disk included, which a checksum in the ``.json`` tells; several processes may prepare at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import mmap
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from transforms.meta import with_meta
from transforms.nifti import is_nifti

from .run import whole_file, write_atomically

__all__ = ["SlabCache", "describe", "slab_bytes"]

logger = logging.getLogger(__name__)

VERSION = 3
# attributes of transforms that are state or derived, not parameters
NOT_PARAMETERS = {"R", "lazy", "log_stats", "overrides", "unpack_items", "map_items", "_lazy"}


def describe(thing: Any) -> Any:
    """A JSON-able description of a transform and all its parameters, the same in every process."""
    if thing is None or isinstance(thing, (bool, int, float, str)):
        return thing
    if isinstance(thing, Compose):
        return [describe(transform) for transform in thing.transforms]
    if isinstance(thing, dict):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, set, frozenset)):
        return [describe(value) for value in thing]
    if isinstance(thing, (np.ndarray, torch.Tensor)):
        return np.asarray(thing).tolist()
    if isinstance(thing, functools.partial):
        return [describe(thing.func), describe(thing.args), describe(thing.keywords)]
    if hasattr(thing, "__code__"):
        return _describe_function(thing)
    if hasattr(thing, "__dict__") and not isinstance(thing, type):
        name = f"{type(thing).__module__}.{type(thing).__qualname__}"
        values = {k: describe(v) for k, v in sorted(vars(thing).items()) if k not in NOT_PARAMETERS}
        return {name: values} if values else name
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', str(thing))}"


def _describe_function(function: Any) -> list[Any]:
    """Name, instructions and values of a Python function: two lambdas of one name differ in the latter."""
    code = function.__code__
    constants = [value for value in code.co_consts if not hasattr(value, "co_code")]
    enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
    values = [list(code.co_names), constants, enclosed, function.__defaults__, getattr(function, "__self__", None)]
    return [f"{function.__module__}.{function.__qualname__}", code.co_code.hex(), describe(values)]


def _stat(path: Path) -> list[Any]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def fingerprint(source: str | os.PathLike[str]) -> list[Any]:
    """Path, sizes and times of a NIfTI file, or of all files of a folder; a DICOM file stands for the series around it,
    so all files of its folder count."""
    path = Path(source).absolute()
    if path.is_file() and is_nifti(path):
        files = [path]
    else:
        folder = path.parent if path.is_file() else path
        files = sorted(entry for entry in folder.iterdir() if entry.is_file())
    return [str(path), [_stat(file) for file in files]]


class Header(NamedTuple):
    """All of a slab but its voxels, read once a run: its parsing takes longer than the slices of a step."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # of the voxels, in bytes
    bytes: int  # of the file
    affine: torch.Tensor
    meta: dict[str, Any]
    crc32: int


class SlabCache:
    """Runs `prepare` on an item, or reads what it gave before.

    Args:
        prepare: dictionary transform whose result under `key` is a MetaTensor [C, X, Y, Z].
        cache_dir: folder of the slabs; None for no cache.
        key: the item's key of the volume.
    """

    def __init__(self, prepare: Compose, cache_dir: str | os.PathLike[str] | None, key: str = "image") -> None:
        self.prepare = prepare
        self.folder = None if cache_dir is None else Path(cache_dir).expanduser().absolute()
        self.key = key
        self._description = json.dumps([VERSION, describe(prepare)], sort_keys=True, default=str)
        self._headers: dict[Path, Header] = {}

    def sources(self, item: dict[str, Any]) -> tuple[str, ...]:
        """The paths that the prepared volume is made of."""
        return tuple(str(value) for k, value in sorted(item.items()) if k in (self.key, "mask") and value)

    def path_of(self, item: dict[str, Any]) -> Path | None:
        """The slab's path without suffix."""
        if self.folder is None:
            return None
        source = [fingerprint(path) for path in self.sources(item)]
        name = hashlib.sha256((self._description + json.dumps(source)).encode()).hexdigest()[:32]
        return self.folder / name[:2] / name

    def load(self, item: dict[str, Any], path: Path | None = None, *, verify: bool = False) -> MetaTensor:
        """The prepared volume of an item, [C, X, Y, Z] over slice-major memory.

        Args:
            path: what `path_of` said of the item before; None asks it.
            verify: read all of a slab and compare its checksum; done once a run.

        Raises:
            whatever `prepare` raises, such as SeriesError.
        """
        path = self.path_of(item) if path is None else path
        if path is not None:
            try:
                return self._read(path, verify)
            except FileNotFoundError:
                pass
            except (ValueError, EOFError, KeyError, OSError) as error:
                self._headers.pop(path, None)
                logger.warning("damaged slab %s (%s): preparing %s again", path, error, item[self.key])
        volume = self.prepare(dict(item))[self.key]
        if path is not None:
            self._write(path, volume, item)
        return volume

    def _read(self, path: Path, verify: bool) -> MetaTensor:
        if path not in self._headers:
            self._headers[path] = _read_header(path)
        header = self._headers[path]
        with open(path.with_suffix(".npy"), "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != header.bytes:
                raise ValueError(f"expected {header.bytes} bytes, found {found}")
            # copy-on-write: torch wants a writable array, and nothing that it writes may reach the file
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if verify and zlib.crc32(memoryview(mapped)[header.offset :]) != header.crc32:
            raise ValueError("its checksum is wrong")
        voxels = torch.frombuffer(mapped, dtype=header.dtype, count=math.prod(header.shape), offset=header.offset)
        volume = voxels.view(header.shape).permute(1, 2, 3, 0)
        return with_meta(volume, {**header.meta, "affine": header.affine.clone()})

    def _write(self, path: Path, volume: MetaTensor, item: dict[str, Any]) -> None:
        slab = np.ascontiguousarray(volume.as_tensor().permute(3, 0, 1, 2).numpy())
        meta = {
            "shape": list(slab.shape),
            "crc32": zlib.crc32(slab),
            "affine": volume.affine.tolist(),
            "source": str(item[self.key]),
            "source_slices": volume.meta.get("source_slices", "[]"),
        }
        write_atomically(path.with_suffix(".json"), json.dumps(meta))
        with whole_file(path.with_suffix(".npy")) as file:  # last: a slab that is there is whole
            np.save(file, slab, allow_pickle=False)


def _read_header(path: Path) -> Header:
    slab = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
    meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    if list(slab.shape) != meta["shape"]:
        raise ValueError(f"expected shape {meta['shape']}, found {list(slab.shape)}")
    return Header(
        shape=slab.shape,
        dtype=torch.from_numpy(np.empty(0, slab.dtype)).dtype,
        offset=slab.offset,
        bytes=slab.offset + slab.nbytes,
        affine=torch.tensor(meta["affine"], dtype=torch.float64),
        meta={"filename_or_obj": meta["source"], "source_slices": meta["source_slices"]},
        crc32=meta["crc32"],
    )


def slab_bytes(path: Path | None) -> int:
    """Bytes on disk of the slab at a path that `SlabCache.path_of` gave; 0 where there is none."""
    files = () if path is None else (path.with_suffix(suffix) for suffix in (".npy", ".json"))
    try:
        return sum(file.stat().st_size for file in files)
    except FileNotFoundError:
        return 0
