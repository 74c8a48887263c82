# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What a work folder of `demo.weights` was begun with, and how long its stages took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workflow.run import write_atomically

SETTINGS = "settings.json"
RESUMED = "since it was resumed"


class OtherSettings(ValueError):
    """A work folder holds stages that were made with other settings; the message names the folder and what differs."""


def hold_settings(work: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings at the first start; later ones must be the same, as finished stages are not made anew.

    A folder without them, of before they were written, is taken as it is.

    Raises:
        OtherSettings: where they differ; nothing is changed then.
    """
    path = work / SETTINGS
    text = json.dumps(settings, indent=4, default=str) + "\n"
    if not path.is_file():
        write_atomically(path, text)
        return
    held, given = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
    names = sorted({*held, *given})
    differ = [
        f"{name} was {held.get(name)}, is {given.get(name)}" for name in names if held.get(name) != given.get(name)
    ]
    if differ:
        raise OtherSettings(
            f"{work} was begun with other settings: {'; '.join(differ)}. Give the same ones to go on, or another --work"
        )


def write_stamp(work: Path, stage: str, seconds: float, *, resumed: bool = False) -> None:
    """A stage is done. What a process that was stopped had needed for it is unknown to the one that went on."""
    write_atomically(stamp(work, stage), f"{seconds:.0f} s{f' {RESUMED}' if resumed else ''}\n")


def stamp(work: Path, stage: str) -> Path:
    return work / "stamps" / stage


def duration(work: Path) -> str:
    """The sum of all stamps, in minutes."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((work / "stamps").iterdir())]
    minutes = sum(float(text.split()[0]) for text in texts) / 60
    return f"{'at least ' if any(RESUMED in text for text in texts) else ''}{minutes:.0f} min"
