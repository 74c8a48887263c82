# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Messages for users, without the paths of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["any_path_hidden", "renamed", "without_paths"]

_PATH = re.compile(r"(?<![\w.:/])(/[^\s'\":,;)\]]+/)")


def renamed(text: str, names: Mapping[str | Path, str]) -> str:
    """The text with names in place of known paths; the longest path first."""
    for path, name in sorted(((str(path), name) for path, name in names.items()), key=lambda pair: -len(pair[0])):
        text = text.replace(path, name)
    return text


def without_paths(text: str, folders: Iterable[str | Path]) -> str:
    """The text with paths relative to known folders; the longest path first."""
    for path in sorted({str(folder) for folder in folders if Path(folder).name}, key=len, reverse=True):
        text = text.replace(f"{path}/", "").replace(path, Path(path).name)
    return text


def any_path_hidden(text: str, folders: Iterable[str | Path] = ()) -> str:
    """The text with paths relative to known folders, and without the folders of any other.

    Where an unknown path ends can only be guessed, as folders may have blanks; so name those that are known.
    """
    return _PATH.sub(".../", without_paths(text, folders))
