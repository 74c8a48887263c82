# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The label of an image: a JSON object with the class of each group that the reader is sure about.

    {"groups": {"bowel": "healthy", "liver": "high"}, "comment": "laceration of segment 7", "reader": "A. B."}

A group that is absent is unknown, which is not healthy: training leaves it out. ``comment`` and ``reader`` may be
absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import Unusable, few, quoted

if TYPE_CHECKING:
    from scripts.labels import LabelTable

__all__ = ["check_label"]

TEXTS = ("comment", "reader")
MAX_TEXT = 10_000  # characters


def check_label(content: Any, table: LabelTable) -> dict[str, Any]:
    """The label with its groups in the table's order.

    Raises:
        Unusable: it is not as above, or names a group or class that the table lacks; the message says what it has.
    """
    if not isinstance(content, Mapping):
        raise Unusable(f"label: expected a JSON object, got {type(content).__name__}")
    unknown = [key for key in content if key not in ("groups", *TEXTS)]
    if unknown:
        raise Unusable(f"label: expected groups, comment and reader, found {few(unknown, show=quoted)}")
    label: dict[str, Any] = {"groups": _check_groups(content.get("groups"), table)}
    for key in TEXTS:
        text = content.get(key)
        if text is None:
            continue
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise Unusable(f"label: {key}: expected a text of at most {MAX_TEXT} characters")
        label[key] = text
    return label


def _check_groups(groups: Any, table: LabelTable) -> dict[str, str]:
    if not isinstance(groups, Mapping) or not groups:
        raise Unusable(f"label: groups: expected the class of at least one of {', '.join(table.group_names)}")
    unknown = [name for name in groups if name not in table.group_names]
    if unknown:
        raise Unusable(f"label: groups: expected {', '.join(table.group_names)}, found {few(unknown, show=quoted)}")
    checked = {}
    for group in table.groups:
        if group.name not in groups:
            continue
        classes, found = [item.name for item in group.classes], groups[group.name]
        if found not in classes:
            raise Unusable(f"label: {group.name}: expected {' or '.join(classes)}, found {quoted(found)}")
        checked[group.name] = found
    return checked
