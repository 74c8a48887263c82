# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The exported network gives what PyTorch gives: TorchScript, ONNX, torch.export; TensorRT as far as a CPU can tell."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn
from workflow import tensorrt
from workflow.tensorrt import TensorRTError, with_engine

SMALL = {"backbone_name": "test_efficientnet"}
RSNA = {**SMALL, "hidden_size": 16}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "rsna_cnn_lstm": [
        RSNA,
        {**RSNA, "rnn_type": "gru", "slice_pool": "attention", "pool": "gem"},
        {**RSNA, "slice_pool": "mean", "pool": "attention", "neighbours": 1},
        {**RSNA, "rnn_type": "gru", "slice_pool": "max", "pool": "both", "normalise": False},
        {},
    ],
    "voco2d_pretrain": [*({**SMALL, "pool": pool} for pool in ("avg", "max", "both", "gem", "attention")), {}],
}
bundles = pytest.mark.parametrize("bundle", sorted(VARIANTS))


def converter(root: Path, bundle: str) -> str:
    """MONAI's converter_kwargs as the README has them."""
    text = (root / "bundles" / bundle / "docs" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(python -m monai.bundle onnx_export.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    words = shlex.split(blocks[0].replace("\\\n", " "))
    assert words[words.index("--use_trace") + 1] == "True"
    return words[words.index("--converter_kwargs") + 1]


def export(root: Path, bundle: str, folder: Path, variants: list[dict[str, Any]], *, thorough: bool) -> list[Any]:
    """Results of export_bundle.py, one a variant."""
    program = (Path(__file__).parent / "export_bundle.py").read_text(encoding="utf-8")
    arguments = {"out": str(folder / "found.json"), "root": str(folder), "variants": variants,
                 "converter": converter(root, bundle), "thorough": thorough}  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program, json.dumps(arguments)], cwd=root / "bundles" / bundle,
                          env=environment, capture_output=True, text=True, timeout=1200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    assert len(found) == len(variants)
    for result in found:
        assert result["spread"] > 5e-4, result  # the output depends on the input, by more than is allowed
    return found


def test_monais_commands_export_the_network(root: Path, tmp_path: Path) -> None:
    (result,) = export(root, "rsna_cnn_lstm", tmp_path, [RSNA], thorough=False)
    assert len(result["torchscript"]) == len(result["onnx"]) == 4
    assert max(result["torchscript"] + result["onnx"]) < 1e-4, result


@pytest.mark.slow
@bundles
def test_exported_networks_are_the_network(root: Path, bundle: str, tmp_path: Path) -> None:
    for result in export(root, bundle, tmp_path, VARIANTS[bundle], thorough=True):
        exported = [result["torchscript"], result["onnx"], result["tensorrt_onnx"], result["torch_export"]["fixed"]]
        assert all(len(values) >= 3 for values in exported), result
        assert max(max(values) for values in exported) < 1e-4, result
        free = result["torch_export"]["free"]
        if bundle == "rsna_cnn_lstm":
            assert "specialized it to be a constant" in free, free
        else:
            assert max(free) < 1e-4, free


# --- TensorRT: unmeasured, there is no GPU here ---


def test_tensorrt_is_refused_clearly_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    packages = ", ".join(f"the package {name}" for name in ("tensorrt", "polygraphy", "onnx", "cuda-python"))
    message = f"needs a CUDA device, {packages}: leave it out"
    with pytest.raises(TensorRTError, match=message):
        with_engine(nn.Identity(), "engine", [1, 2, 2])


def test_tensorrt_gets_what_the_config_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: name)
    monkeypatch.setattr(tensorrt, "trt_compile", lambda net, path, **more: given.update(path=path, **more) or net)
    network = nn.Identity()
    options = {"submodule": "backbone", "precision": "fp32"}
    assert with_engine(network, tmp_path / "backbone", [1, 4, 4], weights=["a"], **options) is network
    assert given == {
        "path": str(tmp_path / "backbone"), "submodule": "backbone",
        "args": {"precision": "fp32", "dynamic_batchsize": [1, 4, 4], "export_args": {"dynamo": False}},
    }  # fmt: skip
    with pytest.raises(TensorRTError, match="an engine holds those of one file, got 2"):
        with_engine(network, "engine", [1, 4, 4], weights=["a", "b"])


@bundles
def test_tensorrt_config_changes_the_network_alone(root: Path, bundle: str) -> None:
    configs = root / "bundles" / bundle / "configs"
    plain = ConfigParser.load_config_file(str(configs / "inference.json"))
    merged = ConfigParser.load_config_files([str(configs / f"{name}.json") for name in ("inference", "inference_trt")])
    changed = {name for name in merged if merged[name] != plain.get(name)}
    assert changed == {"_desc_", "trt_precision", "amp", "network", "run"}
    assert [item for item in merged["run"] if item != "$@network"] == plain["run"]
    references = set(re.findall(r"@(\w+)", json.dumps(merged["network"])))
    assert references <= set(merged)
