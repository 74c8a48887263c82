# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""MONAI's federated client drives the classifier: the README's rounds of two hospitals, held against a slow mean."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser
from monai.fl.client.monai_algo import disable_ckpt_loaders
from networks import Backbone

CONFIGS = "bundles/rsna_cnn_lstm/configs"
SMALL = {
    "backbone_name": "test_efficientnet", "device": "cpu", "num_workers": 0, "volume_size": [40, 40, 8],
    "image_size": [32, 32], "num_slices": 4, "hidden_size": 16, "num_folds": 3, "batch_size": 4,
}  # fmt: skip
# The README's block, with every exchange written down; and what must fail
RECORDED = """
import json, logging, pathlib
logging.basicConfig(level=logging.INFO)
SENT, GIVEN = [], []
_train, _get = MonaiAlgo.train, MonaiAlgo.get_weights
def train(self, data, extra=None):
    SENT.append({k: v.clone() for k, v in data.weights.items()})
    _train(self, data, extra)
def get_weights(self, extra=None):
    found = _get(self, extra)
    GIVEN.append({k: v.clone() for k, v in found.weights.items()})
    return found
MonaiAlgo.train, MonaiAlgo.get_weights = train, get_weights
"""
REPORT = """
torch.save({"sent": SENT, "given": GIVEN, "final": weights}, "OUT/exchanged.pt")
trainer = clients[0].trainer
found = {"scores": scores, "epoch": trainer.state.epoch, "iteration": trainer.state.iteration,
         "length": trainer.state.epoch_length, "rate": trainer.optimizer.param_groups[0]["lr"]}
SETTINGS["learning_rat"] = 1.0
try:
    client("hospital_c")
except SystemExit as error:
    found["refused"] = [error.code, str(error)]
pathlib.Path("OUT/found.json").write_text(json.dumps(found))
"""


def hospitals(phantoms: Path, folder: Path) -> None:
    """Two trees with every other patient each."""
    patients = pd.read_csv(phantoms / "train.csv")["patient_id"].tolist()
    for number, name in enumerate(("hospital_a", "hospital_b")):
        own = patients[number::2]
        (folder / name / "train_images").mkdir(parents=True)
        for table in phantoms.glob("*.csv"):
            rows = pd.read_csv(table)
            rows[rows["patient_id"].isin(own)].to_csv(folder / name / table.name, index=False)
        for patient in own:
            (folder / name / "train_images" / str(patient)).symlink_to(phantoms / "train_images" / str(patient))


@pytest.mark.slow
def test_two_rounds_of_the_readme(root, phantoms, tmp_path):
    data, out = tmp_path / "data", tmp_path / "output"
    hospitals(phantoms, data)
    backbone = Backbone("test_efficientnet").state_dict()
    torch.save(backbone, tmp_path / "backbone.pt")
    text = (root / "bundles" / "rsna_cnn_lstm" / "docs" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    small = {**SMALL, "pretrained_path": str(tmp_path / "backbone.pt"), "cache_dir": str(tmp_path / "cache")}
    block = block.replace("/workspace", str(tmp_path)).replace("\nROUNDS", f"\n{RECORDED}\nROUNDS", 1)
    block = block.replace("\nCONFIGS", f"\nSETTINGS |= {small!r}\nCONFIGS", 1) + REPORT.replace("OUT", str(tmp_path))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"COVERAGE_PROCESS_START": str(root / "pyproject.toml"), "COVERAGE_FILE": str(root / ".coverage")}
    done = subprocess.run([sys.executable, "-c", block], cwd=root / "bundles" / "rsna_cnn_lstm", env=environment,
                          capture_output=True, text=True, timeout=900)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    check_exchange(torch.load(tmp_path / "exchanged.pt", weights_only=True), backbone)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert all(0 < score < 5 for score in found["scores"])
    assert (found["epoch"], found["iteration"]) == (2, 2 * found["length"])
    assert found["rate"] == pytest.approx(0, abs=1e-9)  # one schedule over all rounds, at its end
    assert found["refused"][0] == 2
    assert found["refused"][1].startswith("unknown override 'learning_rat': did you mean learning_rate")
    assert {path.name for path in out.iterdir()} == {f"hospital_{n}{s}" for n in "ab" for s in ("", "_scores")}
    check_runs(out)


