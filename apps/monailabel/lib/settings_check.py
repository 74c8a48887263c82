# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether the settings file fits the bundles, and itself: said at the start rather than after hours of training.

A bundle refuses a misspelt name, and weights whose training had another window, size or network, when it runs. Here a
version would be trained and put in use before its first answer fails.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from workflow.guard import UnknownOverride

from .bundles import CLASSIFIER, Setup, SetupError

__all__ = ["check_settings"]

# configs that run over another one, and take its settings where they say nothing
OVER = {"evaluate": "train"}
ALLOW, CHECK = "allow_config_mismatch", "weights_check"


def check_settings(setup: Setup) -> None:
    """Hold the settings against the names of the configs, and those of the classifier's configs against each other.

    Raises:
        SetupError: naming each unknown name with its near misses, or the settings that differ with both values.
    """
    problems = list(_unknown(setup)) or list(_differing(setup))
    if problems:
        raise SetupError(f"--conf settings: {'; '.join(problems)}")


def _unknown(setup: Setup) -> Iterator[str]:
    for model, configs in setup.settings.items():
        for config, overrides in configs.items():
            content = _content(setup, model, config)
            described = content["_desc_"]
            for name in overrides:
                nested = "#" in name and (name in content or _has(content, name))
                if name not in described and not nested:
                    yield f"{model}, {config}: {UnknownOverride([name], described)}"


def _differing(setup: Setup) -> Iterator[str]:
    """What decides whether weights fit, where training and what uses its weights would not have the same."""
    train = {**_content(setup, CLASSIFIER, "train"), **setup.overrides(CLASSIFIER, "train")}
    for config in ("inference", "evaluate"):
        given = setup.overrides(CLASSIFIER, config)
        content = _content(setup, CLASSIFIER, config)
        here = {**content, **(setup.overrides(CLASSIFIER, "train") if config in OVER else {}), **given}
        if here.get(ALLOW) is True or CHECK in given:
            continue  # a difference is meant
        names = [name for name in content[CHECK]["settings"] if here.get(name) != train.get(name)]
        if names:
            values = [f"{name} is {here.get(name)!r} in {config} and {train.get(name)!r} in train" for name in names]
            yield (
                f"{CLASSIFIER}: {', '.join(values)}: weights that are trained here would not fit. Give the same values"
                f" under inference and train (evaluate takes those of train), or {ALLOW} in {config} if it is meant"
            )


def _content(setup: Setup, model: str, config: str) -> dict[str, Any]:
    """A config, over the one that it is run over."""
    file = setup.bundle(model) / "configs" / f"{config}.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    if config not in OVER:
        return content
    base = _content(setup, model, OVER[config])
    return {**base, **content, "_desc_": {**base["_desc_"], **content["+_desc_"]}}


def _has(content: Any, name: str) -> bool:
    """Whether a config has a nested id, such as ``train#trainer#amp``."""
    for key in name.split("#"):
        if isinstance(content, list) and key.isdecimal() and int(key) < len(content):
            content = content[int(key)]
        elif isinstance(content, Mapping) and key in content:
            content = content[key]
        else:
            return False
    return True
