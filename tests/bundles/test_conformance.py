# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What the MONAI Model Zoo's CI and reviewers ask of a bundle, checked offline."""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from monai.bundle import ConfigParser, verify_metadata
from monai.bundle.workflows import _reject_executable_logging_config
from packaging.requirements import Requirement
from packaging.version import Version
from workflow.review import review
from workflow.vocabulary import ATTRIBUTES, NAMES, TARGETS

from bundles.rsna_cnn_lstm.scripts.labels import LabelTable
from tests.ports import free_port

BUNDLES = ("voco2d_pretrain", "rsna_cnn_lstm")
SHARED = ("transforms", "networks", "workflow")
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # of the text that apache.org serves
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
MERGED = {
    "voco2d_pretrain": ("", "evaluate", "multi_gpu_train", "prepare", "train_3d"),
    "rsna_cnn_lstm": ("", "evaluate", "multi_gpu_train", "prepare", "cross_validate", "federated"),
}
OVER_INFERENCE = {"voco2d_pretrain": ("inference_trt",), "rsna_cnn_lstm": ("inference_trt",)}
STANDALONE = {"voco2d_pretrain": ("inference",), "rsna_cnn_lstm": ("calibrate", "check_data", "folds", "inference")}
# distributions that are called otherwise than the package that is imported
DISTRIBUTIONS = {"ignite": "pytorch-ignite", "skimage": "scikit-image", "sklearn": "scikit-learn"}
# packages that no line imports, and what needs them
INDIRECT = {
    "tensorboard": "torch.utils.tensorboard",
    "scikit-image": "MONAI's largest connected component",
    "pylibjpeg": "pydicom's decoders",
    "pylibjpeg-libjpeg": "pydicom's decoders",
    "pylibjpeg-openjpeg": "pydicom's decoders",
    "pylibjpeg-rle": "pydicom's decoders",
}

bundles = pytest.mark.parametrize("bundle", BUNDLES)


def read(root: Path, bundle: str, name: str) -> Any:
    return json.loads((root / "bundles" / bundle / "configs" / name).read_text(encoding="utf-8"))


def config_paths(root: Path, bundle: str) -> list[Path]:
    return sorted((root / "bundles" / bundle / "configs").glob("*.json"))


