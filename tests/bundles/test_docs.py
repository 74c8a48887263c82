# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The bundles' documents: sections of the zoo's template, a configuration table that says what train.json says, and
commands that run as they stand there (on synthetic data, made small by further overrides)."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from networks import Backbone
from workflow.guard import RUN_ARGUMENTS

from tests.bundles.readme_workspace import workspace

BUNDLES = ("voco2d_pretrain", "rsna_cnn_lstm")
SECTIONS = (
    "**Authors**", "**Tags**", "**Model Description**", "Input", "Output", "**Data**", "**Preprocessing**",
    "**Performance**", "**Additional Usage Steps**", "Execute training", "Go on with an interrupted run:",
    "Override the `train` config to execute multi-GPU training:",
    "Override the `train` config to execute evaluation with the trained model:", "Execute inference:",
    "Override examples", "Tracking", "Export to TorchScript", "Configuration", "**System Configuration**",
    "**Limitations**", "**Citation Info**", "**References**", "**License**",
)  # fmt: skip
TABLE = re.compile(r"<!-- configuration table -->\n(.*)<!-- end of the configuration table -->", re.DOTALL)

# flags of torchrun, of the exports and of run_workflow
OTHERS = {"standalone", "nnodes=1", "nproc_per_node=2", "net_id", "filepath", "ckpt_file", "use_trace",
          "converter_kwargs", "workflow_name"}  # fmt: skip
# The commands are those of the README; each of these is added where the command does not set it itself.
SMALL = {"max_epochs": 1, "num_workers": 0, "device": "cpu", "backbone_name": "test_efficientnet", "num_slices": 4}
NETWORK = {
    "voco2d_pretrain": {"volume_size": "[48,48,8]", "hidden_size": 16, "crop_size": "[16,16]"},
    "rsna_cnn_lstm": {"volume_size": "[40,40,8]", "hidden_size": 16, "image_size": "[32,32]"},
}
FINER = {"crop_size": "[64,64]", "num_slices": 2, "batch_size": 8}  # the finer grid of its example fills its volume
THREE_D = {"volume_size": "[48,48,16]", "crop_size": "[16,16,16]"}
SWIN = {
    "voco2d_pretrain": {"volume_size": "[192,192,4]", "crop_size": "[64,64]", "num_slices": 1},
    "rsna_cnn_lstm": {"volume_size": "[192,192,4]", "image_size": "[192,192]", "num_slices": 1},
}


