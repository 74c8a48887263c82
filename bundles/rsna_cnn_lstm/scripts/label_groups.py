# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of a label table, groups and their classes, and how they are read from parsed JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "AnyInjury",
    "LabelClass",
    "LabelGroup",
    "check_keys",
    "first_few",
    "parse_any",
    "parse_group",
    "raise_error",
]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def first_few(values: Iterable[object], limit: int = 5) -> str:
    """``"a, b, c, ..."``: the first ``limit`` values, for error messages that also state a count."""
    items = [str(value) for value in values]
    return ", ".join(items[:limit]) + (", ..." if len(items) > limit else "")


def raise_error(message: str) -> None:
    """The usual answer to a fault in a table."""
    raise ValueError(message)


@dataclass(frozen=True)
class LabelClass:
    """One state of a group. ``loss_weight`` is its sample weight in training, ``score_weight`` the one in the score."""

    name: str
    loss_weight: float = 1.0
    score_weight: float = 1.0


@dataclass(frozen=True)
class LabelGroup:
    """A group of exclusive classes, the healthy one first.

    ``image_level_name``: what the labels of single images call its injury; only a two-class group can have one.
    """

    name: str
    classes: tuple[LabelClass, ...]
    image_level_name: str | None = None

    @property
    def is_binary(self) -> bool:
        """Whether the group has two classes and therefore one logit, that of its injury."""
        return len(self.classes) == 2

    @property
    def num_logits(self) -> int:
        """One for two classes, else one a class."""
        return 1 if self.is_binary else len(self.classes)

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names ``<group>_<class>``, the healthy one first."""
        return tuple(f"{self.name}_{item.name}" for item in self.classes)

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Sample weight of each class in the training loss."""
        return tuple(item.loss_weight for item in self.classes)

    @property
    def score_weights(self) -> tuple[float, ...]:
        """Sample weight of each class in the score."""
        return tuple(item.score_weight for item in self.classes)


@dataclass(frozen=True)
class AnyInjury:
    """The derived binary term of the score: injured in any group. Weights are sample weights of the score."""

    name: str = "any_injury"
    healthy_weight: float = 1.0
    injury_weight: float = 6.0


def check_keys(where: str, content: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {content!r}")
    missing, unknown = sorted(required - set(content)), sorted(set(content) - required - optional)
    if missing or unknown:
        raise ValueError(f"{where} has wrong keys: missing {missing}, unknown {unknown}")


def _parse_name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a name is letters, digits and underscores and starts with a letter, got {name!r}")
    return name


def _parse_weight(where: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"{where} must be a positive number, got {weight!r}")
    return float(weight)


def parse_group(content: Any) -> LabelGroup:
    check_keys("a group", content, required={"name", "classes"}, optional={"_desc_", "image_level_name"})
    name = _parse_name("a group", content["name"])
    if not isinstance(content["classes"], list) or len(content["classes"]) < 2:
        raise ValueError(f"group '{name}' needs a list of at least two classes, the healthy one first")
    classes = []
    for item in content["classes"]:
        check_keys(f"a class of group '{name}'", item, required={"name"}, optional={"loss_weight", "score_weight"})
        label = _parse_name(f"group '{name}'", item["name"])
        weights = [
            _parse_weight(f"'{key}' of {name}_{label}", item.get(key, 1.0)) for key in ("loss_weight", "score_weight")
        ]
        classes.append(LabelClass(label, *weights))
    image_level_name = content.get("image_level_name")
    if image_level_name is not None and not (isinstance(image_level_name, str) and image_level_name):
        raise ValueError(f"'image_level_name' of group '{name}' must be a text, got {image_level_name!r}")
    if image_level_name is not None and len(classes) != 2:
        raise ValueError(
            f"group '{name}' has an image_level_name and {len(classes)} classes: slices can have labels only in a group"
            " of two, which has one logit"
        )
    return LabelGroup(name, tuple(classes), image_level_name)


def parse_any(content: Any) -> AnyInjury:
    check_keys("'any_injury'", content, required={"name"}, optional={"healthy_weight", "injury_weight"})
    default = AnyInjury()
    return AnyInjury(
        _parse_name("'any_injury'", content["name"]),
        _parse_weight("'healthy_weight' of any_injury", content.get("healthy_weight", default.healthy_weight)),
        _parse_weight("'injury_weight' of any_injury", content.get("injury_weight", default.injury_weight)),
    )