def walk(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every (id, value) of a config, itself included."""
    yield name, config
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        yield from walk(value, f"{name}#{key}".strip("#"))


def strings(root: Path, bundle: str) -> list[tuple[str, str]]:
    """(file and id, text) of all strings of the runnable configs; metadata and labels hold prose."""
    paths = [path for path in config_paths(root, bundle) if path.stem not in ("metadata", "labels")]
    found = [(f"{p.name} {name}", v) for p in paths for name, v in walk(json.loads(p.read_text(encoding="utf-8")))]
    return [(name, v) for name, v in found if isinstance(v, str) and "_desc_" not in name]


def bundle_files(folder: Path) -> list[Path]:
    """Its files without links, caches, coverage data and weights, for which demo/test_shipped_weights.py is."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".coverage")]
    return [path for path in files if not {"__pycache__", "models"} & set(path.parts)]


# --- structure ---


@bundles
def test_structure(root: Path, bundle: str) -> None:
    folder = root / "bundles" / bundle
    assert re.fullmatch(r"[a-z][a-z0-9_]*", bundle)
    configs = {f"configs/{name}.json" for name in ("metadata", "train", "inference", "evaluate", "multi_gpu_train")}
    for name in {
        "LICENSE",
        "docs/README.md",
        "docs/data_license.txt",
        "configs/logging.conf",
        "scripts/__init__.py",
    } | configs:
        assert (folder / name).is_file(), name
    for name in SHARED:
        assert (folder / name).resolve() == root / name
        assert not (folder / name).readlink().is_absolute()
    sizes = {path: path.stat().st_size for path in bundle_files(folder)}
    assert sizes
    assert max(sizes.values()) < 1_000_000
    assert not [path for path in sizes if path.suffix in (".pt", ".ts", ".onnx", ".safetensors", ".zip")]
    assert not [path for path in folder.rglob("*") if path.name in (".gitignore", "eval")]


@bundles
def test_no_name_of_a_person_or_machine(root: Path, bundle: str) -> None:
    for path in bundle_files(root / "bundles" / bundle):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/home/|/Users/|/root/|[A-Z]:\\\\", text), path
        if path.suffix == ".json":
            paths = re.findall(r'(?<![\w.)\'])/\w[^"\']*', re.sub(r"https?://\S+", "", text))
            absolute = [p for p in paths if f'"{p}"' in text]
            assert all(p == "/workspace/output" or p.startswith("/workspace/data/") for p in absolute), absolute


@pytest.mark.parametrize("place", [".", *(f"bundles/{bundle}" for bundle in BUNDLES)])
def test_licence_is_the_whole_unmodified_text(root: Path, place: str) -> None:
    content = (root / place / "LICENSE").read_bytes()
    assert hashlib.sha256(content).hexdigest() == APACHE_2


# --- metadata ---


@bundles
def test_metadata_is_valid(root: Path, data_dir: Path, bundle: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"  # an existing file is not downloaded
    shutil.copy(data_dir / "meta_schema_20240725.json", schema)
    verify_metadata(
        meta_file=str(root / "bundles" / bundle / "configs" / "metadata.json"), filepath=str(schema), hash_val=None
    )
    metadata = read(root, bundle, "metadata.json")
    assert metadata["schema"] == SCHEMA
    assert "optional_packages_version" not in metadata
    assert metadata["name"]
    assert metadata["version"] in metadata["changelog"]
    assert "eval_metrics" not in metadata
    readme = (root / "bundles" / bundle / "docs" / "README.md").read_text(encoding="utf-8")
    assert "`eval_metrics` for the same reason" in " ".join(readme.split())
    del metadata["required_packages_version"]
    with pytest.raises(jsonschema.ValidationError, match="required_packages_version"):
        jsonschema.validate(metadata, json.loads(schema.read_text(encoding="utf-8")))


@bundles
def test_versions_are_plain_and_within_the_requirements(root: Path, bundle: str) -> None:
    """Whether they install together on Python 3.10, the zoo's, only a package index can tell."""
    metadata = read(root, bundle, "metadata.json")
    pins = {**metadata["required_packages_version"], "monai": metadata["monai_version"]}
    pins |= {"torch": metadata["pytorch_version"], "numpy": metadata["numpy_version"]}
    assert all(re.fullmatch(r"\d+(\.\d+)+(\.post\d+)?", version) for version in pins.values()), pins
    assert Version(pins["monai"]) >= Version("1.6.0")
    assert Version(pins["torch"]) >= Version("2.10")
    assert Version(pins["numpy"]) < Version("2.3")  # the last line that supports Python 3.10
    lines = (
        line.split("#")[0].strip() for line in (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    )
    required = {r.name: r.specifier for r in map(Requirement, filter(None, lines))}
    assert set(pins) <= set(required)
    wrong = {name: (pin, str(required[name])) for name, pin in pins.items() if pin not in required[name]}
    assert not wrong


def test_both_bundles_pin_the_same_versions_and_all_requirements(root: Path) -> None:
    pins = [read(root, bundle, "metadata.json") for bundle in BUNDLES]
    shared = set.intersection(*(set(p["required_packages_version"]) for p in pins))
    assert all(len({p["required_packages_version"][name] for p in pins}) == 1 for name in shared)
    assert all(pins[0][f"{name}_version"] == pins[1][f"{name}_version"] for name in ("monai", "pytorch", "numpy"))
    lines = (
        line.split("#")[0].strip() for line in (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    )
    required = {Requirement(line).name for line in lines if line}
    assert required == {"monai", "torch", "numpy"}.union(*(p["required_packages_version"] for p in pins))


def imported(path: Path) -> set[str]:
    """Top-level packages of a Python file's absolute imports, those within functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@bundles
def test_required_packages_are_those_that_are_imported(root: Path, bundle: str) -> None:
    folders = [root / name for name in SHARED] + [root / "bundles" / bundle / "scripts"]
    used = set().union(*(imported(path) for folder in folders for path in folder.rglob("*.py")))
    targets = {text for name, text in strings(root, bundle) if name.endswith("_target_") and "." in text}
    used |= {text.split(".")[0] for text in targets}
    used -= set(sys.stdlib_module_names) | {*SHARED, "scripts", "__future__"}
    needed = {DISTRIBUTIONS.get(name, name) for name in used}
    assert all(version(name) for name in needed)
    needed -= {"monai", "torch", "numpy"}
    listed = set(read(root, bundle, "metadata.json")["required_packages_version"])
    assert needed <= listed, needed - listed
    assert listed <= needed | set(INDIRECT), listed - needed - set(INDIRECT)


@bundles
def test_network_format_is_that_of_the_config(root: Path, bundle: str) -> None:
    metadata = read(root, bundle, "metadata.json")["network_data_format"]
    inference, train = read(root, bundle, "inference.json"), read(root, bundle, "train.json")
    assert list(metadata["inputs"]) == ["image"]
    assert list(metadata["outputs"]) == ["pred"]
    for tensors in metadata.values():
        for tensor in tensors.values():
            assert len(tensor.get("channel_def", range(tensor["num_channels"]))) == tensor["num_channels"]
    image = metadata["inputs"]["image"]
    assert (image["modality"], image["format"], image["value_range"]) == ("CT", "hounsfield", [0, 1])
    if bundle == "rsna_cnn_lstm":
        expected = [*inference["image_size"], inference["num_slices"]]
        assert image["num_channels"] == 2 * inference["neighbours"] + 1
    else:
        expected = inference["volume_size"][:2]
        assert expected == [g * c for g, c in zip(train["grid_size"], train["crop_size"], strict=True)]
    assert image["spatial_shape"] == expected


def test_labels_are_those_of_metadata_and_configs(root: Path) -> None:
    bundle = "rsna_cnn_lstm"
    table = LabelTable.from_file(root / "bundles" / bundle / "configs" / "labels.json")
    formats = read(root, bundle, "metadata.json")["network_data_format"]
    assert formats["outputs"]["pred"]["channel_def"] == table.channel_def
    assert formats["outputs"]["pred"]["num_channels"] == table.num_logits == 11
    columns = {str(i): name for i, name in enumerate(table.columns)}
    assert formats["post_processed_outputs"]["pred"]["channel_def"] == columns
    for name in ("train.json", "inference.json"):
        config = read(root, bundle, name)
        assert config["labels_file"] == "$@bundle_root + '/configs/labels.json'"
        assert config["labels"]["path"] == "@labels_file"
        assert config["network_def"]["num_logits"] == "$@labels.num_logits"


# --- configs ---


@bundles
def test_configs_are_formatted_as_the_zoo_formats_them(root: Path, bundle: str) -> None:
    """`pretty-format-json --no-sort-keys --indent 4` would change nothing."""
    for path in config_paths(root, bundle):
        text = path.read_bytes().decode("utf-8")
        assert text == json.dumps(json.loads(text), indent=4) + "\n", path


@bundles
def test_sections_and_paths(root: Path, bundle: str) -> None:
    for name in ("train.json", *(f"{name}.json" for name in STANDALONE[bundle])):
        config = read(root, bundle, name)
        assert all(isinstance(config[key], list) for key in ("initialize", "run", "finalize"))
        assert config["bundle_root"] == "."
        assert config.get("dataset_dir", "/workspace/data/").startswith("/workspace/data/")
        assert config["initialize"] == []  # nothing is built before `run` has the bundle's code on its path
        assert config["run"][0] == "$@guard"
    for name in [f"{name}.json" for name in MERGED[bundle] if name not in ("", "train_3d", "federated")]:
        config = read(root, bundle, name)
        assert config["run"][0] == "$@guard"
        assert config["finalize"]


@bundles
def test_every_top_level_id_is_described(root: Path, bundle: str) -> None:
    merged = [["train.json", *([f"{name}.json"] if name else [])] for name in MERGED[bundle]]
    merged += [[f"{name}.json"] for name in STANDALONE[bundle]]
    merged += [["inference.json", f"{name}.json"] for name in OVER_INFERENCE[bundle]]
    for files in merged:
        parser = ConfigParser()
        parser.read_config([str(root / "bundles" / bundle / "configs" / name) for name in files])
        config = parser.get()
        assert set(config) - {"_desc_", "_meta_"} == set(config["_desc_"]), files
        assert all(isinstance(line, str) and line for line in config["_desc_"].values())
    shipped = {path.stem for path in config_paths(root, bundle)} - {"metadata", "labels", "train"}
    assert shipped == {*MERGED[bundle], *STANDALONE[bundle], *OVER_INFERENCE[bundle]} - {""}


@bundles
def test_inference_and_training_agree_on_what_shapes_the_input(root: Path, bundle: str) -> None:
    train, inference = read(root, bundle, "train.json"), read(root, bundle, "inference.json")
    shared = (set(train) & set(inference)) - {
        "_desc_",
        "preprocessing",
        "network_def",
        "network",
        "run",
        "finalize",
        "run_folder",  # inference resumes nothing
    }
    assert train["prepare"]["transforms"][0]["eight_bit_window"] == "@eight_bit_window"
    assert {
        "window",
        "eight_bit_window",
        "volume_size",
        "num_slices",
        "backbone_name",
        "backbone_kwargs",
        "pool",
    } <= shared
    assert {name: train[name] for name in shared} == {name: inference[name] for name in shared}


@bundles
def test_expressions_and_targets_are_of_a_small_vocabulary(root: Path, bundle: str) -> None:
    found = {path.name: review(path) for path in config_paths(root, bundle)}
    assert found == {name: [] for name in found}
    expressions = [(name, text) for name, text in strings(root, bundle) if text.startswith("$")]
    assert len(expressions) > 20
    imports = [name for name, text in expressions if text.startswith("$import")]
    assert all(re.match(r"\w+\.json imports#\d+$", name) for name in imports), imports


def test_the_vocabulary_holds_nothing_idle(root: Path) -> None:
    found = [pair for bundle in BUNDLES for pair in strings(root, bundle)]
    text = " ".join(text for _, text in found if text.startswith("$"))
    words = set(re.findall(r"\w+", text))
    assert not {text for name, text in found if name.endswith("_target_")} ^ TARGETS
    assert not (NAMES | ATTRIBUTES) - words
    assert not NAMES - {"torch", *dir(builtins)}


@bundles
def test_no_id_contains_the_word_import(root: Path, bundle: str) -> None:
    """MONAI takes an expression with it for an import statement."""
    for path in config_paths(root, bundle):
        ids = {part for name, _ in walk(json.loads(path.read_text(encoding="utf-8"))) for part in name.split("#")}
        assert not {part for part in ids if "import" in part} - {"imports"}, path


@bundles
def test_handlers_are_literal_lists_and_only_the_first_process_writes(root: Path, bundle: str) -> None:
    config = read(root, bundle, "train.json")
    writers = ("StatsHandler", "TensorBoardStatsHandler", "TensorBoardImageHandler", "ProgressBar", "CropImages",
               "LearningRates", "HyperParameters", "RunRecord")  # fmt: skip
    checked = 0
    for part in ("train", "validate"):
        handlers = config[part]["handlers"]
        assert isinstance(handlers, list)
        for handler in handlers:
            if isinstance(handler, dict) and handler["_target_"].rsplit(".", 1)[-1] in writers:
                checked += 1
                assert handler["_disabled_"] == "@is_not_rank0", handler["_target_"]
    assert checked >= 4
    assert not [name for name, text in strings(root, bundle) if re.search(r"handlers\s*\[", text)]


@bundles
def test_logging_goes_to_standard_output_alone(root: Path, bundle: str) -> None:
    content = _reject_executable_logging_config(str(root / "bundles" / bundle / "configs" / "logging.conf"))
    assert re.findall(r"^class=(.*)$", content, re.MULTILINE) == ["StreamHandler"]
    assert re.findall(r"^args=(.*)$", content, re.MULTILINE) == ["(sys.stdout,)"]


# --- what MONAI finds when it opens the bundle ---


@pytest.fixture(scope="module")
def inspected(root: Path, data_dir: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Findings of inspect_bundle.py for each bundle, both at once."""
    program = (Path(__file__).parent / "inspect_bundle.py").read_text(encoding="utf-8")
    series = sorted((phantoms / "train_images").glob("*/*"))[0]
    samples = [data_dir / "crlm_ct_1004", data_dir / "cptac_pda_c3l_00189.nii.gz", series]
    # coverage of the processes, where it is measured, goes to the project's top and not into the bundles
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COVERAGE_FILE": str(root / ".coverage"),
                                "COVERAGE_PROCESS_START": str(root / "pyproject.toml")}  # fmt: skip
    running, outs = {}, {}
    for bundle in BUNDLES:
        top = tmp_path_factory.mktemp(bundle)
        outs[bundle] = top / "found.json"
        arguments = {"out": str(outs[bundle]), "data": str(phantoms), "samples": list(map(str, samples)),
                     "root": str(top / "runs"), "port": str(free_port())}  # fmt: skip
        running[bundle] = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(arguments)],
            cwd=root / "bundles" / bundle,
            env={key: value for key, value in environment.items() if key != "PYTHONPATH"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    for bundle, process in running.items():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"{bundle}: {output[-3000:]}"
    return {bundle: json.loads(out.read_text(encoding="utf-8")) for bundle, out in outs.items()}


@bundles
def test_importing_leaves_everything_as_it_was(inspected: dict[str, Any], bundle: str) -> None:
    assert inspected[bundle]["imports"] == ["True"]  # many modules, and nothing that changed


@bundles
@pytest.mark.parametrize("name", ["train", "inference", "inference+trt", "train+evaluate", "train+multi_gpu"])
def test_properties_are_complete(inspected: dict[str, Any], bundle: str, name: str) -> None:
    assert inspected[bundle]["properties"][name] == []


@bundles
def test_building_a_workflow_leaves_no_run_behind(inspected: dict[str, Any], bundle: str) -> None:
    assert inspected[bundle]["folders"] == []


@bundles
def test_properties_can_be_set_and_read_back(inspected: dict[str, Any], root: Path, bundle: str) -> None:
    read_back = inspected[bundle]["round_trip"]
    assert isinstance(read_back, dict), read_back
    metadata = read(root, bundle, "metadata.json")
    assert read_back.pop("dataset_dir").endswith("/.")
    assert read_back == {
        "max_epochs": 3, "val_interval": 2, "trainer_epochs": 3, "network_def": True,
        "bundle_root": str(root / "bundles" / bundle),
        "version": metadata["version"], "monai_version": metadata["monai_version"],
    }  # fmt: skip


@bundles
def test_overrides_reach_what_they_name(inspected: dict[str, Any], bundle: str) -> None:
    found = inspected[bundle]["overridden"]
    assert isinstance(found, dict), found
    assert found == {"learning_rate": [0.5], "weight_decay": [0.25], "batch_size": 3, "max_epochs": 7}


@bundles
def test_network_takes_and_gives_what_the_metadata_says(inspected: dict[str, Any], bundle: str) -> None:
    assert inspected[bundle]["network_shape"] == "verified"


@bundles
def test_inference_preprocesses_as_validation_does(inspected: dict[str, Any], root: Path, bundle: str) -> None:
    """Tensor for tensor: real DICOM, real NIfTI and a phantom; validation freshly prepared, and from its cache."""
    found = inspected[bundle]["preprocessing"]
    assert isinstance(found, dict), found
    assert len(found) == 3
    config = read(root, bundle, "inference.json")
    size = config["image_size"] if bundle == "rsna_cnn_lstm" else config["volume_size"][:2]
    for name, sample in found.items():
        assert sample["failed"] == "", name
        assert sample["shape"] == [1, *size, config["num_slices"]], name
        assert sample["equal"] == [True, True], (name, sample)
        assert sample["range"][0] >= 0
        assert 0.5 < sample["range"][1] <= 1
        assert sample["std"] > 0.05  # an image, not a constant
