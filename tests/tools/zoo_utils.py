# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Stand-in for the Model Zoo's `ci/unit_tests/utils.py`: the two functions that unit tests call there, by their names
and arguments (written for this project; test_stand_alone.py puts it where the zoo has its own)."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow


def check_workflow(workflow: ConfigWorkflow, check_properties: bool = False) -> None:
    """A workflow from beginning to end; its properties are looked at before it runs."""
    workflow.initialize()
    if check_properties:
        wrong = workflow.check_properties()
        if wrong:
            raise ValueError(f"properties: {wrong}")
    workflow.run()
    workflow.finalize()


def export_config_and_run_mgpu_cmd(
    config_file: list[str],
    meta_file: str,
    override_dict: dict[str, Any],
    output_path: str,
    logging_file: str,
    ngpu: int,
) -> None:
    """The merged and overridden config in one file, run by torchrun; the bundle is found by PYTHONPATH alone."""
    parser = ConfigParser()
    parser.read_config(config_file)
    parser.update(pairs=override_dict)
    ConfigParser.export_config_file(parser.config, output_path, indent=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={ngpu}",
               "-m", "monai.bundle", "run", "--config_file", output_path, "--meta_file", meta_file, "--logging_file",
               logging_file]  # fmt: skip
    subprocess.check_call(command, env={**os.environ, "PYTHONPATH": override_dict["bundle_root"]})
