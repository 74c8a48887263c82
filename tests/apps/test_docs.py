# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The commands of the app's README, run as they stand but for paths, port and size."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from monailabel.config import settings

from apps.monailabel.lib.bundles import KEYS
from tests.apps.conftest import APP, PRETRAIN, ROOT, SETTINGS, TRAIN, Server

README = APP / "README.md"
DATA = ROOT / "tests" / "data"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Studies with the names of the README, patients enough for a training."""
    studies = tmp_path_factory.mktemp("ct")
    shutil.copytree(DATA / "crlm_ct_1004", studies / "patient_7" / "series_1")
    for number in range(10):
        shutil.copyfile(DATA / "lidc_idri_0001.nii.gz", studies / f"patient_{10 + number}.nii.gz")
    return start_server(studies)


def labels(server: Server) -> None:
    """A final label for all but one of the images."""
    for number in range(10):
        content = json.dumps({"groups": {"liver": ("healthy", "low", "high")[number % 3], "bowel": "healthy"}})
        reply = server.put(f"/datastore/label?image=patient_{10 + number}.nii.gz&tag=final",
                           files={"label": ("label.json", content)})  # fmt: skip
        assert reply.ok, reply.text


def curl(command: str, server: Server, folder: Path) -> str:
    text = command.replace("curl -s", "curl -s --fail-with-body").replace("http://127.0.0.1:8000", server.url)
    text = text.replace("/data/other/scan.nii.gz", str(DATA / "lidc_idri_0001.nii.gz"))
    text = text.replace('"max_epochs": 20', '"max_epochs": 1')
    done = subprocess.run(["bash", "-euc", text], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}\n{server.log.read_text()[-2000:]}"
    return done.stdout


def test_the_command_that_starts_the_server_is_the_one_of_these_tests(server: Server) -> None:
    made, started, *_ = blocks("bash")
    assert commands(made)[0].startswith("make label-env")
    words = shlex.split(commands(started)[0])
    assert words[:5] == [".venv-label/bin/python", "-m", "monailabel.main", "start_server", "--app"]
    given = list(map(str, server.process.args))
    assert given[:5] == [sys.executable, *words[1:5]]
    assert {word for word in words if word.startswith("--")} <= set(given)
    assert "rsna_cnn_lstm,voco2d_pretrain" in words
    assert "rsna_cnn_lstm,voco2d_pretrain" in given


@pytest.mark.slow
def test_every_request_is_answered(server: Server, tmp_path: Path) -> None:
    asking, labelling, training = ([line for line in commands(block)] for block in blocks("bash")[2:])
    for command in asking:
        reply = json.loads(curl(command, server, tmp_path))
        if "/infer/" in command and "batch" not in command:
            assert set(reply["injuries"]["liver"]) == {"healthy", "low", "high"}
            assert ("evidence" in command) == (reply["evidence"] is not None)
    assert server.wait_for("batch/infer")["status"] == "DONE"
    assert server.get("/datastore/").json()["label_tags"]["original"] == 11
    for command in labelling:
        reply = curl(command, server, tmp_path)
        if "scoring" in command:
            assert server.wait_for("scoring")["status"] == "DONE"
        if "activelearning" in command:
            assert 0 < json.loads(reply)["entropy"] <= 1
    assert server.get("/datastore/").json()["label_tags"]["final"] == 1
    labels(server)
    for command in training:
        reply = curl(command, server, tmp_path)
        if "-X POST" in command:
            assert server.wait_for("train")["status"] == "DONE", server.log.read_text()[-3000:]
    assert [version["chosen"] for version in server.get("/versions/rsna_cnn_lstm").json()] == [True, False]


def test_the_table_of_conf_is_complete() -> None:
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(KEYS)


def test_the_settings_of_the_example_are_names_of_the_configs() -> None:
    (example,) = (json.loads(block) for block in blocks("json"))
    assert set(example) == set(SETTINGS) == {"rsna_cnn_lstm", "voco2d_pretrain"}
    assert set(TRAIN) > {"backbone_name"} < set(PRETRAIN)
    for model, configs in example.items():
        for config, names in configs.items():
            described: dict[str, str] = {}
            for file in ("train.json", f"{config}.json") if config == "evaluate" else (f"{config}.json",):
                content = json.loads((ROOT / "bundles" / model / "configs" / file).read_text(encoding="utf-8"))
                described |= content.get("_desc_", content.get("+_desc_", {}))
            assert set(names) <= set(described)


def test_the_variables_that_are_named_are_read() -> None:
    named = set(re.findall(r"MONAI_LABEL_\w+", README.read_text(encoding="utf-8")))
    read = "".join(path.read_text(encoding="utf-8") for path in [APP / "main.py", *(APP / "lib").glob("*.py")])
    # of MONAI Label's own code, which keeps its log-in here, and hands these on
    stock = {"MONAI_LABEL_AUTH_ENABLE", "MONAI_LABEL_AUTO_UPDATE_SCORING"}
    assert named - stock == {name for name in named - stock if f"settings.{name}" in read}
    assert stock <= set(type(settings).model_fields)


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert all((APP / link).exists() for link in local)