def check_exchange(exchanged: dict, backbone: dict) -> None:
    """Clients 0 and 1 train in turn in each of two rounds, from the mean of what both gave before."""
    sent, (first, *given) = exchanged["sent"], exchanged["given"]
    assert all(torch.equal(first[f"backbone.{name}"], tensor) for name, tensor in backbone.items())
    for name, tensor in first.items():
        assert torch.equal(sent[0][name], tensor)
        for round_, after in ((0, sent[2]), (1, exchanged["final"])):
            a, b = given[2 * round_][name], given[2 * round_ + 1][name]
            assert torch.equal(sent[2 * round_][name], sent[2 * round_ + 1][name])
            torch.testing.assert_close(after[name].double(), ((a.double() + b.double()) / 2).to(a.dtype).double())
    trained = "head.weight" if "head.weight" in first else next(n for n in first if n.endswith("weight"))
    # two hospitals learn different things, and the second round goes on from the mean
    assert not torch.equal(given[0][trained], given[1][trained])
    assert not torch.equal(given[2][trained], sent[2][trained])
    pretrained = next(f"backbone.{n}" for n, tensor in backbone.items() if tensor.ndim == 4)
    assert not torch.equal(sent[2][pretrained], first[pretrained])


def check_runs(out: Path) -> None:
    for name in ("hospital_a", "hospital_b"):
        for folder in (out / name, out / f"{name}_scores"):
            assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["result"] == "completed"
            assert {"config.json", "log.txt", "model.pt"} <= {path.name for path in folder.iterdir()}
        assert (out / name / "training_patients.json").is_file()
        config = json.loads((out / name / "config.json").read_text(encoding="utf-8"))
        assert (config["run_name"], config["train"]["trainer"]["max_epochs"]) == (name, 1)
    # each log has all lines of this process from its run's start on: hospital_b's begins after hospital_a's weights.
    # They come before the first round, and never over the server's
    logs = {path.name: (path / "log.txt").read_text(encoding="utf-8") for path in out.iterdir()}
    assert logs["hospital_b"].count("backbone tensors loaded") == 1
    assert "backbone tensors loaded" not in logs["hospital_b_scores"]


def test_the_overlay_replaces_the_handler_that_loads_pretrained_weights(root):
    """By its position, since a list has no names: at each round it would put the pretraining over the server's mean."""
    train = ConfigParser.load_config_files([str(root / CONFIGS / "train.json")])
    loader = train["train"]["handlers"][0]
    both = ConfigParser.load_config_files([str(root / CONFIGS / name) for name in ("train.json", "federated.json")])
    assert loader["_target_"] == "workflow.weights.WeightsLoader"
    assert both["starting_weights"] == loader
    assert both["train"]["handlers"][0] == {**loader, "_disabled_": True}
    steps = {step for part in (both["engine_device"], both["train"]["trainer"], both["validate"]["evaluator"])
             for step in part["_requires_"]}  # fmt: skip
    missing = [step for step in train["run"][:-1] if step not in steps and "run_folder.start" not in step]
    assert not missing  # whatever `run` does before it trains is done here too


def test_an_evaluation_scores_the_servers_weights_and_not_those_of_a_file(root):
    parser = ConfigParser()
    parser.read_config([str(root / CONFIGS / name) for name in ("train.json", "evaluate.json")])
    assert "@validate#inferer" not in parser["validate#handlers"]
    disable_ckpt_loaders(parser)
    loading = [h for h in parser["validate#handlers"] if "inferer" in h]
    assert [h["_disabled_"] for h in loading] == [True]
