# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""``--tracking mlflow``: what MONAI's MLFlowHandler leaves open.

MONAI appends its handlers to the config's lists; they write losses and metrics. They find their MLflow run by its name,
so it is opened here under the run folder's name before they start, with the settings as parameters, and closed with how
the run ended, its ``config.json``, ``run.json`` and ``model.pt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.bundle.utils import DEFAULT_HANDLERS_ID
from monai.utils import optional_import, path_to_uri

from .manifest import parameters
from .privacy import redact

__all__ = ["OutputAsList", "TrackedRun", "TrackingError", "is_tracked"]

SQLITE = "sqlite:///"
MOST = 100  # parameters that MLflow takes at once
LONGEST = 6000  # characters of a value


class TrackingError(ValueError):
    """A run that cannot be tracked as asked for."""


def is_tracked(config: Mapping[str, Any]) -> bool:
    """Whether MONAI has put its MLFlowHandler into one of the config's lists of handlers."""
    for ids in DEFAULT_HANDLERS_ID.values():
        handlers: Any = config
        for name in ids["handlers"].split("#"):
            handlers = handlers.get(name, {})
        if any(isinstance(handler, Mapping) and handler.get("_target_") == "MLFlowHandler" for handler in handlers):
            return True
    return False


class TrackedRun:
    """The MLflow run of a run folder.

    Args:
        tracking_uri: of the store, ``sqlite:///`` and a file, or a server's.
        experiment: name of the experiment; made where it does not exist.
        name: of the run; one of this name that was never closed (its process was killed) goes on.
        config: the executed config, whose settings become parameters.
        anonymise: keep UIDs out of the parameters.

    Raises:
        TrackingError: without MLflow, or when the handlers' run_name is not the folder's name.
    """

    def __init__(
        self, tracking_uri: str, experiment: str, name: str, config: Mapping[str, Any], *, anonymise: bool = False
    ) -> None:
        mlflow, there = optional_import("mlflow")
        if not there:
            raise TrackingError("tracking: needs the package mlflow, or mlflow-skinny with sqlalchemy and alembic")
        if str(config.get("run_name")) != name:
            raise TrackingError(f"tracking: needs a --run_name (MLflow would mix unnamed runs); the folder is {name!r}")
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._id = self._open(self._experiment(experiment, tracking_uri), name)
        settings = {k: redact(str(v)) if anonymise else str(v) for k, v in parameters(config).items()}
        known = self._client.get_run(self._id).data.params  # MLflow never changes one: of a resumed run the first stay
        new = [mlflow.entities.Param(k, v[:LONGEST]) for k, v in settings.items() if k not in known]
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
        unfinished = [run for run in self._client.search_runs(experiment)
                      if run.info.run_name == name and run.info.status == "RUNNING"]  # fmt: skip
        found = unfinished[-1] if unfinished else self._client.create_run(experiment, run_name=name)
        return str(found.info.run_id)

    def close(self, status: str, folder: Path) -> None:
        """Add the run's files and say how it ended: ``FINISHED``, ``FAILED`` or ``KILLED``."""
        for name in ("config.json", "run.json", "model.pt"):
            if (folder / name).is_file():
                self._client.log_artifact(self._id, str(folder / name))
        self._client.set_terminated(self._id, status)


class OutputAsList:
    """Trainer handler for the end of the list: MONAI's tracking takes the loss out of a list of outputs, as an engine
    that decollates has it. Ours do not, and it would get a tuple in place of a number."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        engine.state.output = [engine.state.output]
