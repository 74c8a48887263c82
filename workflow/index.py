# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What is in a tree of folders, listed once: RSNA 2023 has 1.5 million files, of which only the 8,000 folders matter.

The index is a ``.json`` below ``<cache_dir>/index/``. A folder whose time of change is that of the index is not listed
again; adding, removing or renaming an entry changes that time. What no folder's time tells, and the index not either,
is a file not named .dcm that is overwritten in place by one of another kind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from pydicom.misc import is_dicom

from .run import write_atomically

__all__ = ["Folder", "index_file", "walk"]

logger = logging.getLogger(__name__)

VERSION = 2
NIFTI = (".nii", ".nii.gz")
DICOM = (".dcm", ".dicom")
# what is not opened to see whether it is DICOM; any other ending may be (.IMA, .img, none, the last number of a UID)
NOT_DICOM = (
    ".nii", ".gz", ".txt", ".csv", ".json", ".png", ".jpg", ".jpeg", ".xml", ".pdf", ".md", ".yaml", ".yml", ".zip",
    ".parquet", ".npy", ".pt",
)  # fmt: skip
# A folder that changed within this time before it was listed is listed again the next time: file systems tick in steps
# of milliseconds up to two seconds, and a second change within the same tick would leave its time as it was.
RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class Folder:
    """A folder below the root of a walk: what the search for series needs of it."""

    path: str  # below the root, with slashes; "" is the root
    mtime_ns: int  # 0 if it is not to be trusted
    subfolders: list[str]  # names, sorted
    nifti: list[str]  # names of the NIfTI files, sorted
    files: bool  # holds any file
    dicom: bool  # holds a DICOM file


def index_file(root: str | os.PathLike[str], cache_dir: str | os.PathLike[str]) -> Path:
    """The file of a root's index."""
    name = hashlib.sha256(str(Path(root).absolute()).encode()).hexdigest()[:16]
    return Path(cache_dir).expanduser().absolute() / "index" / f"{name}.json"


def walk(root: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> list[Folder]:
    """The root and every folder below it, links followed, each before its subfolders, which are sorted by name.

    Args:
        root: an existing folder.
        cache_dir: where the index is kept between runs; None lists every folder.

    Raises:
        OSError: a folder cannot be read.
    """
    store = None if cache_dir is None else index_file(root, cache_dir)
    known = {} if store is None else _read(store)
    found: dict[str, Folder] = {}
    pending, listed = [""], 0
    while pending:
        name = pending.pop()
        path = os.path.join(root, name)
        now, mtime_ns = time.time_ns(), os.stat(path).st_mtime_ns  # before it is listed
        folder = known.get(name)
        if folder is None or folder.mtime_ns != mtime_ns:
            folder = _list(path, name, mtime_ns if now - mtime_ns > RACY_NS else 0)
            listed += 1
        found[name] = folder
        pending += (f"{name}/{sub}".lstrip("/") for sub in reversed(folder.subfolders))
    if store is not None:
        logger.info("%s: %d folders, %d of them listed anew", root, len(found), listed)
        if found != known:
            _write(store, found)
    return list(found.values())


def _list(path: str, name: str, mtime_ns: int) -> Folder:
    subfolders, files = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir():
                subfolders.append(entry.name)
            elif entry.is_file():
                files.append(entry.name)
    nifti = sorted(file for file in files if file.lower().endswith(NIFTI))
    named = any(file.lower().endswith(DICOM) for file in files)
    dicom = named or any(_is_dicom_file(Path(path, file)) for file in files)
    return Folder(name, mtime_ns, sorted(subfolders), nifti, bool(files), dicom)


def _is_dicom_file(path: Path) -> bool:
    """By the file's own mark: exports of scanners and PACS often have another extension, or none."""
    return path.suffix.lower() not in NOT_DICOM and path.name != "DICOMDIR" and is_dicom(path)


def _checksum(folders: Any) -> int:
    return zlib.crc32(json.dumps(folders).encode())


def _read(store: Path) -> dict[str, Folder]:
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
        if [content["version"], content["checksum"]] != [VERSION, _checksum(content["folders"])]:
            raise ValueError("another version, or its checksum is wrong")
        return {folder[0]: Folder(*folder) for folder in content["folders"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("index %s cannot be used (%s): every folder is listed anew", store, error)
        return {}


def _write(store: Path, found: dict[str, Folder]) -> None:
    folders = [list(astuple(folder)) for folder in found.values()]
    try:
        write_atomically(
            store, json.dumps({"version": VERSION, "checksum": _checksum(folders), "folders": folders}) + "\n"
        )
    except OSError as error:  # a cache that cannot be written costs time, not the run
        logger.warning("index %s cannot be written: %s", store, error)
