# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A weights file that was made to harm is refused wherever a run reads one, and its code never runs."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from networks.backbone import Backbone
from workflow.checkpoint import Checkpoints
from workflow.weights import WeightsError, WeightsLoader, read_weights

from bundles.rsna_cnn_lstm.scripts.ensemble import EnsembleInferer
from bundles.voco2d_pretrain.scripts.network import VoCoNetwork
from bundles.voco2d_pretrain.scripts.teacher import StudentWeights

TINY = "test_efficientnet"


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.marker}'",)


def engine() -> Engine:
    return Engine(lambda *_: None)


def checkpoint(folder: Path, extra: object) -> dict:
    """A full checkpoint as `Checkpoints` wants it, with something more in the optimizer's place."""
    return {"network": Backbone(TINY).state_dict(), "optimizer": extra, "trainer": {}, "random": {}}


# name -> what writes the file, given its path and the marker that its code would leave
FILES: dict[str, Callable[[Path, Path], object]] = {
    "code": lambda path, marker: torch.save({"a": torch.zeros(1), "b": Malicious(marker)}, path),
    "code in a checkpoint": lambda path, marker: torch.save(checkpoint(path.parent, Malicious(marker)), path),
    "code in a plain pickle": lambda path, marker: path.write_bytes(pickle.dumps(Malicious(marker))),
    "code in a pickle of an older protocol": lambda path, marker: path.write_bytes(pickle.dumps(Malicious(marker), 2)),
    "code in the old format": lambda path, marker: torch.save(
        {"a": Malicious(marker)}, path, _use_new_zipfile_serialization=False
    ),
}


@pytest.fixture(params=FILES)
def evil(request, tmp_path) -> Path:
    path = tmp_path / "checkpoint_7.pt"
    FILES[request.param](path, tmp_path / "marker")
    return path


READERS: dict[str, Callable[[Path], object]] = {
    "model.pt": read_weights,
    "pretrained_path of the classifier, weights of the pretraining's inference and evaluation": lambda path: (
        WeightsLoader(str(path), Backbone(TINY))(engine())
    ),
    "pretrained_path of the pretraining": lambda path: StudentWeights(
        VoCoNetwork(Backbone(TINY), hidden=8, out=8), str(path)
    )(engine()),
    "weights of the classifier's inference and evaluation": lambda path: EnsembleInferer(
        Backbone(TINY), str(path)
    ).load(engine()),
    "resume": lambda path: resumed(path, str(path)),
    "resume latest": lambda path: resumed(path, "latest"),
}


def resumed(path: Path, resume: str) -> None:
    trainer = engine()
    Checkpoints(str(path.parent), {"network": Backbone(TINY)}, resume=resume).attach(trainer)
    trainer.run([0])


@pytest.mark.parametrize("reader", READERS)
def test_code_is_refused_by_every_reader_and_never_runs(evil, tmp_path, reader):
    with pytest.raises(WeightsError, match=r"checkpoint_7.pt: refused, it holds more than tensors") as caught:
        READERS[reader](evil)
    # a pickle of Python's newest protocols is not even read as far as the name
    assert "posix.system" in str(caught.value) or "Unsupported operand" in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice is to switch it off
    assert not (tmp_path / "marker").exists()


def test_the_code_is_code(evil, tmp_path):
    with evil.open("rb") as file:
        try:
            torch.load(file, weights_only=False)
        except (RuntimeError, pickle.UnpicklingError):
            file.seek(0)
            pickle.load(file)
    assert (tmp_path / "marker").exists()


def test_one_bad_file_of_an_ensemble_is_refused(evil, tmp_path):
    torch.save(Backbone(TINY).state_dict(), tmp_path / "good.pt")
    with pytest.raises(WeightsError, match=r"checkpoint_7.pt: refused"):
        EnsembleInferer(Backbone(TINY), [str(tmp_path / "good.pt"), str(evil)]).load(engine())
    assert not (tmp_path / "marker").exists()


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1 << 24)}, tmp_path / "plain.pt")
    assert read_weights(tmp_path / "plain.pt")["a"].numel() == 1 << 24
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    assert (tmp_path / "bomb.pt").stat().st_size < 1_000_000
    with pytest.raises(WeightsError, match=r"bomb.pt: refused, a file of \d+ bytes that unpacks to 67\d{6}"):
        read_weights(tmp_path / "bomb.pt")


