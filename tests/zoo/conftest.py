# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The tests here are for the Model Zoo's `ci/unit_tests/` and need its layout: tests/tools/test_zoo_layout.py runs them."""

from __future__ import annotations

collect_ignore_glob = ["test_*.py"]
