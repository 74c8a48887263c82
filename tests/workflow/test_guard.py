# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""An override that no config knows ends the run before anything is built."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow
from workflow.guard import (
    RESERVED,
    CheckedWorkflow,
    RefusedValue,
    UnknownOverride,
    check_overrides,
    command_line,
    explain_last,
    running_config,
)
from workflow.tracking import untrackable

CONFIG = {
    "_desc_": {
        "learning_rate": "",
        "backbone_kwargs": "",
        "train": "",
        "guard": "",
        "built": "$open(@marker, 'w').close()",
        "initialize": "",
        "run": "",
        "finalize": "",
    },
    "learning_rate": 0.1,
    "backbone_kwargs": {},
    "train": {"trainer": {"max_epochs": 3, "handlers": [{"interval": 1}]}},
    "guard": {"_target_": "workflow.guard.check_overrides"},
    "built": "$open(@marker, 'w').close()",
    "marker": "marker",
    "initialize": [],
    "run": ["$@guard", "$@built"],
    "finalize": [],
}
CONFIG["_desc_"]["marker"] = ""
# overridable names of the specification
BOTH = """
    bundle_root dataset_dir datalist output_root run_name cache_dir seed device amp max_epochs batch_size num_workers
    learning_rate val_interval resume backbone_name backbone_kwargs grad_clip accumulation_steps num_slices window
"""
ONE = {
    "voco2d_pretrain": "grid_size crop_size num_random_crops voco_form ema_momentum",
    "rsna_cnn_lstm": """
        pretrained_path backbone_lr early_stopping freeze_blocks rnn_type hidden_size image_size folds_file fold
    """,
}


@pytest.fixture(autouse=True)
def _excepthook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "train.json"
    path.write_text(json.dumps({**CONFIG, "marker": str(tmp_path / "marker")}))
    return path


def workflow(config_file: Path, **override: object) -> ConfigWorkflow:
    found = ConfigWorkflow(str(config_file), workflow_type="train", logging_file=False, **override)
    found.initialize()
    return found


def monai_argv(config_file: Path, *arguments: str) -> list[str]:
    return ["/somewhere/monai/bundle/__main__.py", "run", "--config_file", str(config_file), *arguments]


def refused(config_file: Path, *arguments: str) -> str:
    with pytest.raises(UnknownOverride) as caught:
        check_overrides(monai_argv(config_file, *arguments))
    return str(caught.value)


def test_a_python_caller_with_an_unknown_id_is_stopped_before_anything_is_built(config_file, capsys):
    with pytest.raises(SystemExit) as caught:
        workflow(config_file, learning_rat=1.0).run()
    assert caught.value.code == 2
    assert not (config_file.parent / "marker").exists()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "unknown override 'learning_rat': did you mean learning_rate?"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("trainr#trainer#max_epochs", "train#trainer#max_epochs"),
        ("train#trainer#max_epoch", "train#trainer#max_epochs"),
    ],
)
def test_the_checked_workflow_knows_near_misses_below_a_name_that_does_not_exist(config_file, name, meant, capsys):
    with pytest.raises(UnknownOverride) as caught:
        create_workflow("workflow.guard.CheckedWorkflow", config_file=str(config_file), logging_file=False, **{name: 3})
    assert name in str(caught.value)
    assert meant in str(caught.value)
    assert capsys.readouterr().err.strip().splitlines()[-1] == str(caught.value)


def test_the_checked_workflow_runs_known_ids(config_file):
    found = CheckedWorkflow(
        str(config_file), workflow_type="train", logging_file=False, **{"train#trainer#max_epochs": 7}
    )
    found.initialize()
    found.run()
    assert found.parser["train#trainer#max_epochs"] == 7
    assert (config_file.parent / "marker").exists()


def test_monai_itself_names_a_parent_that_does_not_exist(config_file):
    with pytest.raises(KeyError, match="trainr") as caught:
        workflow(config_file, **{"trainr#max_epochs": 3})
    assert "did you mean 'train'?" in str(caught.value.__cause__)
    assert not (config_file.parent / "marker").exists()


def test_known_ids_run(config_file):
    workflow(config_file, learning_rate=1.0, **{"train#trainer#max_epochs": 7}).run()
    assert (config_file.parent / "marker").exists()


def test_every_unknown_id_is_named(config_file):
    with pytest.raises(UnknownOverride, match=r"'nonsense': see _desc_ .*'run_nam'|'run_nam'.*'nonsense': see _desc_"):
        workflow(config_file, nonsense=1, run_nam=2).run()


def test_what_experiment_tracking_adds_is_known(config_file):
    workflow(config_file, tracking_uri="file:///nowhere").run()
    assert (config_file.parent / "marker").exists()


TRAINER = {"_target_": "types.SimpleNamespace", "run": "$dict"}
TRACKED = {"train": {"trainer": TRAINER, "handlers": [{"_target_": "monai.handlers.MLFlowHandler"}]}}


def stopped(config_file: Path, **override: object) -> str:
    with pytest.raises(RefusedValue) as caught:
        workflow(config_file, **override).run()
    assert not (config_file.parent / "marker").exists()
    return str(caught.value)


