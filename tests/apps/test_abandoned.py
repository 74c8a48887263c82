# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""What a client no longer waits for is not done, and what goes wrong with one image ends nothing else."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from anyio import CapacityLimiter
from starlette.requests import Request

from apps.monailabel.lib.abandoned import Abandoned, result_of, while_asked
from apps.monailabel.lib.bundles import Setup, use_bundle

from .conftest import ROOT

use_bundle(ROOT / "bundles" / "rsna_cnn_lstm")  # as the app does before it imports the modules below

from apps.monailabel.lib import inference  # noqa: E402
from apps.monailabel.lib.errors import AppError, Conflict, Unusable  # noqa: E402
from apps.monailabel.lib.infer_task import InjuryBatchInfer  # noqa: E402
from apps.monailabel.lib.volumes import FileCache  # noqa: E402


class Clients:
    """Requests whose clients hang up when they are told to; one worker does their work."""

    def __init__(self) -> None:
        self.worker, self.threads = ThreadPoolExecutor(1), CapacityLimiter(2)
        self.begun, self.free, self.done = threading.Event(), threading.Event(), []

    def work(self, name: str) -> str:
        self.begun.set()
        self.free.wait(30)
        self.done.append(name)
        return name

    def ask(self, name: str, hangs_up: asyncio.Event) -> asyncio.Task[str]:
        async def receive() -> dict[str, str]:
            await hangs_up.wait()
            return {"type": "http.disconnect"}

        request = Request({"type": "http"}, receive)
        return asyncio.create_task(while_asked(request, self.threads, result_of, self.worker, self.work, name))


def test_what_waits_for_a_client_that_has_gone_is_not_done() -> None:
    async def scene() -> list[object]:
        hang_up, never = asyncio.Event(), asyncio.Event()
        asked = [clients.ask("runs", hang_up)]
        await asyncio.to_thread(clients.begun.wait, 30)
        asked += [clients.ask(f"waits {number}", hang_up) for number in range(5)]  # in the queue, or for a thread
        await asyncio.sleep(0.2)
        asked.append(clients.ask("stays", never))
        hang_up.set()
        await asyncio.sleep(1)
        clients.free.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    clients = Clients()
    *gone, stays = asyncio.run(scene())
    assert clients.done == ["runs", "stays"]
    assert stays == "stays"
    assert all(isinstance(error, Abandoned) for error in gone[1:])


def test_an_error_and_a_result_come_as_they_are() -> None:
    def refuse() -> None:
        raise Unusable("no series")

    async def ask(function: Callable[[], object]) -> object:
        return await while_asked(Request({"type": "http"}, asyncio.Event().wait), CapacityLimiter(1), function)

    assert asyncio.run(ask(lambda: 7)) == 7
    with pytest.raises(Unusable, match="no series"):
        asyncio.run(ask(refuse))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory at /secret"), Conflict, "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Conflict, "not enough memory"),
        (MemoryError(), Conflict, "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/secret/x"), Conflict, "No space left on device"),
        (RuntimeError("CUDA error at /secret"), AppError, "failed with RuntimeError"),
    ],
)
def test_what_the_machine_cannot_do_is_no_fault_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[AppError], words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(inference, "_run", fail)
    setup = Setup(tmp_path, ROOT / "bundles", ("rsna_cnn_lstm",), {}, tmp_path / "model.pt", tmp_path, "cpu", 1)
    with pytest.raises(AppError, match=f"a/b: .*{words}") as caught:
        inference.predict(setup, tmp_path, setup.weights, name="a/b")
    assert type(caught.value) is kind
    assert "/secret" not in str(caught.value)


class Images:
    def __init__(self, *names: str) -> None:
        self.names = names

    def list_images(self) -> list[str]:
        return list(self.names)


def test_batch_inference_goes_on_whatever_happens() -> None:
    failures = {"a": Unusable("a: no series"), "b": ZeroDivisionError("in /secret"), "c": None}

    def infer(request: dict[str, object], _store: object) -> dict[str, object]:
        if failures[request["image"]] is not None:
            raise failures[request["image"]]
        return {"label": "c", "tag": "original", "params": {}}

    done = InjuryBatchInfer()({"images": "all"}, Images("a", "b", "c"), infer)
    assert done["a"] == {"error": "a: no series"}
    assert done["b"] == {"error": "failed with ZeroDivisionError; the server's log says why"}
    assert done["c"]["label"] == "c"
    with pytest.raises(Unusable, match="all 2 images failed; the first: a: no series"):
        InjuryBatchInfer()({"images": "all"}, Images("a", "b"), infer)


def test_a_file_that_is_there_waits_for_no_other(tmp_path: Path) -> None:
    cache, free = FileCache(tmp_path, 3), threading.Event()
    cache.get("old", ".bin", lambda file: file.write(b"old"))

    def slowly(file: object) -> None:
        free.wait(30)

    maker = threading.Thread(target=cache.get, args=("new", ".bin", slowly))
    maker.start()
    time.sleep(0.1)
    asked = ThreadPoolExecutor(1).submit(cache.get, "old", ".bin", slowly)
    try:
        assert asked.result(5).read_bytes() == b"old"
    finally:
        free.set()
        maker.join()
