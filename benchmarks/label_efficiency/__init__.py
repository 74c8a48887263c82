# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What pretraining buys: label efficiency of the classifier on synthetic patients, by a plan committed beforehand."""
