# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""`--tracking mlflow` with MLflow itself and a local store, read back by its client."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import mlflow
import pytest
from ignite.engine import Engine
from monai.handlers import MLFlowHandler
from monai.utils import path_to_sqlite_uri, path_to_uri
from workflow.manifest import parameters
from workflow.tracking import TrackedRun, TrackingError, is_tracked

BACKBONE = ("--backbone_name", "test_efficientnet", "--device", "cpu", "--num_workers", 0, "--num_slices", 4)
SMALL = {
    "voco2d_pretrain": (*BACKBONE, "--volume_size", "[48,48,8]", "--crop_size", "[16,16]", "--hidden_size", 16),
    "rsna_cnn_lstm": (*BACKBONE, "--volume_size", "[40,40,8]", "--image_size", "[32,32]", "--hidden_size", 16),
}


@pytest.fixture(autouse=True)
def _stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow reports its use to its makers unless told not to."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def runs_of(folder: Path, experiment: str) -> tuple[mlflow.MlflowClient, dict[str, Any]]:
    """Client of the local store in a folder, and its runs by name, each name once."""
    client = mlflow.MlflowClient(tracking_uri=path_to_sqlite_uri(folder / "mlruns.db"))
    found = client.search_runs(client.get_experiment_by_name(experiment).experiment_id)
    assert len({run.info.run_name for run in found}) == len(found)
    return client, {run.info.run_name: run for run in found}


def check_files(client: mlflow.MlflowClient, run: Any, folder: Path, names: set[str]) -> None:
    run_id = run.info.run_id
    assert {file.path for file in client.list_artifacts(run_id)} == names
    for name in names:
        logged = Path(client.download_artifacts(run_id, name, folder.parent))
        assert logged.read_bytes() == (folder / name).read_bytes()
        logged.unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert {k: str(v) for k, v in parameters(config).items()}.items() <= run.data.params.items()


def check_training(client: mlflow.MlflowClient, run: Any, folder: Path, epochs: list[int]) -> None:
    """Figures of the last epoch are those of the log and of the manifest."""
    assert run.info.status == "FINISHED"
    check_files(client, run, folder, {"config.json", "run.json", "model.pt"})
    assert run.data.params["epoch_length"].isdigit()
    log = (folder / "log.txt").read_text(encoding="utf-8")
    last = re.findall(rf"epoch {epochs[-1]}: (loss .*)", log)[-1]
    for name, value in (term.split() for term in last.split(", ")):
        assert f"{run.data.metrics[name]:.4f}" == value
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == epochs
    manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    numbers = {name: value for name, value in manifest["metrics"].items() if value is not None}  # not the undefined
    assert numbers.items() <= run.data.metrics.items()
    assert {"train_loss", "lr_group_0"} <= set(run.data.metrics)


