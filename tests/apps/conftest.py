# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A real MONAI Label server for each test module. These tests run in its environment: `make test-label`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "apps" / "monailabel"
# small enough for a CPU; the same for all runs of a model
NETWORK = {"backbone_name": "test_efficientnet", "hidden_size": 16, "volume_size": [64, 64, 16], "num_slices": 8,
           "image_size": [48, 48]}  # fmt: skip
PRETRAIN = {"backbone_name": "test_efficientnet", "hidden_size": 32, "volume_size": [96, 96, 16], "crop_size": [32, 32],
            "num_slices": 4, "max_epochs": 1, "batch_size": 2, "num_workers": 0}  # fmt: skip
TRAIN = {**NETWORK, "max_epochs": 1, "batch_size": 2, "num_workers": 0}
SETTINGS = {
    "rsna_cnn_lstm": {"inference": {**NETWORK, "num_workers": 0}, "train": TRAIN, "evaluate": TRAIN},
    "voco2d_pretrain": {"train": PRETRAIN},
}
UNWEIGHTED = shutil.ignore_patterns("models", "__pycache__")


@dataclass
class Server:
    """A server that answers at `url`; `app` is its copy of the app, `studies` its studies, `temporary` its TMPDIR."""

    url: str
    app: Path
    studies: str
    process: subprocess.Popen[bytes]
    log: Path
    temporary: Path

    def request(self, method: str, path: str, **kwargs: object) -> requests.Response:
        return requests.request(method, self.url + path, timeout=kwargs.pop("timeout", 120), **kwargs)

    def get(self, path: str, **kwargs: object) -> requests.Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, **kwargs: object) -> requests.Response:
        return self.request("POST", path, **kwargs)

    def put(self, path: str, **kwargs: object) -> requests.Response:
        return self.request("PUT", path, **kwargs)

    def wait_for(self, task: str, timeout: float = 300) -> dict[str, object]:
        """The state of a background task (`train`, `scoring`, `batch/infer`) when none of its kind is running."""
        end = time.time() + timeout
        while time.time() < end:
            state = self.get(f"/{task}/" if task != "batch/infer" else f"/{task}").json()
            if state.get("status") not in ("SUBMITTED", "RUNNING"):
                return state
            time.sleep(0.5)
        pytest.fail(f"{task} still runs after {timeout} s: {self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)


def copy_app(folder: Path) -> Path:
    """A copy of the app: MONAI Label writes logs and models into its folder."""
    return Path(shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("model", "logs", "bin", "__pycache__")))


@pytest.fixture(scope="session")
def settings_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "settings.json"
    path.write_text(json.dumps(SETTINGS))
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.pt` of the small classifier with random weights, the same in each session."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    bundle = ROOT / "bundles" / "rsna_cnn_lstm"
    code = (
        "import sys, torch; from monai.bundle import ConfigParser; torch.manual_seed(0); p = ConfigParser();"
        f" p.read_config({str(bundle / 'configs' / 'inference.json')!r}); p['bundle_root'] = {str(bundle)!r};"
        f" p.update({NETWORK!r}); torch.save(p.get_parsed_content('network_def').state_dict(), {str(path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=bundle, check=True)
    return path


@pytest.fixture(scope="module")
def start_server(
    tmp_path_factory: pytest.TempPathFactory, settings_file: Path, weights: Path
) -> Iterator[Callable[..., Server]]:
    """Starts a server over `studies` (a folder, which it writes to: give it a copy; or a DICOMweb address)
    as a user does, and waits until it answers. Arguments: `app` of an earlier server to start that one again; `conf`
    further `--conf` pairs; `environment` further variables; `shipped` the weights it starts with, None for bundles
    without any;
    `prefix` of the command (as `unshare`)."""
    servers: list[Server] = []

    def start(studies: Path | str, app: Path | None = None, conf: dict[str, str] | None = None,
              environment: dict[str, str] | None = None, shipped: Path | None = weights,
              prefix: tuple[str, ...] = ()) -> Server:  # fmt: skip
        folder = tmp_path_factory.mktemp("server")
        app = copy_app(folder / "app") if app is None else app
        pairs = {"models": "rsna_cnn_lstm,voco2d_pretrain", "bundles": str(ROOT / "bundles"),
                 "settings": str(settings_file)}  # fmt: skip
        if shipped is None:
            pairs["bundles"] = str(shutil.copytree(ROOT / "bundles", folder / "bundles", ignore=UNWEIGHTED))
        else:
            pairs["weights"] = str(shipped)
        pairs |= conf or {}
        port, log, temporary = free_port(), folder / "log.txt", folder / "tmp"
        temporary.mkdir()  # of its own: what other servers of these tests leave for a moment is not this one's
        command = [*prefix, sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app)]
        command += ["--studies", str(studies), "--host", "127.0.0.1", "--port", str(port)]
        for name, value in pairs.items():
            command += ["--conf", name, value]
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        variables |= {"MONAI_LABEL_SESSION_PATH": str(folder / "sessions"), "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
                      "MONAI_LABEL_DATASTORE_CACHE_PATH": str(folder / "cache"), "OMP_NUM_THREADS": "1",
                      "TMPDIR": str(temporary)}  # fmt: skip
        variables |= environment or {}
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=folder, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        server = Server(f"http://127.0.0.1:{port}", app, str(studies), process, log, temporary)
        servers.append(server)
        end = time.time() + 120
        while time.time() < end and process.poll() is None:
            try:
                if server.get("/info/", timeout=5).ok:
                    return server
            except requests.RequestException:
                time.sleep(0.3)
        server.stop()
        pytest.fail(f"no answer from the server:\n{log.read_text()[-5000:]}")

    yield start
    for server in servers:
        server.stop()
