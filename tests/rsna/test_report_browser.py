# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: Debian's chromium without a window, driven by its chromedriver."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from bundles.rsna_cnn_lstm.scripts.report import write_report
from tests.rsna.report_runs import TABLE, volumes, write_run

pytestmark = pytest.mark.debian

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
# a name whose request would show that the page asks for something; nothing answers on this port
OUTSIDE = "http://127.0.0.1:9/picture.png"


class Browser:
    """Chromium, and what it said and asked for since the page was opened."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))

    def open(self, path: Path, width: int = 1200, height: int = 1600) -> None:
        self.driver.set_window_size(width, height)
        self.driver.get("about:blank")  # the browser's own first page, and the page before, have their say
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(path.as_uri())

    def messages(self) -> list[str]:
        """The console's."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> dict[str, str]:
        """Addresses asked for, and what stopped each if the browser did; data within the page are no requests."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        stopped = {e["params"]["requestId"]: e["params"].get("blockedReason", "")
                   for e in events if e["method"] == "Network.loadingFailed"}  # fmt: skip
        asked = {e["params"]["request"]["url"]: stopped.get(e["params"]["requestId"], "")
                 for e in events if e["method"] == "Network.requestWillBeSent"}  # fmt: skip
        return {url: reason for url, reason in asked.items() if not url.startswith("data:")}

    def evaluate(self, script: str) -> object:
        return self.driver.execute_script(f"return {script}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "earlier", skill=0.5)
    folder = write_run(root / "now")
    with SummaryWriter(root / "training" / "tensorboard") as events:
        for epoch in range(1, 4):
            events.add_scalar("loss", 9.0 - epoch, epoch)
            events.add_scalar("negative_score", -0.9 + 0.1 * epoch, epoch)
    (root / "README.txt").write_text("SYNTHETIC", encoding="utf-8")
    patients = pd.read_csv(folder / "predictions.csv")["patient_id"].tolist()
    weights = root / "training" / "model.pt"
    return write_report(folder, TABLE, dataset_dir=root, dataset=volumes(patients), weights=weights)


def test_page_shows_what_was_computed_and_asks_for_nothing(browser, report):
    browser.open(report)
    assert browser.requests() == {report.as_uri(): ""}
    assert browser.messages() == []
    metrics = json.loads((report.parent / "metrics.json").read_text(encoding="utf-8"))
    text = browser.evaluate("document.body.innerText")
    for value in [metrics["score"], metrics["mAP"], *metrics["score_terms"].values(), *metrics["auc"].values()]:
        assert f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" in text
    assert f"{metrics['baseline']['score']:.3f}" in text
    assert "SYNTHETIC DATA" in text
    assert "Research software, not for diagnosis" in text


def test_every_picture_is_drawn(browser, report):
    browser.open(report)
    sizes = browser.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.width])")
    assert len(sizes) == 7 + 2 * 5
    assert all(complete and min(rest) > 100 for complete, *rest in sizes)


def test_folded_tables_open_and_links_lead_to_their_sections(browser, report):
    browser.open(report)
    shown = "document.querySelector('details table').checkVisibility()"
    assert browser.evaluate(shown) is False
    browser.driver.find_element("css selector", "summary").click()
    assert browser.evaluate(shown) is True
    links = browser.driver.find_elements("css selector", "nav a")
    assert len(links) == 9
    links[-1].click()
    target = browser.evaluate("document.querySelector(':target h2').innerText")
    assert target == "Worst-scored patients"


@pytest.mark.parametrize("width", [1200, 500])
def test_screenshot_is_no_blank_and_nothing_runs_out_of_the_page(browser, report, width):
    browser.open(report, width)
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    picture = np.asarray(Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB"))
    assert picture.shape[1] == width
    colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    assert len(colours) > 100
    assert counts.max() / counts.sum() < 0.97


def test_policy_stops_what_a_page_without_it_would_ask_for(browser, report, tmp_path):
    """That no request was seen above means something: one is seen here, and none with the policy."""
    page = report.read_text(encoding="utf-8")
    tempted = page.replace("<main>", f'<main><img src="{OUTSIDE}"><script>document.title = "ran"</script>')
    head, tail = tempted.split('<meta http-equiv="Content-Security-Policy"')
    (tmp_path / "open.html").write_text(head + tail.split(">", 1)[1], encoding="utf-8")
    (tmp_path / "shut.html").write_text(tempted, encoding="utf-8")
    browser.open(tmp_path / "open.html")
    assert browser.requests()[OUTSIDE] == ""
    assert browser.driver.title == "ran"
    browser.open(tmp_path / "shut.html")
    assert browser.requests()[OUTSIDE] == "csp"
    assert browser.driver.title != "ran"
    assert "Content Security Policy" in " ".join(browser.messages())
