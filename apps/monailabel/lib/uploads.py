# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""An uploaded CT: a NIfTI file, or a zip of one DICOM series. What it is, is told by its first bytes."""

from __future__ import annotations

import gzip
import lzma
import math
import re
import shutil
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

import nibabel as nib
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from workflow.run import DISK_FULL

from .errors import TooLarge, Unusable

__all__ = ["unpack_upload"]

MAX_FILES = 10_000
BLOCK = 1 << 20
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, RuntimeError,
           NotImplementedError, ValueError, OSError)  # fmt: skip
HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}  # by the first four bytes, in either order
EXPECTED = "expected a NIfTI file (.nii or .nii.gz) or a zip of one DICOM series"


def unpack_upload(stream: IO[bytes], folder: Path, limit: int) -> Path:
    """Write an upload below a folder, as the bundle reads it.

    Names within a zip are never used as paths, links in it are plain files, and what is unpacked is counted while it is
    written, whatever the zip says of itself.

    Args:
        stream: the uploaded file.
        folder: an empty folder.
        limit: bytes that it may unpack to.

    Returns:
        the file, or the folder of a series.

    Raises:
        Unusable: it is neither, or damaged.
        TooLarge: it unpacks to more.
    """
    start = stream.read(540)
    stream.seek(0)
    budget = _Budget(limit)
    if start[:4] == b"PK\x03\x04":
        return _unzip(stream, folder / "series", budget)
    if start[:2] == b"\x1f\x8b":
        path = folder / "series.nii"
        try:
            with gzip.GzipFile(fileobj=stream, mode="rb") as unpacked:
                if not _is_nifti(unpacked.read(540), budget):
                    raise Unusable(f"upload: {EXPECTED}, found a .gz of another kind of file")
                unpacked.seek(0)
                _copy(unpacked, path, budget)
        except DAMAGED as error:
            raise _damaged("a damaged .gz file", error) from error
        return path
    if _is_nifti(start, budget):
        path = folder / "series.nii"
    elif start[128:132] == b"DICM":
        path = folder / "series" / "1.dcm"
    else:
        raise Unusable(f"upload: {EXPECTED}, found another kind of file")
    path.parent.mkdir(exist_ok=True)
    _copy(stream, path, budget)
    return path if path.suffix == ".nii" else path.parent


class _Budget:
    """Bytes that may still be written."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.left = allowed, allowed

    def take(self, number: int) -> None:
        self.left -= number
        if self.left < 0:
            raise self.exceeded()

    def exceeded(self) -> TooLarge:
        return TooLarge(f"upload: unpacks to more than {self.allowed / 1e6:g} MB, the limit of this server")


def _is_nifti(start: bytes, budget: _Budget) -> bool:
    """Whether a file begins as NIfTI. Raises TooLarge for one of more voxels than may be written, before it is."""
    kind = HEADERS.get(int.from_bytes(start[:4], "little")) or HEADERS.get(int.from_bytes(start[:4], "big"))
    if kind is None:
        return False
    try:
        header = kind(start[: kind.template_dtype.itemsize], check=False)
        size = math.prod(map(int, header.get_data_shape())) * header.get_data_dtype().itemsize
    except (ValueError, KeyError, WrapStructError, HeaderDataError):
        return True  # the bundle says what is wrong with it
    if size > budget.left:
        raise budget.exceeded()
    return True


def _copy(source: IO[bytes], path: Path, budget: _Budget) -> None:
    with path.open("wb") as target:
        while block := source.read(BLOCK):
            budget.take(len(block))
            target.write(block)


def _unzip(stream: IO[bytes], folder: Path, budget: _Budget) -> Path:
    folder.mkdir()
    try:
        with zipfile.ZipFile(stream) as archive:
            members = [member for member in archive.infolist() if not member.is_dir() and _is_data(member.filename)]
            if len(members) > MAX_FILES:
                raise TooLarge(f"upload: a zip of {len(members)} files, more than {MAX_FILES}")
            if sum(member.file_size for member in members) > budget.left:  # as it says itself
                raise budget.exceeded()
            for number, member in enumerate(members, start=1):
                with archive.open(member) as unpacked:
                    _copy(unpacked, folder / _file_name(number, member.filename), budget)
    except DAMAGED as error:
        raise _damaged("a zip that cannot be unpacked", error) from error
    if not members:
        shutil.rmtree(folder)
        raise Unusable(f"upload: {EXPECTED}, found an empty zip")
    return folder


def _damaged(what: str, error: Exception) -> Exception:
    """What is wrong with the upload; a full disk is no fault of it."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return error
    return Unusable(f"upload: {EXPECTED}, found {what} ({type(error).__name__})")


def _is_data(name: str) -> bool:
    """Not what archivers and DICOM media add: ._x, __MACOSX/x, DICOMDIR."""
    path = PurePosixPath(name)
    return not path.name.startswith(".") and "__MACOSX" not in path.parts and path.name != "DICOMDIR"


def _file_name(number: int, name: str) -> str:
    """A name of our own that still says which file of the zip it was; the folders of a zip are one series."""
    return f"{number:05d}-{re.sub(r'[^A-Za-z0-9._-]', '_', PurePosixPath(name).name)[-60:]}"
