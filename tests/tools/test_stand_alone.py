# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The zips, unpacked where there is no repository: train, pack again with what was trained, evaluate, infer, export,
load, push; then the unit tests in the zoo's form, in the zoo's layout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from monai.apps.utils import extractall

from tests.tools.hub import stand_in_hub
from tools.bundle_weights import default_network
from tools.pack import BUNDLES, copy_unit_tests, pack

pytestmark = pytest.mark.slow

VOCO, RSNA = BUNDLES
PARTS = ("networks", "transforms", "workflow")
SMALL = {  # the default network, on small volumes
    VOCO: {"volume_size": [96, 96, 8], "crop_size": [32, 32], "num_slices": 2, "hidden_size": 32, "num_workers": 0},
    RSNA: {"volume_size": [72, 72, 8], "image_size": [64, 64], "num_slices": 4, "num_workers": 0, "num_folds": 2},
}


def command(kind: str, *configs: str, **overrides: object) -> list[str]:
    """Words of `python -m monai.bundle run`; the config files as they are named in a bundle."""
    files = [f"{kind}/configs/{name}.json" if kind else f"configs/{name}.json" for name in configs]
    pairs = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
    return ["run", "--config_file", str(files) if len(files) > 1 else files[0], *pairs]


def alone(root: Path, logs: Path, jobs: Sequence[dict[str, Any]], **environment: str) -> None:
    """Run jobs of stand_alone.py in an environment that knows nothing of the repository; all must succeed."""
    logs.mkdir(exist_ok=True)
    jobs = [{**job, "cwd": str(job["cwd"]), "log": str(logs / f"{job['name']}.log")} for job in jobs]
    script = (root / "tests" / "tools" / "stand_alone.py").read_text(encoding="utf-8")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("COV")}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(jobs)], cwd=logs, env={**clean, **environment},
                          capture_output=True, text=True, timeout=1200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert [result["name"] for result in results] == [job["name"] for job in jobs]
    for result, job in zip(results, jobs, strict=True):
        assert result["status"] == 0, f"{job['name']}: {Path(job['log']).read_text()[-4000:]}"
        found = json.loads(Path(job["log"]).with_suffix(".json").read_text())
        assert all(str(root) not in place for place in found.values()), found


