# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Small JSON files that several processes read and write: whole or not at all, changed under a lock."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import Conflict, Unusable

__all__ = ["change_object", "read_object", "remove_files", "write_objects", "writing"]

LIMIT = 4_000_000  # bytes; a reply with the evidence of all groups has some 10,000
WAIT = 30.0  # seconds for another process to finish its change


def _parse(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `content`.

    Raises:
        Unusable: it is none, or holds NaN or infinity, which no reply can carry.
    """
    if len(content) > LIMIT:
        raise Unusable(f"{what}: expected at most {LIMIT} bytes, got more")
    try:
        parsed = json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Unusable(f"{what}: expected a JSON object: {error}") from error
    if not isinstance(parsed, dict):
        raise Unusable(f"{what}: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def read_object(path: Path, what: str) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file."""
    try:
        with path.open("rb") as file:
            return _parse(file.read(LIMIT + 1), what)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Conflict(f"{what} cannot be read: {error.strerror}") from error


def write_objects(root: Path, objects: Sequence[tuple[Path, dict[str, Any], Path]], what: str) -> None:
    """Writes JSON objects below `root`: (file, content, where the file that it replaces is kept, see `_keep`).

    The first is what counts, the others are about it: nothing is kept if that is what it was.

    Raises:
        Conflict: it cannot be written.
        Unusable: it is no JSON.
    """
    texts = [(path, _text(content, what), kept) for path, content, kept in objects]
    with writing(root, what):
        now = datetime.now(timezone.utc)
        same = _content(texts[0][0]) == texts[0][1].encode("utf-8")
        for path, text, kept in reversed(texts):
            if not same:
                _keep(path, kept, now)
            _replace(path, text)


def change_object(
    root: Path, path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], what: str
) -> dict[str, Any]:
    """Reads, changes and writes a JSON object while no other process does. A file that is none counts as empty."""
    with writing(root, what):
        try:
            content = read_object(path, what) or {}
        except Unusable:
            content = {}
        content = change(content)
        _replace(path, _text(content, what))
    return content


def remove_files(root: Path, files: Sequence[tuple[Path, Path]], what: str) -> None:
    """Removes files below `root`, present or not: (file, where it is kept, see `_keep`). Raises Conflict if it
    cannot."""
    with writing(root, what):
        now = datetime.now(timezone.utc)
        for path, kept in files:
            _keep(path, kept, now)
            path.unlink(missing_ok=True)


def _keep(path: Path, kept: Path, now: datetime) -> None:
    """Copies a file that goes away to ``<kept>.<time>.json``."""
    content = _content(path)
    if content is not None:
        _replace(kept.with_name(f"{kept.name}.{now:%Y%m%dT%H%M%S.%fZ}.json"), content)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _text(content: dict[str, Any], what: str) -> str:
    try:
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    except (ValueError, TypeError, RecursionError) as error:
        raise Unusable(f"{what}: expected a JSON object: {error}") from error
    if len(text) > LIMIT:
        raise Unusable(f"{what}: expected at most {LIMIT} bytes, got more")
    return text


def _replace(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `workflow.run.whole_file`: its temporary names end in .tmp, and the search for series opens files of unknown
    # kinds, of which this one may be gone by then; its message for a full disk names the path.
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=".", suffix=".tmp.json", delete=False) as file:
        try:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


@contextmanager
def writing(root: Path, what: str, where: str = "labels folder") -> Iterator[None]:
    """Holds the lock of `root`, which it makes; what the disk refuses is a `Conflict`, which says `where` it was."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock.json", timeout=WAIT):
            yield
    except Timeout as error:
        raise Conflict(f"{what}: another process has kept the labels locked for {WAIT:.0f} s") from error
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise Conflict(f"{what} cannot be stored: the server may not write to the {where}") from error
        raise Conflict(f"{what} cannot be stored: {error.strerror}") from error
