# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face Hub on 127.0.0.1: takes a repository, a commit and a tag, and remembers them."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


class StandInHub(BaseHTTPRequestHandler):
    """Answers as the Hub's interface does to `HfApi.create_repo`, `upload_folder` and `create_tag`."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._reply({"id": "me/bundle", "sha": COMMIT, "siblings": [], "private": True})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        self.server.requests.append((path, self.headers.get("Authorization")))
        if path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self._reply({"files": files})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/me/bundle/commit/{COMMIT}"
            self._reply({"success": True, "commitOid": COMMIT, "commitUrl": url})
        elif "/tag/" in path:
            self.server.tags.append(json.loads(body)["tag"])
            self._reply({})
        else:
            self._reply({"url": f"{self.server.address}/me/bundle", "name": "me/bundle", "id": "1"})

    def _reply(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""


class HubServer(ThreadingHTTPServer):
    """What was sent: requests (path, authorization), files of the commit, tags."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StandInHub)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str | None]] = []
        self.files: dict[str, bytes] = {}
        self.tags: list[str] = []


@contextmanager
def stand_in_hub() -> Iterator[HubServer]:
    """The server, answering in a thread of its own."""
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