@pytest.fixture(scope="module")
def few(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third of the phantoms: the default network is no small one."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("train.csv", "train_series_meta.csv"):
        table = pd.read_csv(phantoms / name, dtype={"patient_id": str, "series_id": str})
        patients = sorted(table["patient_id"].unique())[:8]
        table[table["patient_id"].isin(patients)].to_csv(folder / name, index=False)
    (folder / "train_images").mkdir()
    for patient in patients:
        (folder / "train_images" / patient).symlink_to(phantoms / "train_images" / patient)
    return folder


@pytest.fixture(scope="module")
def trained(root: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both bundles packed without weights: one epoch, one from its own folder, one from another."""
    top = tmp_path_factory.mktemp("without_weights")
    jobs = []
    unwanted = shutil.ignore_patterns("__pycache__", "models")
    for folder in ("bundles", *PARTS):
        shutil.copytree(root / folder, top / "repository" / folder, symlinks=True, ignore=unwanted)
    for name in BUNDLES:
        extractall(pack(name, top / "dist", root=top / "repository"), top / "unpacked")
        paths = {"dataset_dir": few, "output_root": top / name, "run_name": "train", "max_epochs": 1}
        folder = top / "unpacked" / name
        if name == VOCO:
            jobs.append({"name": name, "cwd": folder, "argv": command("", "train", **paths, **SMALL[name])})
        else:
            argv = command(str(folder), "train", bundle_root=folder, **paths, **SMALL[name])
            jobs.append({"name": name, "cwd": top, "argv": argv})
    alone(root, top / "logs", jobs)
    return top


@pytest.fixture(scope="module")
def unpacked(root: Path, trained: Path) -> Path:
    """Both bundles with the weights that their packed code trained."""
    for name in BUNDLES:
        weights = trained / name / "train" / "model.pt"
        extractall(pack(name, trained / "with", weights=weights, allow_config_mismatch=True), trained / "complete")
    return trained / "complete"


@pytest.fixture(scope="module")
def used(root: Path, trained: Path, unpacked: Path, few: Path) -> Path:
    """What the unpacked bundles gave when they were evaluated, run on a series, exported and loaded."""
    series = sorted((few / "train_images").glob("*/*"))[0]
    (checkpoint,) = (trained / VOCO / "train" / "checkpoints").iterdir()
    out, jobs = trained / "used", []
    for name in BUNDLES:
        folder, sizes = unpacked / name, SMALL[name]
        more = {"checkpoint": checkpoint} if name == VOCO else {"n_resamples": 20}
        arguments = {"dataset_dir": few, "output_root": out / name, "run_name": "evaluate", **sizes, **more}
        jobs.append({"name": f"evaluate_{name}", "cwd": folder, "argv": command("", "train", "evaluate", **arguments)})
        known = json.loads((folder / "configs" / "inference.json").read_text(encoding="utf-8"))
        arguments = {"dataset_dir": series, "output_root": out / name, "run_name": "infer", **sizes}
        arguments = {key: value for key, value in arguments.items() if key in known and key != "hidden_size"}
        # from another folder too: there the weights' default follows bundle_root
        argv = command(str(folder), "inference", bundle_root=folder, **arguments)
        jobs.append({"name": f"infer_{name}", "cwd": trained, "argv": argv})
        files = ["--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json"]
        argv = ["ckpt_export", "--net_id", "network_def", "--filepath", out / f"{name}.ts", "--ckpt_file",
                "models/model.pt", *files]  # fmt: skip
        jobs.append({"name": f"export_{name}", "cwd": folder, "argv": list(map(str, argv))})
        schema = str(trained / f"{name}_schema.json")
        argv = ["verify_metadata", "--meta_file", "configs/metadata.json", "--filepath", schema]
        shutil.copy(root / "tests" / "data" / "meta_schema_20240725.json", schema)  # MONAI takes a file that is there
        jobs.append({"name": f"metadata_{name}", "cwd": folder, "argv": argv})
        argv = ["verify_net_in_out", "--net_id", "network_def", *files, "--bundle_root", str(folder)]
        jobs.append({"name": f"network_{name}", "cwd": folder, "argv": argv})
        loading = {"name": name, "folder": str(unpacked)}
        jobs.append({"name": f"load_{name}", "cwd": folder, "call": "same_weights", "arguments": loading})
    folders = [str(unpacked / name) for name in BUNDLES]
    for order, names in (("", folders), ("_reversed", folders[::-1])):
        jobs.append({"name": f"both{order}", "cwd": trained, "call": "both", "arguments": {"folders": names}})
    before = {path: path.stat().st_mtime_ns for path in unpacked.rglob("*") if "__pycache__" not in path.parts}
    alone(root, trained / "logs", jobs)
    after = {path for path in unpacked.rglob("*") if "__pycache__" not in path.parts}
    assert after == set(before)  # nothing is written where a bundle lies
    return out


def test_training_ran_on_the_packed_code(trained: Path) -> None:
    for name in BUNDLES:
        assert json.loads((trained / name / "train" / "run.json").read_text())["result"] == "completed"
        found = json.loads((trained / "logs" / f"{name}.json").read_text())
        assert set(found) >= {*PARTS, "scripts"}
        assert all(Path(place).parent == (trained / "unpacked" / name).resolve() for place in found.values())


def test_evaluation_and_inference_with_the_packed_weights(used: Path) -> None:
    assert json.loads((used / RSNA / "evaluate" / "metrics.json").read_text())["patients"] == 4
    assert (used / VOCO / "evaluate" / "metrics.csv").is_file()
    assert len(pd.read_csv(used / RSNA / "infer" / "predictions.csv")) == 1
    index = pd.read_csv(used / VOCO / "infer" / "embeddings.csv")
    assert np.load(used / VOCO / "infer" / index["file"][0])["volume"].shape == (1280,)


def test_the_zoos_verification_of_metadata_and_network_passes(used: Path) -> None:
    """The two commands of MONAI that verify_bundle.py runs in full mode besides loading and exporting."""
    for name in BUNDLES:
        logs = used.parent / "logs"
        assert "metadata is verified with no error" in (logs / f"metadata_{name}.log").read_text()
        assert "data shape of network is verified with no error" in (logs / f"network_{name}.log").read_text()


def test_exported_networks_answer_as_the_packed_weights_do(root: Path, used: Path, unpacked: Path) -> None:
    inputs = {VOCO: torch.rand(2, 1, 64, 64), RSNA: torch.rand(1, 1, 64, 64, 3)}
    for name in BUNDLES:
        network = default_network(root, name).eval()
        network.load_state_dict(torch.load(unpacked / name / "models" / "model.pt", weights_only=True))
        # compiling takes longer than it saves
        with torch.no_grad(), torch.jit.optimized_execution(False):
            exported = torch.jit.load(used / f"{name}.ts").eval()(inputs[name])
            torch.testing.assert_close(exported, network(inputs[name]), rtol=0, atol=1e-5)


def test_vendored_packages_are_of_one_version_and_those_of_the_repository(root: Path, unpacked: Path) -> None:
    versions = set()
    for name in BUNDLES:
        for part in PARTS:
            text = (unpacked / name / part / "__init__.py").read_text(encoding="utf-8")
            versions |= set(re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)) or {f"none in {part}"}
            for path in (root / part).rglob("*.py"):
                assert (unpacked / name / part / path.relative_to(root / part)).read_bytes() == path.read_bytes()
        versions.add(json.loads((unpacked / name / "configs" / "metadata.json").read_text())["version"])
    assert len(versions) == 1, versions


def test_a_packed_bundle_is_pushed_as_it_is_with_a_model_card(root: Path, unpacked: Path, tmp_path: Path) -> None:
    """`push_to_hf_hub` up to the network, where a stand-in on 127.0.0.1 answers as the Hub."""
    folder = Path(shutil.copytree(unpacked / VOCO, tmp_path / VOCO, ignore=shutil.ignore_patterns("__pycache__")))
    expected = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    argv = ["monai.bundle", "push_to_hf_hub", "--repo", "me/bundle", "--name", VOCO, "--bundle_dir", str(tmp_path),
            "--token", "hf_none", "--version", "0.0.1"]  # fmt: skip
    with stand_in_hub() as hub:
        job = {"name": "push", "cwd": tmp_path, "program": "fire", "argv": argv}
        alone(root, tmp_path / "logs", [job], HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "home"), NO_PROXY="*")
    card = hub.files.pop("README.md").decode()
    assert hub.files == expected
    assert card.startswith("---\ntags:\n- monai\n- medical\nlibrary_name: monai\nlicense: apache-2.0\n---\n")
    assert card.endswith(expected["docs/README.md"].decode())
    assert hub.tags == ["0.0.1"]
    assert {token for _, token in hub.requests} == {"Bearer hf_none"}


@pytest.mark.parametrize("test", [f"test_{name}{suffix}.py" for name in BUNDLES for suffix in ("", "_dist")])
def test_unit_tests_pass_in_the_layout_of_the_zoo(root: Path, unpacked: Path, test: str, tmp_path: Path) -> None:
    for name in BUNDLES:
        copy_unit_tests(name, tmp_path)
        shutil.copytree(unpacked / name, tmp_path / "models" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "tests" / "tools" / "zoo_utils.py", tmp_path / "ci" / "unit_tests" / "utils.py")
    before = set((tmp_path / "models").rglob("*"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    environment |= {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-B", "-m", "unittest", "discover", "-s", "ci/unit_tests", "-p", test]
    done = subprocess.run(words, cwd=tmp_path, env=environment | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert f"Ran {1 if 'dist' in test else 2} test" in done.stderr
    assert set((tmp_path / "models").rglob("*")) == before  # nothing is written where the bundle lies