def test_pretraining_is_tracked(run_bundle, data_dir, root, tmp_path, monkeypatch) -> None:
    bundle, out = "voco2d_pretrain", tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    before = sorted(str(path) for path in (root / "bundles" / bundle).iterdir())
    run_bundle(bundle, "--tracking", "mlflow", "--dataset_dir", data_dir, "--exclude", "['*organs*']", "--output_root",
               out, "--run_name", "tracked", "--max_epochs", 2, "--val_fraction", 0.25, *SMALL[bundle])  # fmt: skip
    client, runs = runs_of(out, bundle)
    check_training(client, runs["tracked"], out / "tracked", [1, 2])
    assert {"position_accuracy", "embedding_spread"} <= set(runs["tracked"].data.metrics)
    assert {path.name for path in out.iterdir()} == {"cache", "tracked", "mlruns.db", "mlruns"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(str(path) for path in (root / "bundles" / bundle).iterdir()) == before


@pytest.mark.slow
def test_training_evaluation_and_inference_are_tracked(run_bundle, phantoms, root, tmp_path) -> None:
    bundle = "rsna_cnn_lstm"
    common = ("--tracking", "mlflow", "--output_root", tmp_path, "--dataset_dir")
    run_bundle(bundle, *common, phantoms, "--run_name", "a", "--max_epochs", 1, "--num_folds", 3, *SMALL[bundle])
    weights = ("--weights", tmp_path / "a" / "model.pt")
    run_bundle(bundle, *common, phantoms, "--run_name", "scores", "--num_folds", 3, "--report", "False", *weights,
               *SMALL[bundle], configs=("train.json", "evaluate.json"))  # fmt: skip
    series = sorted((phantoms / "train_images").glob("*/*"))[0]
    run_bundle(bundle, *common, series, "--run_name", "new", *weights, *SMALL[bundle], configs=("inference.json",))
    resumed = ("--run_name", "a", "--resume", "latest", "--max_epochs", 2, "--num_folds", 3)
    run_bundle(bundle, *common, phantoms, *resumed, *SMALL[bundle], check=False)
    client = mlflow.MlflowClient(tracking_uri=path_to_sqlite_uri(tmp_path / "mlruns.db"))
    found = client.search_runs(client.get_experiment_by_name(bundle).experiment_id, order_by=["start_time"])
    assert [run.info.run_name for run in found] == ["a", "scores", "new", "a"]  # a resumed run is a part of its own
    check_training(client, found[3], tmp_path / "a", [2])  # its first epoch is the other part's
    assert [run.info.status for run in found] == ["FINISHED"] * 4
    figures = json.loads((tmp_path / "scores" / "run.json").read_text(encoding="utf-8"))
    assert found[1].data.metrics["negative_score"] == figures["metrics"]["negative_score"]
    assert set(figures["data"]) == {"validation"}
    for run in found[1:3]:
        check_files(client, run, tmp_path / run.info.run_name, {"config.json", "run.json"})
    manifest = json.loads((tmp_path / "a" / "run.json").read_text(encoding="utf-8"))
    assert [part["config"] for part in manifest["earlier"]] == ["config_1.json"]
    assert manifest["data"] == manifest["earlier"][0]["data"]
    assert not (root / "bundles" / bundle / "eval").exists()


def config(**more: object) -> dict[str, Any]:
    return {"run_name": "a", "train": {"handlers": ["@x", {"_target_": "MLFlowHandler"}]}, "lr": 0.1, **more}


def test_only_monais_handlers_make_a_run_tracked() -> None:
    assert is_tracked(config())
    for target in ("MLFlowHandler", "monai.handlers.MLFlowHandler"):  # the other by --tracking my_settings.json
        assert is_tracked({"handlers": [{"_target_": target}]})
    assert not is_tracked({"train": {"handlers": ["@x", {"_target_": "StatsHandler"}]}, "run": []})
    assert not is_tracked({})


def test_an_unnamed_run_is_refused(tmp_path) -> None:
    uri = path_to_sqlite_uri(tmp_path / "mlruns.db")
    with pytest.raises(TrackingError, match=r"tracking: needs a --run_name .* the folder is '2026'"):
        TrackedRun(uri, "e", "2026", None, {})
    assert not list(tmp_path.iterdir())


def test_without_mlflow_there_is_a_clear_error(monkeypatch) -> None:
    monkeypatch.setattr("workflow.tracking.optional_import", lambda name: (None, False))
    with pytest.raises(TrackingError, match="needs the package mlflow"):
        TrackedRun("", "e", "a", "a", {})


def test_mlflow_is_kept_from_reporting_its_use(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    monkeypatch.setattr("mlflow.telemetry.client._MLFLOW_TELEMETRY_CLIENT", object())  # of its import
    monkeypatch.setattr("mlflow.telemetry.utils._IS_IN_CI_ENV_OR_TESTING", False)
    TrackedRun(path_to_sqlite_uri(tmp_path / "mlruns.db"), "e", "a", "a", {})
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert mlflow.telemetry.get_telemetry_client() is None


def test_the_store_of_the_environment_comes_first_as_for_the_handlers(tmp_path, monkeypatch) -> None:
    (tmp_path / "env").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", path_to_sqlite_uri(tmp_path / "env" / "mlruns.db"))
    TrackedRun(path_to_sqlite_uri(tmp_path / "mlruns.db"), "e", "a", "a", {"lr": 0.1})
    assert [path.name for path in tmp_path.iterdir()] == ["env"]
    assert runs_of(tmp_path / "env", "e")[1]["a"].data.params == {"lr": "0.1"}


def part_of_a_run(folder: Path, settings: dict[str, Any], value: float) -> TrackedRun:
    """What a run does until it ends: opened by us, written to by MONAI's handlers."""
    uri = path_to_sqlite_uri(folder / "mlruns.db")
    tracked = TrackedRun(uri, "e", "a", "a", settings)
    engine = Engine(lambda engine, batch: engine.state.metrics.update(score=value))
    MLFlowHandler(uri, experiment_name="e", run_name="a", iteration_log=False).attach(engine)
    engine.run([0], max_epochs=1)
    return tracked


@pytest.mark.parametrize(("result", "status"), [("failed", "FAILED"), ("interrupted", "KILLED"), (None, "RUNNING")])
def test_a_run_that_did_not_finish_goes_on_in_the_same_mlflow_run(tmp_path, result, status) -> None:
    for name in ("config.json", "run.json"):
        (tmp_path / name).write_text(name)
    many = {f"setting_{number}": number for number in range(250)}
    first = part_of_a_run(tmp_path, {"lr": 0.1, "resume": None}, 0.25)
    if result is not None:
        first.close(result, tmp_path)
    client, runs = runs_of(tmp_path, "e")
    assert runs["a"].info.status == status
    TrackedRun(path_to_sqlite_uri(tmp_path / "mlruns.db"), "e", "a", "a", {})
    assert runs_of(tmp_path, "e")[1]["a"].info.status == "RUNNING"
    resumed = part_of_a_run(tmp_path, {"lr": 0.2, **many}, 0.5)
    (tmp_path / "model.pt").write_text("weights")
    resumed.close("completed, 1 series failed", tmp_path)
    client, runs = runs_of(tmp_path, "e")  # each name once
    run_id, data = runs["a"].info.run_id, runs["a"].data
    assert runs["a"].info.status == "FINISHED"
    assert (data.params["lr"], data.params["setting_249"]) == ("0.1", "249")  # MLflow keeps the first
    assert [metric.value for metric in client.get_metric_history(run_id, "score")] == [0.25, 0.5]
    assert {file.path for file in client.list_artifacts(run_id)} == {"config.json", "run.json", "model.pt"}
    assert not (tmp_path / "mlruns" / "0").exists()
    TrackedRun(path_to_sqlite_uri(tmp_path / "mlruns.db"), "e", "a", "a", {})
    assert (
        len(client.search_runs(client.get_experiment_by_name("e").experiment_id)) == 2
    )  # a finished one is left alone


def test_of_several_unfinished_runs_the_handlers_and_we_take_the_same(tmp_path) -> None:
    client = mlflow.MlflowClient(tracking_uri=path_to_sqlite_uri(tmp_path / "mlruns.db"))
    experiment = client.create_experiment("e", artifact_location=path_to_uri(tmp_path / "mlruns"))
    for start in (1000, 2000):
        client.set_terminated(client.create_run(experiment, run_name="a", start_time=start).info.run_id, "FAILED")
    part_of_a_run(tmp_path, {"lr": 0.1}, 0.25).close("completed", tmp_path)
    found = client.search_runs(experiment, order_by=["start_time"])
    assert [(run.info.status, "lr" in run.data.params, "score" in run.data.metrics) for run in found] == [
        ("FINISHED", True, True), ("FAILED", False, False),
    ]  # fmt: skip
