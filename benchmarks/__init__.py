# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""One script a claim: each prints its figures with the machine and the versions that they were measured with."""
