# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A malicious config is found by reading it: nothing of it is run. Each one here does run when MONAI is given it."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser
from workflow.review import main, review
from workflow.vocabulary import ATTRIBUTES, NAMES, TARGETS, findings, foreign

CODE = "__import__('os').mkdir('M')"
# name -> (config, ids of the findings)
MALICIOUS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "imports": ({"imports": ["$import torch", "$import os"], "run": ["$os.mkdir('M')"]}, ["imports#1", "run#0"]),
    "import after a line break": ({"imports": ["$\nfrom os import mkdir"], "a": "$mkdir('M')"}, ["imports#0", "a"]),
    "initialize": ({"initialize": [f"${CODE}"]}, ["initialize#0"]),
    "target": ({"a": {"_target_": "os.mkdir", "path": "M"}}, ["a#_target_"]),
    "target through torch": ({"a": {"_target_": "torch.os.mkdir", "path": "M"}}, ["a#_target_"]),
    "target through our module": ({"a": {"_target_": "workflow.run.os.mkdir", "path": "M"}}, ["a#_target_"]),
    "target of ours that writes": (
        {"a": {"_target_": "workflow.run.write_atomically", "path": "M", "content": "x"}}, ["a#_target_"]),
    "target by reference": ({"n": "os.mkdir", "a": {"_target_": "@n", "path": "M"}}, ["a#_target_"]),
    "target by macro": ({"n": "os.mkdir", "a": {"_target_": "%n", "path": "M"}}, ["a#_target_"]),
    "target as a path": ({"a": {"_target_": "Compose", "path": "M"}, "a#_target_": "os.mkdir"}, ["a#_target_"]),
    "target as a value": (
        {"f": {"_target_": "os.mkdir", "_mode_": "callable"}, "a": "$@f('M')"}, ["f#_target_"]),
    "lambda": ({"a": f"$(lambda: {CODE})()"}, ["a"]),
    "class chain": (
        {"a": "$[c for c in ().__class__.__base__.__subclasses__() if 'wrap_close' in str(c)]",
         "b": "$@a[0].__init__.__globals__['mkdir']('M')"}, ["a", "b"]),
    "globals of a function": ({"a": "$torch.load.__globals__['os'].mkdir('M')"}, ["a"]),
    "hidden builtin": ({"a": f"$[eval for eval in []] or eval(\"{CODE}\")"}, ["a"]),
    "assignment": ({"a": "$(len := __import__)('os').mkdir('M')"}, ["a"]),
    "getattr": ({"a": "$getattr(torch, 'os').mkdir('M')"}, ["a"]),
    "f-string": ({"a": "$f'{__import__(\"os\").mkdir(\"M\")}'"}, ["a"]),
    "requires": ({"a": {"_target_": "Compose", "_requires_": f"${CODE}"}}, ["a#_requires_"]),
    "disabled": ({"a": {"_target_": "Compose", "_disabled_": f"${CODE}"}}, ["a#_disabled_"]),
    "macro": ({"a": {"b": "%hidden#list#0"}, "hidden": {"list": [f"${CODE}"]}}, ["a#b", "hidden#list#0"]),
    "macro of another file": ({"a": "%other.json#x"}, ["a"]),
    "description": ({"_desc_": {"a": f"${CODE}"}, "b": "@_desc_#a"}, ["_desc_#a"]),
    "deep in a list": ({"a": [[{"b": [0, {"c": f"${CODE}"}]}]]}, ["a#0#0#b#1#c"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_config_is_found_and_not_run(tmp_path, monkeypatch, caplog, name):
    config, expected = MALICIOUS[name]
    monkeypatch.chdir(tmp_path)
    Path("train.json").write_text(json.dumps(config))
    Path("other.json").write_text(json.dumps({"x": f"${CODE}"}))
    with caplog.at_level(logging.INFO, logger="workflow.review"):
        assert main(["train.json"]) == 1
    assert [finding.id for finding in review("train.json")] == expected
    assert all(f"train.json: {id}: " in caplog.text for id in expected)
    assert f"{len(expected)} finding(s) in 1 file(s)" in caplog.text
    assert not Path("M").exists()
    parser = ConfigParser(ConfigParser.load_config_files(["train.json"]))
    for id in config:
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            parser.get_parsed_content(id)
    assert Path("M").exists()  # it is one that would have


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("[s // 8 for s in @image_size] + [len(@train#dataset)]", set()),
        ("lambda output: output['loss']", set()),
        ("@##above.path", set()),
        ("open(@path).read()", {"open", "read"}),
        ("torch.hub.load('a', 'b')", {"hub", "load"}),
        ("lambda x: __import__('os').system(x)", {"__import__", "system"}),
        ("lambda torch: torch", {"torch"}),
        ("[len for len in [1]]", {"len"}),
        ("ｅｖａｌ('1')", {"eval"}),
        ("__local_refs['a']", {"__local_refs"}),
        ("{1: 2 for x in []}", {"DictComp"}),
        ("9 ** 9", {"Pow"}),
        ("1 +", {"no Python expression"}),
        ("1\nimport os", {"no Python expression"}),
        ("a\0", {"no Python expression"}),
        ("'" + 100 * "a" + "'", {"longer than 100 characters"}),
        ("-" * 90 + "1", set()),
    ],
)
def test_what_an_expression_says_outside_the_vocabulary(expression, found):
    assert foreign(expression) == found


