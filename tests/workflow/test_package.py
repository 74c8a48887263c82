# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The package's docstring is an index of it."""

from __future__ import annotations

import re
from pathlib import Path

import workflow


def test_every_module_has_its_line_in_the_index():
    modules = {path.stem for path in Path(workflow.__file__).parent.glob("*.py")} - {"__init__"}
    assert sorted(re.findall(r"^    `(\w+)` +\S", workflow.__doc__, re.MULTILINE)) == sorted(modules)
