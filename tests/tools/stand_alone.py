# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Unpacked bundles used as by someone who has no repository: run by test_stand_alone.py as `python -c`, without
PYTHONPATH. torch and MONAI are imported once; each job is a process forked from there.

Argument: a JSON list of jobs, ``{"name", "cwd", "argv"}`` for ``python -m monai.bundle ARGV`` (or another ``program``)
or ``{"name", "cwd", "call", "arguments"}`` for a function of this file. Output of each goes to ``NAME.log``; a summary
to standard output.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import monai.bundle
import torch
from monai.bundle import ConfigParser

PARTS = ("networks", "transforms", "workflow", "scripts")


def origins() -> dict[str, str]:
    """Where the packages of a bundle that this process uses came from."""
    return {name: str(Path(sys.modules[name].__file__ or "").parent.resolve()) for name in PARTS if name in sys.modules}


def same_weights(name: str, folder: str) -> None:
    """`monai.bundle.load()` gives the module with the weights of model.pt."""
    loaded = monai.bundle.load(name, bundle_dir=folder, source="monaihosting")
    expected = torch.load(f"{folder}/{name}/models/model.pt", weights_only=True)
    assert isinstance(loaded, torch.nn.Module), type(loaded)
    state = loaded.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def unload(name: str) -> None:
    for module in [key for key in sys.modules if key.split(".")[0] == name]:
        del sys.modules[module]


def both(folders: list[str]) -> None:
    """Two bundles in one process by MONAI Label's procedure: path put first, `scripts` unloaded, path removed."""
    found = []
    for folder in folders:
        sys.path.insert(0, folder)
        unload("scripts")
        parser = ConfigParser()
        parser.read_config(f"{folder}/configs/train.json")
        parser["bundle_root"] = folder
        loss = parser.get_parsed_content("loss") if "loss" in parser else parser.get_parsed_content("train#loss")
        inference = ConfigParser()
        inference.read_config(f"{folder}/configs/inference.json")
        inference["bundle_root"] = folder
        network = inference.get_parsed_content("network_def")
        network.load_state_dict(torch.load(f"{folder}/models/model.pt", weights_only=True))
        inference.get_parsed_content("preprocessing")
        scripts = Path(sys.modules[type(loss).__module__].__file__ or "").resolve()
        assert scripts.is_relative_to(Path(folder).resolve() / "scripts"), scripts
        found.append(type(loss))
        sys.path.remove(folder)
    assert found[0] is not found[1]
    assert found[0].__module__ == found[1].__module__ == "scripts.loss", found


def job(task: dict[str, Any]) -> None:
    os.chdir(task["cwd"])
    if "call" in task:
        globals()[task["call"]](**task["arguments"])
    else:
        program = task.get("program", "monai.bundle")
        sys.argv = [program, *map(str, task["argv"])]
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def child(task: dict[str, Any], log: Path) -> None:
    """The forked process, with its output in the log; an exception ends it as it would end Python."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        job(task)
    finally:
        log.with_suffix(".json").write_text(json.dumps(origins()))


def main() -> None:
    for task in json.loads(sys.argv[1]):
        start = time.time()
        process = os.fork()
        if process == 0:
            child(task, Path(task["log"]))
            return
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        sys.stdout.write(json.dumps({"name": task["name"], "status": status, "seconds": time.time() - start}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
