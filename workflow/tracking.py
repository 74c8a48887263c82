# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""``--tracking mlflow``: what MONAI's MLFlowHandler leaves open.

MONAI appends its handlers to the config's lists; they write losses and metrics. They find their MLflow run by its name,
so it is opened here under the run folder's name before they start, with the settings as parameters, and closed with how
the run ended, its ``config.json``, ``run.json`` and ``model.pt``. What cannot be tracked is refused by the guard.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle.utils import DEFAULT_HANDLERS_ID
from monai.utils import optional_import, path_to_uri

__all__ = ["OutputAsList", "TrackedRun", "TrackingError", "is_tracked", "untrackable"]

SQLITE = "sqlite:///"
MOST = 100  # parameters that MLflow takes at once
LONGEST = 6000  # characters of a value
ENDS = {"failed": "FAILED", "interrupted": "KILLED"}  # run.json's result -> MLflow's status


class TrackingError(ValueError):
    """A run that cannot be tracked as asked for."""


def is_tracked(config: Mapping[str, Any]) -> bool:
    """Whether MONAI has put its MLFlowHandler into one of the config's lists of handlers."""
    for ids in DEFAULT_HANDLERS_ID.values():
        handlers: Any = config
        for name in ids["handlers"].split("#"):
            handlers = handlers.get(name, {})
        targets = [str(handler.get("_target_")) for handler in handlers if isinstance(handler, Mapping)]
        if any(target.rpartition(".")[2] == "MLFlowHandler" for target in targets):
            return True
    return False


def untrackable(config: Mapping[str, Any], asked: bool) -> str | None:
    """Why a config cannot be tracked as asked for, None where it can or nobody asks.

    Args:
        config: the config that runs. asked: whether the command line has ``--tracking``.
    """
    uri = config.get("tracking_uri")
    if isinstance(uri, str) and re.search(r"://[^/\s]*@", uri):
        return ("tracking_uri: found a user name or password, which config.json would keep; expected an address "
                "without it, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment")  # fmt: skip
    runs = json.dumps(config.get("run", []), default=str).replace("::", "#")  # which MONAI writes once it has read it
    engines = [f"@{ids['id']}.run(" for ids in DEFAULT_HANDLERS_ID.values()]
    if (asked or is_tracked(config)) and not any(engine in runs for engine in engines):
        return "--tracking: this config runs no training, evaluation or inference of its own; leave it out here"
    return None


class TrackedRun:
    """The MLflow run of a run folder.

    Args:
        tracking_uri: of the store, ``sqlite:///`` and a file, or a server's; ``MLFLOW_TRACKING_URI`` comes first, as
            for the handlers.
        experiment: name of the experiment; made where it does not exist.
        name: of the run; one of this name that is not finished (it failed, or its process was killed) goes on.
        handlers_name: the name that the handlers look for.
        settings: become parameters.

    Raises:
        TrackingError: without MLflow, or when the handlers' run_name is not the folder's name.
    """

    def __init__(
        self, tracking_uri: str, experiment: str, name: str, handlers_name: object, settings: Mapping[str, Any]
    ) -> None:
        mlflow, there = optional_import("mlflow")
        if not there:
            raise TrackingError("tracking: needs the package mlflow, or mlflow-skinny with sqlalchemy and alembic")
        if str(handlers_name) != name:
            raise TrackingError(f"tracking: needs a --run_name (MLflow would mix unnamed runs); the folder is {name!r}")
        _keep_quiet()
        tracking_uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._id = self._open(self._experiment(experiment, tracking_uri), name)
        known = self._client.get_run(self._id).data.params  # MLflow never changes one: of a resumed run the first stay
        new = [mlflow.entities.Param(k, str(v)[:LONGEST]) for k, v in settings.items() if k not in known]
        for first in range(0, len(new), MOST):
            self._client.log_batch(self._id, params=new[first : first + MOST])

    def _experiment(self, name: str, tracking_uri: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        beside = None  # as MONAI's handler does: files beside a local store, elsewhere where the server says
        if tracking_uri.startswith(SQLITE):
            beside = path_to_uri(Path(tracking_uri[len(SQLITE) :]).parent / "mlruns")
        return str(self._client.create_experiment(name, artifact_location=beside))

    def _open(self, experiment: str, name: str) -> str:
        """The run that the handlers will find: the last of this name in MLflow's order that is not finished."""
        unfinished = [run for run in self._client.search_runs(experiment)
                      if run.info.run_name == name and run.info.status != "FINISHED"]  # fmt: skip
        if not unfinished:
            return str(self._client.create_run(experiment, run_name=name).info.run_id)
        run_id = str(unfinished[-1].info.run_id)
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def close(self, result: str, folder: Path) -> None:
        """Add the run's files and say how it ended, by the `result` of its ``run.json``."""
        for name in ("config.json", "run.json", "model.pt"):
            if (folder / name).is_file():
                self._client.log_artifact(self._id, str(folder / name))
        self._client.set_terminated(self._id, ENDS.get(result, "FINISHED"))


def _keep_quiet() -> None:
    """MLflow reports its use to its makers unless the environment says otherwise. MONAI has imported it by now, so it
    has to look there again."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    telemetry, there = optional_import("mlflow.telemetry")
    if there:
        telemetry.set_telemetry_client()


class OutputAsList:
    """Trainer handler for the end of the list: MONAI's tracking takes the loss out of a list of outputs, as an engine
    that decollates has it. Ours do not, and it would get a tuple in place of a number."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        engine.state.output = [engine.state.output]