def test_tracking_of_what_runs_no_engine_is_refused(config_file, monkeypatch):
    assert stopped(config_file, **TRACKED).startswith("--tracking: this config runs no training")
    workflow(config_file, **TRACKED, run=["$@guard", "$@built", "$@train#trainer.run()"]).run()
    (config_file.parent / "marker").unlink()
    monkeypatch.setattr(sys, "argv", monai_argv(config_file, "--tracking", "mlflow"))
    assert stopped(config_file).startswith("--tracking: this config runs no training")


@pytest.mark.parametrize("bundle", sorted(ONE))
def test_which_configs_can_be_tracked(root, bundle):
    found = set()
    for path in (root / "bundles" / bundle / "configs").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "run" in content and untrackable(content, asked=True) is None:
            found.add(path.stem)
    assert found == {"train", "multi_gpu_train", "evaluate", "inference", "inference_trt"}


@pytest.mark.parametrize("uri", ["https://me:secret@host/x", "http://secret@host", "$'https://me:secret@' + @marker"])
def test_credentials_in_an_address_are_refused_and_not_repeated(config_file, uri):
    message = stopped(config_file, tracking_uri=uri)
    assert "MLFLOW_TRACKING_USERNAME" in message
    assert "secret" not in message


@pytest.mark.parametrize("uri", ["https://host/x@y", "sqlite:////home/a@b/x.db", "$'sqlite:///' + @marker"])
def test_addresses_without_credentials_pass(config_file, uri):
    assert untrackable({"tracking_uri": uri}, asked=False) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train#trainer#max_epochs", "5"],
        ["--train::trainer::max_epochs=5"],
        ["--train#trainer#handlers#0#interval", "2"],
        ["--learning_rate", "-1"],
        ["--backbone_kwargs", "{'img_size': 64}"],
        ["--run_id", "run"],
    ],
)
def test_known_overrides_of_the_command_line_pass(config_file, arguments):
    check_overrides(monai_argv(config_file, *arguments))
    assert sys.excepthook is explain_last


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train#trainer#max_epoch", "5"],
        ["--train#trainer#max_epoch=5"],
        ["--train::trainer::max_epoch", "5"],
        ["-train#trainer#max_epoch=5"],
        ["--learning_rate", "3", "--train#trainer#max_epoch", "5"],
    ],
)
def test_unknown_nested_overrides_are_refused_with_near_misses(config_file, arguments):
    message = refused(config_file, *arguments)
    assert message.startswith("unknown override 'train#trainer#max_epoch': did you mean train#trainer#max_epochs")


def test_the_same_leaf_elsewhere_is_a_near_miss(config_file):
    assert "train#trainer#handlers#0#interval" in refused(config_file, "--train#zzzzzzzzzzzzzzzzzzzz#interval", "2")


def test_args_file_is_looked_through(config_file, tmp_path):
    args = tmp_path / "args.json"
    args.write_text(json.dumps({"config_file": str(config_file), "train#trainer#max_epochs": 5}))
    argv = ["/x/monai/bundle/__main__.py", "run", "--args_file", str(args)]
    check_overrides(argv)
    args.write_text(json.dumps({"config_file": str(config_file), "train#trainer#max_epoch": 5}))
    with pytest.raises(UnknownOverride, match="unknown override 'train#trainer#max_epoch'"):
        check_overrides(argv)
    with pytest.raises(UnknownOverride, match="train#trainer#max_epok"):
        check_overrides([*argv, "--train#trainer#max_epok", "1"])


def test_several_config_files_are_one_config(config_file, tmp_path):
    other = tmp_path / "evaluate.json"
    other.write_text(json.dumps({"evaluator": {"metric": 1}}))
    argv = monai_argv(config_file, "--evaluator#metric", "2", "--train#trainer#max_epochs", "2")
    argv[3] = str([str(config_file), str(other)])
    check_overrides(argv)
    argv[-4] = "--evaluator#metrik"
    with pytest.raises(UnknownOverride, match="did you mean evaluator#metric"):
        check_overrides(argv)


def test_another_programs_command_line_is_left_alone():
    check_overrides(["/usr/bin/pytest", "--learning_rat", "--a#b", "3"])
    assert sys.excepthook is not explain_last
    assert running_config() is None


def test_command_line_is_read_as_fire_does():
    argv = [
        "monai", "run", "--a", "1", "--b=[1,2]", "--flag", "--c", "-3", "--d-e", "x", "--g", "None", "positional",
        "-s", "0.5", "--last",
    ]  # fmt: skip
    expected = {"a": 1, "b": [1, 2], "flag": "True", "c": -3, "d_e": "x", "g": None, "s": 0.5, "last": "True"}
    found = command_line(argv)
    assert {name: str(value) for name, value in found.items()} == {n: str(v) for n, v in expected.items()}


def test_the_last_line_names_the_cause(capsys):
    error = RuntimeError("outer")
    error.__cause__ = ValueError("device: 'cuda' was asked for")
    explain_last(RuntimeError, error, None)
    assert capsys.readouterr().err.splitlines()[-1] == "error: ValueError: device: 'cuda' was asked for"


