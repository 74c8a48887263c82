# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Which files a packed bundle holds, the zip of them, and the proof that both are what they should be."""

from __future__ import annotations

import filecmp
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

__all__ = ["LIMIT", "PackError", "bundle_files", "check_folder", "check_zip", "write_zip"]

LINKS = ("networks", "transforms", "workflow")  # in the repository links to the folders that both bundles share
CONTENT = ("LICENSE", "configs", "docs", "scripts", *LINKS)  # models/ is taken care of by itself
NECESSARY = ("LICENSE", "configs/metadata.json", "configs/inference.json", "docs/README.md")
LIMIT = 25_000_000  # bytes of a file that the zoo takes
CACHES = ("__pycache__", "eval")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip can name


class PackError(ValueError):
    """A bundle that cannot be packed; the message names the file, what was expected and what was found."""


def bundle_files(root: Path, name: str) -> dict[PurePosixPath, Path]:
    """The files of a packed bundle without its weights: path in the bundle -> real file in the repository.

    Whatever else stands in the bundle's folder (runs, images, caches) stays behind.

    Raises:
        PackError: if the bundle, one of its links or a necessary file is not there, or a link leads elsewhere.
    """
    folder = root / "bundles" / name
    if not (folder / "configs").is_dir():
        found = sorted(path.name for path in (root / "bundles").glob("*") if (path / "configs").is_dir())
        raise PackError(f"{folder}: expected a bundle, found none; there are {', '.join(found) or 'no bundles'}")
    for link in LINKS:
        _check_link(folder / link, root / link)
    files = {}
    for entry in sorted(folder.iterdir()):
        if entry.name in CONTENT:
            real = entry.resolve()
            paths = _walk(real) if real.is_dir() else [real]
            files |= {PurePosixPath(entry.name, *path.relative_to(real).parts): path for path in paths}
    absent = [path for path in NECESSARY if PurePosixPath(path) not in files]
    if absent:
        raise PackError(f"{folder}: expected {', '.join(absent)}, found none")
    return files


def _check_link(link: Path, target: Path) -> None:
    """A checkout without symbolic links (Windows) has a small text file in place of each."""
    if not link.is_dir():
        found = "a file: this checkout has no symbolic links" if link.is_file() else "nothing"
        raise PackError(
            f"{link}: expected a link to the folder {target}, found {found} (git: core.symlinks true, then check out "
            "again)"
        )
    if link.resolve() != target.resolve():
        raise PackError(f"{link}: expected a link to {target}, found one to {link.resolve()}")


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below, without caches and hidden ones.

    Raises:
        PackError: at a link, which could lead anywhere.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise PackError(f"{path}: expected a file or folder, found a link to {path.readlink()}")
        if path.name.startswith(".") or path.name in CACHES or path.suffix == ".pyc":
            continue
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def check_folder(folder: Path, sources: Mapping[PurePosixPath, Path], made: Mapping[PurePosixPath, str]) -> None:
    """The folder holds exactly the sources, byte for byte, and the files made for it; no link, nothing too large.

    Raises:
        PackError: naming the file.
    """
    # the folders of os.walk are not followed where they are links: they are looked at here
    found = [Path(top, name) for top, folders, files in os.walk(folder) for name in (*folders, *files)]
    for path in found:
        if path.is_symlink():
            raise PackError(f"{path}: a link in the packed bundle")
    files = {PurePosixPath(path.relative_to(folder).as_posix()): path for path in found if path.is_file()}
    if set(files) != {*sources, *made}:
        raise PackError(f"{folder}: packed {sorted(map(str, set(files) ^ {*sources, *made}))} too many or too few")
    for name, path in files.items():
        if name in sources and not filecmp.cmp(path, sources[name], shallow=False):
            raise PackError(f"{path}: differs from {sources[name]}")
        size = path.stat().st_size
        if size > LIMIT:
            raise PackError(
                f"{sources.get(name, name)}: {size / 1e6:.1f} MB, the zoo takes up to {LIMIT / 1e6:.0f} MB a file; "
                "weights can lie elsewhere: --weights-url"
            )


def write_zip(folder: Path, file: Path) -> None:
    """Zip a folder under its own name, so that the same content gives the same bytes: no times, no order, no modes."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}", EPOCH)
            entry.create_system = 3  # Unix, wherever it is made
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            # weights hardly shrink
            entry.compress_type = zipfile.ZIP_STORED if path.parent.name == "models" else zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())


def check_zip(file: Path, folder: Path) -> None:
    """The zip holds what the folder holds, below one top folder of its name.

    Raises:
        PackError: naming the entry.
    """
    expected = {f"{folder.name}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*")}
    expected = {name: path for name, path in expected.items() if path.is_file()}
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        wrong = [name for name in names if ".." in PurePosixPath(name).parts or name.startswith("/")]
        if wrong or len(set(names)) != len(names) or set(names) != set(expected):
            raise PackError(f"{file}: entries {wrong or sorted(set(names) ^ set(expected))} are not those of {folder}")
        for name, path in expected.items():
            if archive.read(name) != path.read_bytes():
                raise PackError(f"{file}: {name} differs from {path}")
