# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests for the Model Zoo's `ci/unit_tests/`, which need its layout: tests/tools/test_stand_alone.py runs them."""

from __future__ import annotations

collect_ignore_glob = ["test_*.py"]