def readme(root: Path, bundle: str) -> str:
    return (root / "bundles" / bundle / "docs" / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """The blocks of fenced bash, in their order."""
    return re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def words(block: str) -> list[str]:
    return shlex.split(block.replace("\\\n", " "))


def config_files(arguments: list[str]) -> list[str]:
    value = arguments[arguments.index("--config_file") + 1]
    return re.findall(r"configs/\w+\.json", value)


def configuration_table(train: dict) -> str:
    """The rows that the README must have: name, default and line of `_desc_` of all that a user may change."""
    names = list(train)
    names = names[names.index("bundle_root") : names.index("is_not_rank0")]
    rows = [f"| `{name}` | `{json.dumps(train[name])}` | {train['_desc_'][name]} |" for name in names]
    return "\n".join(["| name | default | meaning |", "|---|---|---|", *rows]) + "\n"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_sections(root: Path, bundle: str) -> None:
    text = readme(root, bundle)
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    positions = [next((i for i, h in enumerate(headings) if h.startswith(section)), None) for section in SECTIONS]
    absent = [section for section, position in zip(SECTIONS, positions, strict=True) if position is None]
    assert not absent
    assert positions == sorted(positions)
    assert "Not for diagnostic use" in text
    assert "TorchScript" in text
    assert "TensorRT" in text
    anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    assert {link for link in re.findall(r"\]\(#([^)]+)\)", text)} <= anchors
    longest = max((line for line in text.splitlines() if not line.startswith("|")), key=len)
    assert len(longest) <= 120, longest


@pytest.mark.parametrize("bundle", BUNDLES)
def test_configuration_table_is_that_of_train_json(root: Path, bundle: str) -> None:
    train = json.loads((root / "bundles" / bundle / "configs" / "train.json").read_text(encoding="utf-8"))
    found = TABLE.search(readme(root, bundle))
    assert found is not None
    assert found.group(1).strip().splitlines() == configuration_table(train).strip().splitlines()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_commands_name_what_exists(root: Path, bundle: str) -> None:
    """Without running them: config files, overrides and paths."""
    folder = root / "bundles" / bundle
    blocks = commands(readme(root, bundle))
    used = set()
    for block in blocks:
        for command in re.split(r"\n(?=python|torchrun)", block):
            arguments = words(command)
            if "monai.bundle" not in arguments:
                continue
            files = config_files(arguments)
            used |= set(files)
            assert files
            assert all((folder / name).is_file() for name in files)
            parser = ConfigParser()
            parser.read_config([str(folder / name) for name in files])
            flags = {word[2:] for word in arguments if word.startswith("--")}
            flags -= OTHERS
            assert flags <= {*parser.get()["_desc_"], *RUN_ARGUMENTS}, command
            paths = re.findall(r"(?<![\w.])/\w[\w./-]*", command)
            assert all(re.match(r"/workspace/(data|output)\b", path) for path in paths), paths
    # `sh` blocks take several machines and stand-ins (test_torchrun.py), `python` blocks have tests of their own
    for block in re.findall(r"^```(?:sh|python)\n(.*?)^```$", readme(root, bundle), re.DOTALL | re.MULTILINE):
        files = re.findall(r"configs/\w+\.json", block)
        assert all((folder / name).is_file() for name in files)
        used |= set(files)
    runnable = {path.name for path in (folder / "configs").glob("*.json")} - {"metadata.json", "labels.json"}
    assert used == {f"configs/{name}" for name in runnable}


def test_licence_of_every_data_set_is_stated(root: Path) -> None:
    samples = (root / "tests" / "data" / "README.md").read_text(encoding="utf-8")
    sources = {doi.lower().rstrip("|. ") for doi in re.findall(r"10\.7937/\S+", samples)}
    assert len(sources) == 4
    for bundle in BUNDLES:
        text = (root / "bundles" / bundle / "docs" / "data_license.txt").read_text(encoding="utf-8")
        assert "contains no images" in text
        assert max(map(len, text.splitlines())) <= 120
        said = " ".join(text.split())  # true of a packed bundle too, whatever weights and card it holds
        assert (
            f"those whose sha256 bundles/{bundle}/models/MODEL_CARD.md of the project's repository names, were" in said
        )
        assert "Any other weights in models/ come from whoever packed them" in said
        assert "https://www.kaggle.com/competitions/rsna-2023-abdominal-trauma-detection" in text
        assert "https://codalab.lisn.upsaclay.fr/competitions/12239" in text
        assert all(f"https://doi.org/{doi}" in text.lower() for doi in sources)
        sections = re.split(r"^\d\. .*\n-+\n", text, flags=re.MULTILINE)[1:]
        assert re.findall(r"^\d\. (\w+ ?\d*)", text, flags=re.MULTILINE) == ["RSNA 2023", "FLARE 2023", "CT "]
        for section in sections:
            assert {"Use here:", "Provider:", "Terms:"} <= set(re.findall(r"^\w[\w ]*:", section, flags=re.MULTILINE))
            assert "https://" in section
        assert "non-commercial" in sections[0]
        assert sections[2].count("CC BY") == 4


def test_citation_and_changelog_agree_with_the_metadata(root: Path) -> None:
    changelog = " ".join((root / "CHANGELOG.md").read_text(encoding="utf-8").split())
    versions = re.findall(r"## \[([\d.]+)\] - \d{4}-\d{2}-\d{2}", changelog)
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license", "references"} <= set(citation)
    assert citation["version"] == versions[0]
    assert str(citation["date-released"]) in changelog
    for bundle in BUNDLES:
        metadata = json.loads((root / "bundles" / bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
        assert metadata["version"] == versions[0]
        assert list(metadata["changelog"]) == versions
        for line in metadata["changelog"].values():
            assert f"`{bundle}`: {line}" in changelog
        sources = " ".join(f"{reference.get('doi')} {reference.get('notes')}" for reference in citation["references"])
        for reference in metadata["references"]:
            assert re.search(r"(?:doi:|arXiv:)(\S+)$", reference).group(1) in sources


def small(command: str, bundle: str, top: Path) -> str:
    """A command of the README with its paths in `top` and made small by overrides that it does not have itself."""
    arguments = words(command)
    text = command.strip().replace("/workspace/", f"{top}/")
    if "monai.bundle" not in arguments:
        return text
    extra = {**SMALL, **NETWORK[bundle]}
    if any("swin" in word for word in arguments):
        extra |= SWIN[bundle]
    if "--grid_size" in arguments:
        extra |= FINER
    if any("train_3d" in word for word in arguments):
        extra |= THREE_D
    if any("cross_validate" in word for word in arguments):
        extra["num_folds"] = 2
    if any("multi_gpu" in word for word in arguments):
        extra["backend"] = "gloo"
    if "--resume" in arguments:
        extra["max_epochs"] = 2
    parser = ConfigParser()
    parser.read_config([str(Path("bundles") / bundle / name) for name in config_files(arguments)])
    wanted = {k: v for k, v in extra.items() if k in parser.get() and f"--{k}" not in arguments}
    return " ".join([text, *(f"--{k} {shlex.quote(str(v))}" for k, v in wanted.items())])


def user_environment(root: Path) -> dict[str, str]:
    """This Python first on the path, no PYTHONPATH; coverage, where it is measured, goes to the project's top."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return environment | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COVERAGE_FILE": str(root / ".coverage"),
        "COVERAGE_PROCESS_START": str(root / "pyproject.toml"),
    }


def contents(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if "__pycache__" not in path.parts and ".coverage" not in path.name)
    return {str(path.relative_to(folder)) for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("bundle", BUNDLES)
def test_commands_run(root: Path, phantoms: Path, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the README, in its order, in the bundle's folder; nothing is written there."""
    monkeypatch.chdir(root)
    folder = root / "bundles" / bundle
    workspace(tmp_path, phantoms)
    before = contents(folder)
    environment = user_environment(root)
    if bundle == "rsna_cnn_lstm":  # what the other bundle's first command leaves
        torch.save(Backbone("test_efficientnet").state_dict(), tmp_path / "output" / "pretrain" / "model.pt")
    else:
        (tmp_path / "output" / "pretrain").rmdir()
    for block in commands(readme(root, bundle)):
        for command in re.split(r"\n(?=python|torchrun)", block):
            text = small(command, bundle, tmp_path)
            done = subprocess.run(["bash", "-euc", text], cwd=folder, env=environment, capture_output=True, text=True,
                                  timeout=600)  # fmt: skip
            if "inference_trt" in text and not torch.cuda.is_available():
                assert done.stderr.strip().splitlines()[-1].startswith("error: TensorRTError: inference_trt.json needs")
            elif done.returncode:
                pytest.fail(f"exit {done.returncode}: {text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    assert contents(folder) == before
    check_results(bundle, tmp_path / "output")


def check_results(bundle: str, output: Path) -> None:
    """The files that the README promises."""
    runs = {path.name for path in output.iterdir() if path.is_dir()} - {"cache", "cross_validation", "mlruns"}
    prepared = json.loads((output / "prepare" / "prepare.json").read_text(encoding="utf-8"))
    assert prepared["series"] == prepared["prepared"] > 0 == prepared["failed"]
    others = {"check", "prepare", "evaluation", "calibration", "ensemble"}
    others |= {"health", "inference", "evidence", "embeddings", "pretrain", "checked"}
    for name in runs - others | ({"pretrain"} if bundle == "voco2d_pretrain" else set()):
        found = {path.name for path in (output / name).iterdir()}
        assert {"model.pt", "checkpoints", "tensorboard", "config.json", "log.txt", "run.json"} <= found, name
    assert {"mlruns", "mlruns.db"} <= {path.name for path in output.iterdir()}
    assert "tensorrt" not in runs or torch.cuda.is_available()
    assert json.loads((output / "checked" / "run.json").read_text(encoding="utf-8"))["result"] == "completed"
    if bundle == "rsna_cnn_lstm":
        assert "backbone tensors loaded from" in (output / "fine_tune" / "log.txt").read_text(encoding="utf-8")
        figures = json.loads((output / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
        assert {"score", "mAP", "auc", "baseline"} <= set(figures)
        assert f"{figures['score']['value']:.3f}" in (output / "evaluation" / "report.html").read_text(encoding="utf-8")
        assert len(pd.read_csv(output / "inference" / "predictions.csv")) == 1
        assert pd.read_csv(output / "check" / "check.csv")["usable"].all()
        assert pd.read_csv(output / "check" / "problems.csv").empty
        pooled = output / "cross_validation"
        assert len(pd.read_csv(pooled / "predictions.csv")) == len(pd.read_csv(output / "folds.csv"))
        assert json.loads((pooled / "metrics.json").read_text(encoding="utf-8"))["score"]["low"] is not None
        assert (output / "inference" / "series" / "000001.json").is_file()
        assert len(pd.read_csv(output / "calibration" / "before_after.csv")) == 8
        assert json.loads((output / "ensemble" / "series" / "000001.json").read_text())["calibration"] == "temperature"
        for name in ("evidence/000001.png", "evidence/000001.json", "sr/000001.dcm"):
            assert (output / "evidence" / name).is_file()
        assert torch.jit.load(output / "model.ts")(torch.rand(2, 1, 32, 32, 3)).shape == (2, 11)
        session = onnxruntime.InferenceSession(str(output / "model.onnx"), providers=["CPUExecutionProvider"])
        assert session.run(None, {"image": np.zeros((2, 1, 192, 192, 3), np.float32)})[0].shape == (2, 11)
        assert torch.export.load(output / "model.pt2").module()(torch.rand(1, 1, 32, 32, 4)).shape == (1, 11)
    else:
        started = (output / "from_weights" / "log.txt").read_text(encoding="utf-8")
        assert "backbone tensors loaded from" in started
        assert {"position_accuracy", "embedding_spread", "slice_height_error"} <= set(
            pd.read_csv(output / "health" / "metrics.csv", header=None)[0]
        )
        index = pd.read_csv(output / "embeddings" / "embeddings.csv")
        assert index["slices"].tolist() == [4]
        assert (output / "embeddings" / index["file"][0]).is_file()
        assert torch.jit.load(output / "backbone.ts")(torch.rand(3, 1, 48, 48)).shape == (3, 256)
        session = onnxruntime.InferenceSession(str(output / "backbone.onnx"), providers=["CPUExecutionProvider"])
        assert session.run(None, {"image": np.zeros((3, 1, 192, 192), np.float32)})[0].shape == (3, 256)
        assert torch.export.load(output / "backbone.pt2").module()(torch.rand(5, 1, 48, 48)).shape == (5, 256)