def test_a_tensor_that_claims_more_than_it_stores_takes_no_memory(tmp_path):
    state = Backbone(TINY).state_dict()
    state["model.conv_stem.weight"] = torch.zeros(1).expand(1 << 40)
    torch.save(state, tmp_path / "claims.pt")
    with pytest.raises(WeightsError, match=r"1 of another shape \(such as model.conv_stem.weight\)"):
        WeightsLoader(str(tmp_path / "claims.pt"), Backbone(TINY))(engine())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    torch.save(Backbone(TINY).state_dict(), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=r"cut.pt: not readable as a weights file"):
        read_weights(tmp_path / "cut.pt")


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x07",
        struct.pack("<Q", 2**63 - 1) + b"{}",
        struct.pack("<Q", 1 << 40) + b"{" * 100,
        safetensors(b"\xff\xfe not json"),
        safetensors(b"[" * 100_000),
        safetensors({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}, b"\0" * 4),
        safetensors({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}),
        safetensors({"a": {"dtype": "CODE", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 400),
    ],
    ids=["empty", "one byte", "header of 2^63", "header beyond the end", "no text", "deep", "beyond the end",
         "overflow", "negative", "unknown kind", "a hidden tail"],
)  # fmt: skip
def test_an_absurd_safetensors_header_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model.safetensors: not readable as a safetensors file"):
        read_weights(path)


# --- the only doors ---


def sources(root: Path) -> Iterator[tuple[str, ast.AST]]:
    for folder in ("transforms", "workflow", "networks", "bundles", "demo", "benchmarks", "tools", "apps"):
        for path in sorted((root / folder).rglob("*.py")):
            yield str(path.relative_to(root)), ast.parse(path.read_text(encoding="utf-8"))


UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
LOADERS = {"torch.load", "np.load", "numpy.load", "torch.jit.load", "torch.hub.load", "monai.bundle.load"}
HIDDEN = {"load", "load_state_dict_from_url", "CheckpointLoader", "load_checkpoint", "load_state_dict_from_hf"}


def unsafe(tree: ast.AST) -> Iterator[str]:
    """Ways to read a file that could run code, or to have one without its module's name before it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom):
            unnamed = [alias.name for alias in node.names if alias.name in HIDDEN]
            yield from (f"from {node.module} import {name}" for name in unnamed)
            if node.module in UNSAFE_MODULES:
                yield f"from {node.module}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            yield ast.unparse(node)


def safe_calls(tree: ast.AST) -> Iterator[str]:
    wanted = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in wanted:
            option, value = wanted[name]
            given = [k.value for k in node.keywords if k.arg == option]
            # numpy's default is the safe one; torch's is said each time
            if [ast.literal_eval(v) for v in given] == [value] or (not given and name == "np.load"):
                yield name


def test_every_file_is_read_without_running_it(root):
    found = {path: list(unsafe(tree)) for path, tree in sources(root)}
    assert len(found) > 60
    for path, tree in sources(root):
        if path == "workflow/weights.py":
            found[path].remove("import pickle")  # for its exception
        for name in safe_calls(tree):
            found[path].remove(name)
    assert {path: names for path, names in found.items() if names} == {}
    weights = ast.parse((root / "workflow" / "weights.py").read_text(encoding="utf-8"))
    attributes = [node for node in ast.walk(weights) if isinstance(node, ast.Attribute)]
    assert [ast.unparse(node) for node in attributes if node.attr in ("load", "loads")] == ["torch.load"]
    assert {ast.unparse(node) for node in attributes if ast.unparse(node.value) == "pickle"} == {
        "pickle.UnpicklingError"
    }


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "f = torch.load", "import pickle",
        "from pickle import load", "from torch import load", "torch.jit.load(path)",
        "from monai.handlers import CheckpointLoader", "from monai.bundle import load", "np.load(p, allow_pickle=True)",
    ],
)  # fmt: skip
def test_an_unsafe_door_is_found(text):
    tree = ast.parse(text)
    assert len(list(unsafe(tree))) > len(list(safe_calls(tree)))


def test_safe_calls_are_known():
    tree = ast.parse("torch.load(p, weights_only=True); np.load(p); np.load(p, allow_pickle=False)")
    assert sorted(safe_calls(tree)) == ["np.load", "np.load", "torch.load"]
