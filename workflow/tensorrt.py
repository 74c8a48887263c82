# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The backbone as a TensorRT engine, by MONAI's `trt_compile`, for ``inference_trt.json``. Not run on a GPU yet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from monai.networks import trt_compile
from torch import nn

__all__ = ["TensorRTError", "with_engine"]


class TensorRTError(RuntimeError):
    """TensorRT was asked for and cannot be had."""


def with_engine(
    network: nn.Module,
    path: str | os.PathLike[str],
    batch: Sequence[int],
    *,
    submodule: str | None = None,
    precision: str = "fp16",
    weights: str | Sequence[str] | None = None,
) -> nn.Module:
    """The network itself, whose slices go through a TensorRT engine that its first forward pass builds.

    Without a GPU or the packages `trt_compile` warns and goes on in plain PyTorch; one who asked for TensorRT is told.

    Args:
        network: on its CUDA device.
        path: of the engine, to which ``.plan`` is added; in the run's folder, for an engine holds the weights.
        batch: least, usual and largest number of slices in a pass.
        submodule: what to compile, such as ``backbone``; None for the network itself.
        precision: fp32, tf32, fp16 or bf16.
        weights: what the run loads: one file, since the engine keeps those that it was built with.

    Raises:
        TensorRTError: without a CUDA device or a package that `trt_compile` needs, or for an ensemble.
    """
    lacking = [] if torch.cuda.is_available() else ["a CUDA device"]
    lacking += [f"the package {name}" for name in ("tensorrt", "polygraphy", "onnx") if find_spec(name) is None]
    lacking += [] if _has_cuda_bindings() else ["the package cuda-python"]
    if lacking:
        raise TensorRTError(f"inference_trt.json needs {', '.join(lacking)}: leave it out to run without TensorRT")
    if isinstance(weights, Sequence) and not isinstance(weights, str) and len(weights) > 1:
        raise TensorRTError(f"weights: an engine holds those of one file, got {len(weights)}")
    arguments = {"precision": precision, "dynamic_batchsize": list(batch), "export_args": {"dynamo": False}}
    compiled: nn.Module = trt_compile(network, os.fspath(path), args=arguments, submodule=submodule)
    return compiled


def _has_cuda_bindings() -> bool:
    """`trt_compile` takes either module, of a newer or an older cuda-python."""
    return find_spec("cuda") is not None and any(map(find_spec, ("cuda.bindings", "cuda.cudart")))