BUNDLES = Path(__file__).parents[2] / "bundles"
ALONE = {"train", "inference", "calibrate", "check_data", "folds"}  # the others change train.json
OVER_INFERENCE = {"inference_trt"}
NO_CONFIG = {"metadata", "labels"}


def config_files() -> list[tuple[str, ...]]:
    found = [(path.parents[1].name, path.stem) for path in sorted(BUNDLES.glob("*/configs/*.json"))]
    chosen = [
        (bundle, name) if name in ALONE else (bundle, "inference" if name in OVER_INFERENCE else "train", name)
        for bundle, name in found
        if name not in NO_CONFIG
    ]
    return chosen + [(bundle, "train", "multi_gpu_train", "evaluate") for bundle in sorted(ONE)]


@pytest.mark.parametrize("files", config_files(), ids="-".join)
def test_every_id_of_the_bundles_configs_has_its_line_and_no_line_is_idle(files):
    bundle, *names = files
    content = ConfigParser.load_config_files([str(BUNDLES / bundle / "configs" / f"{name}.json") for name in names])
    assert set(content) - RESERVED == set(content["_desc_"])


@pytest.mark.parametrize("bundle", sorted(ONE))
def test_the_names_that_users_rely_on_are_there(root, bundle):
    content = json.loads((root / "bundles" / bundle / "configs" / "train.json").read_text())
    assert set((BOTH + " " + ONE[bundle]).split()) <= set(content)


def test_the_command_line_ends_with_status_2_and_builds_nothing(run_bundle, tmp_path):
    arguments = ["--output_root", tmp_path / "out", "--dataset_dir", tmp_path, "--run_name", "a", "--max_epoch=3"]
    done = run_bundle("voco2d_pretrain", *arguments, "--train#trainer#max_epoch", "1", check=False)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("unknown override 'max_epoch': did you mean max_epochs")
    assert "unknown override 'train#trainer#max_epoch': did you mean train#trainer#max_epochs" in last
    assert not (tmp_path / "out").exists()


CODE = "$__import__('os').mkdir('M')"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("learning_rate", CODE, "__import__, mkdir"),
        ("backbone_kwargs", "{'a': [\"" + CODE + '"]}', "__import__, mkdir"),
        ("backbone_kwargs", "{'_target_': 'os.mkdir', 'path': 'M'}", "a target that is not in the vocabulary"),
        ("backbone_kwargs#_target_", "os.mkdir", "a target that is not in the vocabulary"),
        ("learning_rate", "%other.json#x", "a macro"),
        ("learning_rate", "$import os", "an import"),
    ],
)
def test_code_on_the_command_line_is_refused_before_it_is_evaluated(
    config_file, tmp_path, monkeypatch, capsys, name, value, reason
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"x": CODE}))
    monkeypatch.setattr(sys, "argv", monai_argv(config_file, f"--{name}", value))
    content = json.loads(config_file.read_text())
    content["run"].append("$str(@learning_rate) + str(@backbone_kwargs)")
    config_file.write_text(json.dumps(content))
    override = {name: command_line(sys.argv)[name]}
    with pytest.raises(RefusedValue) as caught:
        workflow(config_file, **override).run()
    assert reason in str(caught.value)
    assert capsys.readouterr().err.strip().splitlines()[-1] == str(caught.value)
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "M").exists()
    with pytest.raises(RefusedValue, match=reason):
        CheckedWorkflow(str(config_file), workflow_type="train", logging_file=False, **override)
    if "import os" not in value and "#" not in name:
        monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest"])
        workflow(config_file, **override).run()
        assert (tmp_path / "M").exists()  # it is one that would have


def test_expressions_of_the_vocabulary_pass_on_the_command_line(config_file):
    check_overrides(monai_argv(config_file, "--learning_rate", "$0.1 * len(@backbone_kwargs)"))


def test_code_in_an_args_file_is_refused(config_file, tmp_path):
    args = tmp_path / "args.json"
    args.write_text(json.dumps({"config_file": str(config_file), "learning_rate": CODE}))
    with pytest.raises(RefusedValue, match=r"--learning_rate .*__import__"):
        check_overrides(["/x/monai/bundle/__main__.py", "run", "--args_file", str(args)])


def test_what_is_acted_on_before_the_guard_is_not_refused_by_it(config_file, tmp_path, monkeypatch):
    """As the documents say; `CheckedWorkflow` does refuse it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", monai_argv(config_file, "--initialize", f'["{CODE}"]'))
    with pytest.raises(RefusedValue):
        CheckedWorkflow(str(config_file), workflow_type="train", logging_file=False, initialize=[CODE])
    assert not (tmp_path / "M").exists()
    workflow(config_file, initialize=[CODE])
    assert (tmp_path / "M").exists()


def test_code_on_the_command_line_ends_with_status_2_and_is_not_run(run_bundle, tmp_path):
    arguments = ["--output_root", tmp_path / "out", "--run_name", "a", "--dataset_dir", CODE]
    done = run_bundle("rsna_cnn_lstm", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert f"--dataset_dir {CODE}: an expression outside the vocabulary" in done.stderr.strip().splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} <= {".coverage"}
