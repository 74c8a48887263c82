# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Networks that both bundles build on: the 2D backbone whose weights travel from pretraining to the classifier."""

from __future__ import annotations

from .backbone import Backbone

__version__ = "0.3.0"

__all__ = ["Backbone"]
