# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Nothing stays silently random: N of M tensors, and what does not fit is refused."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine
from safetensors.torch import save_file
from torch import nn
from workflow.weights import WeightsError, WeightsLoader, load_weights, read_weights


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.rand_like(t.float()).to(t.dtype) for name, t in network().state_dict().items()}


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_loaded(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_a_flat_file_loads_all_of_all(tmp_path, state, caplog):
    module, path = network(), saved(state, tmp_path / "model.pt")
    with caplog.at_level(logging.INFO):
        assert load_weights(module, path) == (9, 9)
    assert_loaded(module, state)
    assert f"9 of 9 backbone tensors loaded from {path}" in caplog.text


PREFIXES = st.lists(st.sampled_from(["module.", "_orig_mod.", "model_state_dict."]), max_size=3, unique=True)


@given(prefixes=PREFIXES, key=st.sampled_from([None, "backbone", "network", "model", "state_dict"]))
@settings(deadline=None, max_examples=40)
def test_wrappers_prefixes_and_checkpoints_are_unwrapped(tmp_path_factory, prefixes, key):
    source = network()
    content: dict = {"".join(prefixes) + name: tensor for name, tensor in source.state_dict().items()}
    if key is not None:
        content = {"epoch": 3, key: content, "optimizer": {"state": {}}}
    module = network()
    assert load_weights(module, saved(content, tmp_path_factory.getbasetemp() / "wrapped.pt")) == (9, 9)
    assert_loaded(module, source.state_dict())


def test_a_prefix_of_some_names_is_no_wrapper(tmp_path, state):
    state["module.extra"] = torch.zeros(1)
    with pytest.raises(WeightsError, match=r"9 of 9 backbone tensors fit; 1 unexpected \(such as module.extra\)"):
        load_weights(network(), saved(state, tmp_path / "a.pt"))


def test_safetensors(tmp_path, state):
    module = network()
    save_file(state, tmp_path / "model.safetensors")
    assert load_weights(module, tmp_path / "model.safetensors") == (9, 9)
    assert_loaded(module, state)
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(WeightsError, match=r"broken.safetensors: not readable"):
        read_weights(tmp_path / "broken.safetensors")


def test_a_mismatch_is_refused_with_counts_and_names(tmp_path, state):
    before = network()
    module = network()
    module.load_state_dict(before.state_dict())
    del state["1.running_mean"], state["1.running_var"]
    state["head.weight"] = torch.zeros(1)
    state["3.weight"] = torch.zeros(2, 5)
    path = saved(state, tmp_path / "m.pt")
    expected = (
        r"m.pt: 6 of 9 stem tensors fit; 2 missing \(such as 1.running_mean, 1.running_var\); "
        r"1 unexpected \(such as head.weight\); 1 of another shape \(such as 3.weight\). Is it the same"
    )
    with pytest.raises(WeightsError, match=expected):
        load_weights(module, path, what="stem")
    assert_loaded(module, before.state_dict())  # nothing was copied


def test_partial_loading_is_asked_for_and_told(tmp_path, state, caplog):
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    del state["3.bias"]
    with caplog.at_level(logging.INFO):
        assert load_weights(module, saved(state, tmp_path / "a.pt"), allow_partial=True) == (8, 9)
    assert_loaded(module, {**state, "3.bias": before["3.bias"]})
    assert "8 of 9 backbone tensors" in caplog.text
    assert "left as they were: 1 missing (such as 3.bias)" in caplog.text


@pytest.mark.parametrize("allow_partial", [False, True])
def test_a_file_of_which_nothing_fits_is_refused_always(tmp_path, allow_partial):
    path = saved({"a": torch.zeros(1), "b": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"other.pt: 0 of 9 .* 9 missing .* 2 unexpected \(such as a, b\)"):
        load_weights(network(), path, allow_partial=allow_partial)


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("how", ["torch", "plain pickle"])
def test_a_file_that_would_run_code_is_refused(tmp_path, how):
    path, content = tmp_path / "evil.pt", {"a": torch.zeros(1), "b": Malicious(tmp_path / "marker")}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError, match=r"evil.pt: (refused, it holds more than tensors|not readable)"):
        read_weights(path)
    assert not (tmp_path / "marker").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False) if how == "torch" else pickle.loads(path.read_bytes())
    assert (tmp_path / "marker").exists()  # the file is one that would have


def test_no_weights_file_is_said_to_be_none(tmp_path, state):
    with pytest.raises(WeightsError, match=r"no.pt: expected a weights file, found none"):
        read_weights(tmp_path / "no.pt")
    with pytest.raises(WeightsError, match="found none"):
        read_weights(tmp_path)
    whole = saved(state, tmp_path / "a.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    for name in ("cut.pt", "text.pt", "empty.pt"):
        with pytest.raises(WeightsError, match=name):
            read_weights(tmp_path / name)
    with pytest.raises(WeightsError, match=r"expected a state dict of tensors, found \['a', 'b'\]"):
        read_weights(saved({"b": 1, "a": torch.zeros(1)}, tmp_path / "mixed.pt"))
    with pytest.raises(WeightsError, match="found list"):
        read_weights(saved([torch.zeros(1)], tmp_path / "list.pt"))


def test_the_handler_loads_at_the_start_or_says_that_it_does_not(tmp_path, state, caplog):
    module, engine = network(), Engine(lambda *_: None)
    WeightsLoader(str(saved(state, tmp_path / "a.pt")), module).attach(engine)
    other = network()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    WeightsLoader(None, other, what="head").attach(engine)
    with caplog.at_level(logging.INFO):
        engine.run([0])
    assert_loaded(module, state)
    assert_loaded(other, before)
    assert "head: no weights given, random initialisation" in caplog.text
