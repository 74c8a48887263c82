# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the runs of both bundles share. Never a transform, never a network.

Data
    `datalist`           where the volumes are
    `table`              own data as a CSV
    `sections`           a decathlon-style JSON
    `index`              what is in a tree of folders, listed once
    `folds`              folds by patient, in a file
    `cache`              prepared volumes on disk
    `dataset`            items whose randomness is a function of (seed, epoch, item)
    `sampler`            their order, a function of (seed, epoch)
    `prepare`            the preparation run ahead

Run
    `run`                its folder
    `manifest`           what run.json says
    `record`             the handler that brings the figures into it
    `training`           clipping, the stop at a bad loss, means, early stopping
    `before_step`        the state before a step
    `progress`           the position, and everything else that a resume restores
    `checkpoint`         the handlers that save and restore
    `checkpoint_files`   their files
    `weights`            weights, counted and checked
    `foreign_weights`    those of others
    `tensorboard`        its writer
    `tracking`           MLflow
    `tensorrt`           the backbone as an engine

Trust
    `guard`              an override that no config knows
    `vocabulary`         all that a config may say
    `review`             a config before it is run
    `provenance`         weights meet the input that they were trained on
    `card`               what a model card says of the weights beside it
    `privacy`            what stays out of logs and files
    `errors`             what went wrong, without the layers

Processes
    `distributed`        torchrun's group, DistributedDataParallel
    `peers`              what they say when one ends
    `gather`             what they know together
    `global_mean`        the loss over the items of all
"""

from __future__ import annotations

__version__ = "0.3.0"
