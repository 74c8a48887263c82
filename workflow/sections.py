# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The sections of a decathlon-style JSON: which series train, validate or test. No patient is in two of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DatalistError

__all__ = ["PARTS", "read_json", "read_section"]

PARTS = ("training", "validation", "test")
NAMED = 5  # of what is refused


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no UTF-8
        raise DatalistError(f"datalist {path}: not readable as JSON: {error}") from error


def read_section(path: Path, base: Path, section: str) -> list[dict[str, Any]]:
    """The items of one section; see `workflow.datalist.load_datalist`.

    Args:
        path: the JSON.
        base: folder of the paths in it.
        section: one of `PARTS`.

    Raises:
        DatalistError: if the file, the section, an ``image`` entry or a file that it names is missing, an image or
            series is twice in the section, or an image or patient also in another one.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(section), list):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise DatalistError(f"datalist {path}: expected a list under {section!r}, found {found}")
    items = []
    for number, entry in enumerate(content[section]):
        entry = _entry(entry)
        if not isinstance(entry.get("image"), str):
            raise DatalistError(f"datalist {path}: {section}[{number}] has no path under 'image'")
        image = base / entry["image"]
        if not image.exists():
            raise DatalistError(f"datalist {path}: {section}[{number}] names {image}, which does not exist")
        if entry.get("mask"):
            entry["mask"] = str(base / entry["mask"])
            if not Path(entry["mask"]).exists():
                raise DatalistError(
                    f"datalist {path}: {section}[{number}] names the mask {entry['mask']}, which does not exist"
                )
        patient, series = _identity(entry)
        items.append({**entry, "image": str(image), "patient_id": patient, "series_id": series})
    _refuse_repeated(path, section, items)
    _refuse_shared(path, base, section, content)
    return items


def _entry(entry: Any) -> dict[str, Any]:
    return {"image": entry} if isinstance(entry, str) else dict(entry)


def _identity(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Patient and series of an entry; the path names what it does not."""
    series = str(entry.get("series_id", entry["image"]))
    return str(entry.get("patient_id", series)), series


def _refuse_repeated(path: Path, section: str, items: list[dict[str, Any]]) -> None:
    images, series, twice = set(), set(), []
    for item in items:
        image, identity = os.path.normpath(item["image"]), (item["patient_id"], item["series_id"])
        if image in images or identity in series:
            twice.append(item["image"])
        images.add(image)
        series.add(identity)
    if twice:
        raise DatalistError(f"datalist {path}: {len(twice)} series are more than once in {section!r}: {twice[:NAMED]}")


def _refuse_shared(path: Path, base: Path, section: str, content: Mapping[str, Any]) -> None:
    """Refuse images and patients of a section that another one has too: training would have seen them."""
    own = _members(base, content[section])
    for other in PARTS:
        if other != section and isinstance(content.get(other), list):
            for kind, names in _members(base, content[other]).items():
                shared = sorted(names & own[kind])
                if shared:
                    raise DatalistError(f"datalist {path}: {len(shared)} {kind} are both in {section!r} and in"
                                        f" {other!r}: {shared[:NAMED]}")  # fmt: skip


def _members(base: Path, entries: list[Any]) -> dict[str, set[str]]:
    """Patients and images of a section; an entry that is none is refused where its section is read."""
    found = [_entry(entry) for entry in entries if isinstance(entry, (str, dict))]
    found = [entry for entry in found if isinstance(entry.get("image"), str)]
    images = {os.path.normpath(base / entry["image"]) for entry in found}
    return {"patients": {_identity(entry)[0] for entry in found}, "images": images}
