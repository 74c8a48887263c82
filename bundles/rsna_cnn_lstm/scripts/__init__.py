# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Code of the injury classifier alone: network, label table, loss, score, metrics, predictions."""
