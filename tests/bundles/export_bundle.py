# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""Exports a bundle's network in every documented way and compares with PyTorch itself: run by test_export.py as
`python -c`, with the bundle's folder as working directory.

Arguments: a JSON object with `out`, `root` (for files), `converter` (MONAI's converter_kwargs, as in the README),
`variants` (overrides of inference.json each) and `thorough`: the first variant for the input that metadata.json names,
and `torch.export` and TensorRT's ONNX besides MONAI's commands.
"""

from __future__ import annotations

import copy
import json
import sys
from ast import literal_eval
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from monai.bundle import ConfigParser, ckpt_export, onnx_export
from monai.networks.trt_compiler import TrtCompiler
from torch import Tensor, nn

FILES = {"meta_file": "configs/metadata.json", "config_file": "configs/inference.json", "net_id": "network_def"}


def network_of(variant: dict[str, Any]) -> nn.Module:
    """Of the config with these overrides, with weights that matter in every layer."""
    parser = ConfigParser()
    parser.read_config(FILES["config_file"])
    for name, value in variant.items():
        parser[name] = value
    network: nn.Module = parser.get_parsed_content("network_def")
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def inputs_of(network: nn.Module, side: int = 32) -> list[Tensor]:
    """Three numbers of slices, and several series at once; of a backbone, batches of slices."""
    channels = network.get_parameter(next(name for name, _ in network.named_parameters())).shape[1]
    if hasattr(network, "rnn"):
        return [torch.rand(b, channels, side, side, s) for b, s in ((1, 4), (1, 1), (1, 9), (3, 5))]
    return [torch.rand(batch, channels, side, side) for batch in (1, 4, 9)]


def onnx_session(path: str | Path) -> Any:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def differences(network: nn.Module, exported: Any, inputs: list[Tensor]) -> list[float]:
    """On images of these shapes that no export has seen, of different brightness."""
    fresh = [torch.rand(()) * torch.rand_like(x) for x in inputs]
    return [apart(exported(x), network(x)) for x in fresh]


def by_monai(network: nn.Module, number: int, variant: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """TorchScript and ONNX by MONAI's commands; what they give for three inputs, and for the metadata's."""
    top = Path(arguments["root"])
    weights, script, onnx = (str(top / f"{number}.{suffix}") for suffix in ("pt", "ts", "onnx"))
    torch.save(network.state_dict(), weights)
    inputs = inputs_of(network)
    named = number == 0 and arguments["thorough"]  # the input that metadata.json names
    if named:
        meta = json.loads(Path(FILES["meta_file"]).read_text(encoding="utf-8"))["network_data_format"]["inputs"][
            "image"
        ]
        shape = [1, meta["num_channels"], *meta["spatial_shape"]]
        inputs = [torch.rand(shape), torch.rand([*shape[:-1], 3]), torch.rand([2, *shape[1:-1], 5])]
        inputs = inputs if len(shape) == 5 else [torch.rand([batch, *shape[1:]]) for batch in (1, 3, 5)]
    ckpt_export(filepath=script, ckpt_file=weights, **FILES, **variant)
    onnx_export(filepath=onnx, ckpt_file=weights, use_trace=True, input_shape=None if named else list(inputs[0].shape),
                converter_kwargs=literal_eval(arguments["converter"]), **FILES, **variant)  # fmt: skip
    dark, bright = (network(level * torch.rand_like(inputs[0])) for level in (0.1, 1))
    return {
        "torchscript": differences(network, torch.jit.load(script), inputs),
        "onnx": differences(network, onnx_session(onnx), inputs),
        "spread": apart(dark, bright),
    }


def by_torch_export(network: nn.Module, path: Path) -> dict[str, Any]:
    """`torch.export` at three fixed numbers of slices, and what it says of a free one."""
    fixed: list[float] = []
    for x in inputs_of(network)[:3]:
        torch.export.save(torch.export.export(network, (x,)), path)
        fixed += differences(network, torch.export.load(path).module(), [x])
    found: dict[str, Any] = {"fixed": fixed}
    free = torch.export.Dim("free", min=2, max=512)
    if not hasattr(network, "rnn"):
        program = torch.export.export(network, (inputs_of(network)[1],), dynamic_shapes=({0: free},))
        return {**found, "free": differences(network, program.module(), inputs_of(network)[1:])}
    try:
        torch.export.export(network, (inputs_of(network)[0],), dynamic_shapes=({4: free},))
    except torch._dynamo.exc.UserError as error:
        found["free"] = str(error)
    return found


def onnx_for_tensorrt(network: nn.Module, folder: Path) -> list[float]:
    """The ONNX file that MONAI's TrtCompiler hands to TensorRT, with the arguments of `with_engine`, run without it."""
    backbone = getattr(network, "backbone", network)
    channels = inputs_of(network)[0].shape[1]
    found: list[float] = []
    slices = [torch.rand(batch, channels, 32, 32) for batch in (1, 4, 7)]

    def compare(path: str) -> None:
        found.extend(differences(backbone, onnx_session(path), slices))

    compiler = TrtCompiler(copy.deepcopy(backbone), str(folder / "x.plan"), dynamic_batchsize=[1, 4, 7],
                           export_args={"dynamo": False})  # fmt: skip
    compiler._onnx_to_trt = compare
    compiler._build_and_save(copy.deepcopy(backbone), {"x": slices[1]})
    return found


@torch.no_grad()
def main(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    top, found = Path(arguments["root"]), []
    for number, variant in enumerate(arguments["variants"]):
        network = network_of(variant)
        results = by_monai(network, number, variant, arguments)
        if arguments["thorough"]:
            results["torch_export"] = by_torch_export(network, top / f"{number}.pt2")
            results["tensorrt_onnx"] = onnx_for_tensorrt(network, top)
        found.append({"variant": variant, **results})
    Path(arguments["out"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
