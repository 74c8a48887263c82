# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A bundle's own parts, from its own configs: what is measured is what a run uses. For processes of `common.in_bundle`,
whose working directory is the bundle's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.bundle import ConfigParser


def parse(configs: Sequence[str], overrides: Mapping[str, Any]) -> ConfigParser:
    """The bundle's configs (names without ``.json``, in order) with overrides of top-level ids.

    Raises:
        KeyError: for an override that the configs do not have.
    """
    parser = ConfigParser()
    parser.read_config([f"configs/{name}.json" for name in configs])
    for name, value in overrides.items():
        if name not in parser.get():
            raise KeyError(f"{name}: expected a top-level id of {list(configs)}")
        parser[name] = value
    return parser