def test_the_debugger_is_no_mode():
    config = {"a": {"_target_": "Compose", "_mode_": "debug"}, "b": {"_target_": "Compose", "_debug_": True}}
    assert [f.id for f in findings(config)] == ["a#_mode_", "b#_debug_"]
    assert list(findings({"a": {"_target_": "Compose", "_mode_": "callable"}})) == []


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", "{", "JSONDecodeError"),
        ("a.json", "[]", "expected an object, found list"),
        ("a.json", '{"a": {"b": 1, "b": "$x"}}', "given twice in one object: b"),
        ("a.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "RecursionError"),
        ("a.yaml", "a: 1", "only JSON is reviewed"),
        ("gone.json", None, "FileNotFoundError"),
    ],
)
def test_what_cannot_be_read_is_no_clean_config(tmp_path, name, text, reason):
    if text is not None:
        (tmp_path / name).write_text(text)
    found = review(tmp_path / name)
    assert len(found) == 1
    assert reason in found[0].reason
    assert main([str(tmp_path / name)]) == 1


def test_no_target_reaches_beyond_its_function():
    """Each is a component of MONAI by its short name, or a plain path whose last part alone is upper case or ours."""
    assert not {name for name in TARGETS if "_" in (name[0], name[-1]) or "load" in name.split(".")[-1]}
    assert not {name for name in NAMES | ATTRIBUTES if name.startswith("_")}


def test_the_command_in_a_bundles_folder(root, tmp_path):
    """Ours pass, a foreign one does not, and nothing heavy is imported for it."""
    evil = tmp_path / "evil.json"
    evil.write_text(json.dumps({"a": f"${CODE}"}))
    for bundle in ("voco2d_pretrain", "rsna_cnn_lstm"):
        folder = root / "bundles" / bundle
        ours = sorted(str(path.relative_to(folder)) for path in folder.glob("configs/*.json"))
        command = [sys.executable, "-X", "importtime", "-m", "workflow.review"]
        done = subprocess.run([*command, *ours], cwd=folder, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout.split(";")[0]) == (0, f"0 finding(s) in {len(ours)} file(s)")
        assert "torch" not in done.stderr
        done = subprocess.run([*command, str(evil)], cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert f"{evil}: a: ${CODE}: an expression outside the vocabulary: __import__, mkdir" in done.stdout
        assert not (folder / "M").exists()
