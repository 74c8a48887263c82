# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The model card beside a weights file: what it warns of is said whenever these weights are loaded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["CARD", "card_notice", "names_weights"]

CARD = "MODEL_CARD.md"
NOTICE = "> "  # how the card's line of warning begins


def card_notice(path: str | os.PathLike[str]) -> str | None:
    """The first quoted line (``> ...``) of the card beside a weights file, if it is the card of that very file.

    Args:
        path: the weights file.

    Returns:
        None where there is no readable card, it names another file's sha256, or it has no such line.
    """
    path = Path(path)
    try:
        text = (path.parent / CARD).read_text(encoding="utf-8")
        content = path.read_bytes()
    except (OSError, UnicodeDecodeError):
        return None
    lines = [line.removeprefix(NOTICE) for line in text.splitlines() if line.startswith(NOTICE)]
    return lines[0].replace("*", "").strip() if lines and names_weights(text, content) else None


def names_weights(card: str, content: bytes) -> bool:
    """Whether a card's text holds the sha256 of a weights file's content."""
    return hashlib.sha256(content).hexdigest() in card
