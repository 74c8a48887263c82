# Copyright (c) the 2D-VoCo bundles authors.
# SPDX-License-Identifier: Apache-2.0
"""The review page as a reader uses it: Debian's chromium without a window, on a real server."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transforms.series import LoadSeries

pytestmark = pytest.mark.debian

DATA = Path(__file__).resolve().parents[1] / "data"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader",  # WebGL 2 without a graphics card
)  # fmt: skip
CHEST, ABDOMEN, BROKEN = "chest.nii.gz", "case 7/venous", "broken.nii.gz"
HOSTILE = "<img src=x onerror=\"document.title='ran'\"><script>document.title='ran'<script>&amp;.nii.gz"


class Page:
    """The page in chromium, on a server."""

    def __init__(self, driver, server) -> None:
        self.driver, self.server = driver, server

    def load(self) -> None:
        self.driver.get("about:blank")
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(f"{self.server.url}/review/")
        self.wait("document.body.classList.contains('ready')")

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, condition: str, *arguments: object, timeout: float = 60) -> None:
        end = time.time() + timeout
        while not self.run(condition, *arguments):
            if time.time() > end:
                pytest.fail(f"after {timeout} s not {condition}: {self.text('body')}")
            time.sleep(0.1)

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.run("document.querySelector(arguments[0]).innerText", selector)

    def ids(self) -> list[str]:
        return self.run("[...document.querySelectorAll('#studies li')].map(item => item.dataset.id)")

    def item(self, image: str):
        return self.run("[...document.querySelectorAll('#studies li')].find(i => i.dataset.id === arguments[0])", image)

    def open(self, image: str) -> None:
        self.item(image).find_element("css selector", "button").click()
        self.wait("document.getElementById('title').textContent === arguments[0]", image)

    def show(self, image: str) -> None:
        """Opens a study and waits for the volume and the prediction."""
        self.open(image)
        self.wait("document.getElementById('view').classList.contains('shown')")
        self.wait("/^(Version|No prediction)/.test(document.getElementById('answer').textContent)")

    def save(self) -> None:
        """Stores the label, and waits for the list of studies, which is loaded again then."""
        self.run("document.querySelectorAll('#studies li').forEach(item => { item.dataset.old = 1; })")
        self.find("#save").click()
        self.wait("document.getElementById('label-state').dataset.state === 'stored'")
        self.wait("!document.querySelector('#studies [data-old]')")

    def set(self, slider: str, value: float) -> None:
        """As a drag of the slider does."""
        self.run("""(() => { const slider = document.getElementById(arguments[0]); slider.value = arguments[1];
                    slider.dispatchEvent(new Event('input', {bubbles: true})); })()""", slider, value)  # fmt: skip
        self.drawn()

    def drawn(self) -> None:
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))")

    def viewer(self, name: str) -> float:
        return self.run(f"reviewPage.viewer.{name}")

    def picture(self) -> np.ndarray:
        """What the canvas shows, in grey levels."""
        return np.asarray(Image.open(io.BytesIO(self.find("#canvas").screenshot_as_png)).convert("L"), dtype=float)

    def messages(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    started.set_window_size(1500, 1000)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    shutil.copy(DATA / "lidc_idri_0001.nii.gz", folder / CHEST)
    shutil.copytree(DATA / "crlm_ct_1004", folder / ABDOMEN)
    shutil.copy(DATA / "cptac_pda_c3l_00189.nii.gz", folder / HOSTILE)
    (folder / BROKEN).write_bytes(b"no volume")
    return folder


@pytest.fixture(scope="module")
def server(start_server, studies: Path):
    return start_server(studies)


@pytest.fixture
def page(driver, server) -> Page:
    made = Page(driver, server)
    made.load()
    return made


def expected_picture(image: Path, slice_number: int, centre: float, width: float, shape: tuple[int, ...]) -> np.ndarray:
    """The slice as a radiologist expects it, scaled into the canvas: the patient's right on the left, anterior up."""
    volume = LoadSeries()(image)
    plane = volume[0, :, :, volume.shape[-1] - slice_number].numpy()[::-1, ::-1].T.astype(float)
    spacing = np.linalg.norm(volume.affine[:3, :2].numpy(), axis=0)
    size = np.array(plane.shape[::-1]) * spacing
    size = (size * min(shape[1] / size[0], shape[0] / size[1])).round().astype(int)
    grey = np.clip((plane - centre + width / 2) / width, 0, 1) * 255
    shown = np.zeros(shape)
    left, top = (shape[1] - size[0]) // 2, (shape[0] - size[1]) // 2
    shown[top : top + size[1], left : left + size[0]] = np.asarray(Image.fromarray(grey).resize(tuple(size)))
    return shown


def alike(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def test_nothing_is_shown_before_a_study_is_open(page):
    assert page.run("getComputedStyle(document.getElementById('canvas')).visibility") == "hidden"
    assert page.text("#message") == "Open a study from the list."
    assert page.run("document.getElementById('controls').disabled") is True
    assert "not for clinical use" in page.text("header")
    assert sorted(page.ids()) == sorted([CHEST, ABDOMEN, BROKEN, HOSTILE])
    assert page.text("#version") == "shipped"


def test_studies_are_scored_and_listed_by_their_uncertainty(page):
    assert "no score yet" in page.text("#studies")
    page.find("#score").click()
    page.wait("document.getElementById('score').disabled")
    page.wait("!document.getElementById('score').disabled", timeout=180)
    assert page.text("#score-state") == ""
    notes = {image: page.server.get("/datastore/image/info", params={"image": image}).json() for image in page.ids()}
    scored = [image for image in notes if "entropy" in notes[image]]
    assert sorted(scored) == sorted([CHEST, ABDOMEN, HOSTILE])
    assert page.ids() == [*sorted(scored, key=lambda image: -notes[image]["entropy"]), BROKEN]
    assert f"{notes[CHEST]['entropy']:.3f}" in page.item(CHEST).text
    assert "cannot be read" in page.item(BROKEN).text


@pytest.mark.parametrize("image", [CHEST, ABDOMEN])
def test_slices_and_windows_are_drawn_as_they_should_be(page, studies, image):
    page.show(image)
    slices = LoadSeries()(studies / image).shape[-1]
    assert (page.viewer("slices"), page.viewer("slice")) == (slices, -(-slices // 2))
    assert (page.viewer("centre"), page.viewer("width")) == (40, 400)
    page.drawn()
    before = page.picture()
    page.set("slice", 2)
    assert page.viewer("slice") == 2
    assert page.text("#slice-text") == f"2 / {slices}"
    second = page.picture()
    assert np.abs(second - before).mean() > 1
    expected = expected_picture(studies / image, 2, 40, 400, second.shape)
    assert alike(second, expected) > 0.97
    assert alike(second, expected[:, ::-1]) < alike(second, expected) - 0.02
    assert alike(second, expected[::-1]) < alike(second, expected) - 0.02
    page.set("centre", -600)
    page.set("width", 1500)
    assert (page.viewer("centre"), page.viewer("width")) == (-600, 1500)
    assert page.text("#window") == "C -600  W 1500"
    lung = page.picture()
    assert np.abs(lung - second).mean() > 10
    assert alike(lung, expected_picture(studies / image, 2, -600, 1500, lung.shape)) > 0.97
    assert page.run("document.querySelector('#presets [aria-pressed=true]').textContent") == "3 Lung"


def test_keys_wheel_and_drag(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    from selenium.webdriver.common.keys import Keys

    page.show(CHEST)
    view = page.find("#view")
    for key, number in [(Keys.HOME, 1), (Keys.ARROW_UP, 1), (Keys.ARROW_DOWN, 2), (Keys.PAGE_DOWN, 7),
                        (Keys.PAGE_UP, 2), (Keys.END, 44), (Keys.ARROW_DOWN, 44)]:  # fmt: skip
        view.send_keys(key)
        assert page.viewer("slice") == number
    ActionChains(page.driver).scroll_from_origin(ScrollOrigin.from_element(view), 0, -100).perform()
    page.wait("reviewPage.viewer.slice === 43")
    for key, window in [("2", [400, 1800]), ("3", [-600, 1500]), ("4", [38, 425]), ("1", [40, 400])]:
        view.send_keys(key)
        assert page.run("[Math.round(reviewPage.viewer.centre), reviewPage.viewer.width]") == window
    ActionChains(page.driver).move_to_element(view).click_and_hold().move_by_offset(50, -20).release().perform()
    assert page.run("[reviewPage.viewer.centre, reviewPage.viewer.width]") == [0, 600]
    ActionChains(page.driver).double_click(view).perform()
    assert page.run("[reviewPage.viewer.centre, reviewPage.viewer.width]") == [0, 600]
    assert page.text("#value").endswith(" HU")
    # keys in a field are text
    page.find("#comment").send_keys("n1")
    assert page.text("#title") == CHEST
    assert page.run("document.getElementById('comment').value") == "n1"


def test_value_under_the_pointer_is_that_of_the_volume(page, studies):
    from selenium.webdriver.common.action_chains import ActionChains

    page.show(CHEST)
    page.set("slice", 12)
    plane = LoadSeries()(studies / CHEST)[0, :, :, -12].numpy()[::-1, ::-1].T
    height = page.picture().shape[0]
    for right, down in [(0, 0), (-90, -40), (120, 30)]:
        ActionChains(page.driver).move_to_element_with_offset(page.find("#canvas"), right, down).perform()
        # the plane is square and as high as the canvas
        column, row = (round(len(plane) * (0.5 + offset / height)) for offset in (right, down))
        around = plane[row - 1 : row + 2, column - 1 : column + 2]
        assert page.text("#value") in {f"{value} HU" for value in around.ravel()}


def test_prediction_and_evidence_are_those_of_the_server(page):
    page.show(CHEST)
    form = {"params": json.dumps({"evidence": True})}
    reply = page.server.post("/infer/rsna_cnn_lstm", params={"image": CHEST, "output": "json"}, data=form).json()
    assert page.text("#answer") == (
        f"Version shipped. Any injury: {100 * reply['any_injury']:.1f} %. Evidence is available."
    )
    z = reply["evidence"]["slice_z_mm"]
    for group, classes in reply["injuries"].items():
        card = page.text(f"[data-group={group}]")
        for name, probability in classes.items():
            assert f"{name}\n{100 * probability:.1f} %" in card
        first = page.find(f"[data-group={group}] .evidence button")
        first.click()
        assert page.viewer("slice") == int(first.text)
        shown = page.run("reviewPage.viewer.millimetres(reviewPage.viewer.slice)")
        assert abs(shown - z[reply["evidence"]["groups"][group]["top_slices"][0]]) <= 7.5 / 2 + 0.1
    page.find("#picture summary").click()
    page.wait("document.getElementById('picture-image').naturalWidth > 500")


def test_another_version_is_chosen_and_answers(page, weights):
    folder = page.server.app / "model" / "rsna_cnn_lstm" / "versions" / "0001"
    (folder / "training").mkdir(parents=True)
    shutil.copy(weights, folder / "training" / "model.pt")
    (folder / "version.json").write_text(json.dumps({"score": 0.6125, "labels": 12, "reason": "<i>better</i>"}))
    page.load()
    page.show(CHEST)
    page.find("#versions summary").click()
    assert "0001\t\t0.6125\t12\t<i>better</i>" in page.text("#version-rows")
    for name in ("0001", "shipped"):
        page.find(f"[aria-label='Use version {name}']").click()
        page.wait("document.getElementById('answer').textContent.startsWith(arguments[0])", f"Version {name}.")
        assert page.text("#version") == name
        listed = page.server.get("/versions/rsna_cnn_lstm").json()
        assert [version["name"] for version in listed if version["chosen"]] == [name]


# in place of `fetch`: requests whose address holds a word are kept back, or answered here
HOLD = """(() => { const fetch = window.fetch; window.held = [];
          window.fetch = async (address, options = {}) => {
              const reply = fetch(address, options);
              if (!String(address).includes(arguments[0])) return reply;
              reply.catch(() => {});
              await new Promise((resolve) => held.push({ resolve, signal: options.signal }));
              return reply; } })()"""
ANSWER = """(() => { const [word, status, body] = arguments; const fetch = window.fetch; window.asked = 0;
            window.fetch = (address, options) => {
                if (!String(address).includes(word)) return fetch(address, options);
                asked += 1;
                const text = Array.isArray(body) ? body[Math.min(asked, body.length) - 1] : body;
                return Promise.resolve(new Response(text, { status })); } })()"""
DRAWN = "document.getElementById('answer').textContent.startsWith(arguments[0])"


def choose(page: Page, version: str) -> None:
    """As another reader does, or a training."""
    assert page.server.put("/versions/rsna_cnn_lstm", params={"version": version}).ok


def test_a_version_that_comes_into_use_elsewhere_answers_after_a_refresh(page):
    page.show(CHEST)
    assert page.text("#answer").startswith("Version shipped.")
    choose(page, "0001")
    page.find("#refresh").click()
    page.wait(DRAWN, "Version 0001.")
    assert page.text("#version") == "0001"
    choose(page, "shipped")
    page.find("#refresh").click()
    page.wait(DRAWN, "Version shipped.")


def test_an_answer_of_a_version_that_is_no_longer_in_use_is_not_shown(page):
    choose(page, "0001")
    page.show(CHEST)  # the reply says a version that the page did not know to be in use
    assert page.text("#answer").startswith("Version 0001.")
    assert page.text("#version") == "0001"
    page.run(HOLD, "infer/")
    choose(page, "shipped")
    page.find("#refresh").click()
    page.wait("held.length === 1")
    choose(page, "0001")  # and back, before the answer of the other one
    page.find("#refresh").click()
    page.wait(DRAWN, "Version 0001.")
    page.run("held[0].resolve()")
    page.driver.execute_async_script("setTimeout(arguments[0], 500)")
    assert page.text("#answer").startswith("Version 0001.")
    choose(page, "shipped")


def test_a_prediction_of_a_study_that_was_left_is_given_up(page):
    page.run(HOLD, "infer/")
    page.open(CHEST)
    page.wait("held.length === 1")
    page.open(ABDOMEN)
    assert page.run("held[0].signal.aborted") is True
    page.wait("held.length === 2")
    assert page.run("held[1].signal.aborted") is False
    page.run("held.forEach(({ resolve }) => resolve())")
    page.wait(DRAWN, "Version shipped.")
    assert page.text("#title") == ABDOMEN


@pytest.mark.parametrize(("status", "advice"), [(401, "MONAI_LABEL_AUTH_ENABLE"), (403, "MONAI_LABEL_CORS_ORIGINS")])
def test_a_server_that_asks_for_a_log_in_is_explained(page, status, advice):
    page.run(ANSWER, "review/studies", status, '{"detail": "Not this way"}')
    page.find("#refresh").click()
    page.wait("document.getElementById('error').textContent !== ''")
    assert advice in page.text("#error")
    assert f"({status}: Not this way)" in page.text("#error")


def test_thousands_of_studies(page):
    """The first are listed, a filter finds the others, and an edit touches one item alone."""
    page.show(CHEST)
    rows = [{"id": CHEST, "label": None, "entropy": 0.5}]
    rows += [{"id": f"study {i:04d}", "label": None, "entropy": None} for i in range(4999)]
    page.run(ANSWER, "review/studies", 200, json.dumps(rows))
    page.find("#refresh").click()
    page.wait("document.getElementById('count').textContent === '5000, 0 labelled'")
    assert len(page.ids()) == 200
    assert page.text("#more") == "4800 more: filter by id to see them."
    page.run("""(() => { window.changes = 0; new MutationObserver((records) => { for (const record of records)
                changes += record.addedNodes.length; }).observe(document.getElementById('studies'),
                { childList: true }); })()""")
    page.find("[aria-label='liver: low']").click()
    page.drawn()
    assert page.run("changes") == 1
    assert "not saved" in page.item(CHEST).text
    page.find("#filter").send_keys("4321")
    page.drawn()
    assert page.ids() == ["study 4321"]
    assert page.text("#more") == ""
    page.run("reviewPage.state.drafts.clear()")


def test_the_list_is_loaded_again_when_the_count_of_a_scoring_changes(page):
    task = [{"status": "RUNNING", "details": lines} for lines in ([], [], ["3 of 9: a: entropy 0.5"])]
    task += [task[-1], {"status": "DONE", "details": []}]
    page.run(ANSWER, "scoring/", 200, [json.dumps(state) for state in task])
    page.requests()
    page.run("performance.clearResourceTimings()")
    page.find("#score").click()
    page.wait("asked >= 3 && document.getElementById('score-state').textContent.includes('3 of 9')")
    page.wait("!document.getElementById('score').disabled")
    loaded = "performance.getEntriesByType('resource').filter(({ name }) => name.endsWith('review/studies')).length"
    assert page.run(loaded) == 2, "once for a new count, and once at the end"


def test_reader_corrects_a_label_and_goes_on(page):
    page.show(CHEST)
    assert page.text("#label-state") == "No label yet."
    assert page.run("[...document.querySelectorAll('#groups input:checked')].map(radio => radio.value)") == [""] * 5
    page.find("#save").click()
    assert "at least one group" in page.text("#error")
    page.find("#confirm").click()
    assert page.text("#label-state") == "Not saved yet."
    page.find("[aria-label='kidney: high']").click()
    page.find("[aria-label='bowel: unknown']").click()
    page.find("#reader").clear()
    page.find("#reader").send_keys("A. B.")
    page.find("#comment").send_keys("left <b>kidney</b>")
    page.save()
    stored = page.server.get("/datastore/label", params={"label": CHEST, "tag": "final"}).json()
    assert stored["groups"]["kidney"] == "high"
    assert sorted(stored["groups"]) == ["extravasation", "kidney", "liver", "spleen"]
    assert (stored["reader"], stored["comment"]) == ("A. B.", "left <b>kidney</b>")
    assert "labelled" in page.item(CHEST).text
    assert page.ids()[-2:] == [CHEST, BROKEN]

    page.load()  # a reload finds it
    assert "labelled" in page.item(CHEST).text
    page.show(CHEST)
    assert page.text("#label-state") == "Labelled by A. B.: stored."
    assert page.run("document.querySelector('[aria-label=\"kidney: high\"]').checked") is True
    assert page.run("document.querySelector('[aria-label=\"bowel: unknown\"]').checked") is True

    waiting = [image for image in page.ids() if image not in (CHEST, BROKEN)]
    for image in (waiting[0], waiting[1], waiting[0]):  # of two without a label the other one, never the open one
        page.find("#next").click()
        page.wait("document.getElementById('title').textContent === arguments[0]", image)
        page.wait("document.getElementById('view').classList.contains('shown')")


def test_what_is_not_saved_is_kept_while_another_study_is_open(page):
    page.show(ABDOMEN)
    page.find("[aria-label='liver: low']").click()
    page.show(CHEST)
    assert page.run("document.querySelector('[aria-label=\"liver: low\"]').checked") is False
    assert "not saved" in page.item(ABDOMEN).text
    page.show(ABDOMEN)
    assert page.run("document.querySelector('[aria-label=\"liver: low\"]').checked") is True
    page.run("reviewPage.state.drafts.clear()")  # or the browser would ask before it leaves


def test_a_label_that_is_stored_is_said_to_be_so_when_the_list_fails(page):
    page.show(ABDOMEN)
    page.find("[aria-label='liver: low']").click()
    page.run(ANSWER, "review/studies", 500, '{"detail": "out of order"}')
    page.find("#save").click()
    page.wait("document.getElementById('error').textContent !== ''")
    assert page.text("#error") == ("The label is stored; the list of studies could not be loaded again. out of order")
    assert page.text("#label-state").endswith("stored.")
    assert page.server.get("/datastore/label", params={"label": ABDOMEN, "tag": "final"}).json()["groups"] == {
        "liver": "low"
    }


def test_a_label_of_another_reader_is_not_overwritten_unasked(page):
    def others(**groups: str) -> None:
        label = json.dumps({"groups": groups, "reader": "C. D."})
        params = {"image": ABDOMEN, "tag": "final"}
        assert page.server.put("/datastore/label", params=params, files={"label": ("label.json", label)}).ok

    def stored() -> dict[str, str]:
        return page.server.get("/datastore/label", params={"label": ABDOMEN, "tag": "final"}).json()["groups"]

    others(liver="low")
    page.load()
    page.show(ABDOMEN)
    page.find("[aria-label='liver: high']").click()
    assert page.run("document.getElementById('take').hidden") is True
    others(liver="low", spleen="high")
    page.find("#save").click()
    page.wait("document.getElementById('error').textContent.startsWith('Not saved: the stored label has changed')")
    assert stored() == {"liver": "low", "spleen": "high"}
    told = "Not saved yet. A label was stored since you began, by C. D.: liver low, spleen high."
    assert page.text("#label-state") == told
    assert page.run("document.querySelector('[aria-label=\"liver: high\"]').checked") is True, "the draft is kept"
    page.save()
    assert stored() == {"liver": "high"}

    page.find("[aria-label='kidney: low']").click()
    others(liver="low")
    page.find("#refresh").click()  # or seen before the save
    page.wait("!document.getElementById('take').hidden")
    page.find("#take").click()
    assert page.text("#label-state") == "Labelled by C. D.: stored."
    assert page.run("document.querySelector('[aria-label=\"liver: low\"]').checked") is True
    assert page.run("document.querySelector('[aria-label=\"kidney: unknown\"]').checked") is True
    assert page.server.request("DELETE", "/datastore/label", params={"id": ABDOMEN, "tag": "final"}).ok


def test_a_study_that_was_left_never_comes_into_view(page, studies):
    """The first one is decoded late: long after the second one, which was opened meanwhile, is in view."""
    page.run("""(() => { const load = niivue.NVImage.loadFromUrl; let calls = 0;
                niivue.NVImage.loadFromUrl = async (options) => {
                    const late = calls++ === 0;
                    const image = await load.call(niivue.NVImage, options);
                    if (late) await new Promise((resolve) => { window.release = resolve; });
                    return image; } })()""")
    page.open(CHEST)
    page.wait("window.release !== undefined")
    page.show(ABDOMEN)
    page.run("window.release()")
    page.driver.execute_async_script("setTimeout(arguments[0], 300)")
    assert page.run("reviewPage.viewer.nv.volumes.length") == 1
    assert page.viewer("slices") == LoadSeries()(studies / ABDOMEN).shape[-1]
    page.drawn()
    shown = page.picture()
    assert alike(shown, expected_picture(studies / ABDOMEN, page.viewer("slice"), 40, 400, shown.shape)) > 0.97


def test_series_that_cannot_be_read_shows_the_reason_and_no_picture(page, studies):
    page.show(CHEST)
    page.open(BROKEN)
    page.wait("document.getElementById('message').classList.contains('failed')")
    assert page.text("#message").startswith(f"This study cannot be shown. {BROKEN}: expected a readable NIfTI file")
    assert str(studies) not in page.text("body")
    assert page.run("getComputedStyle(document.getElementById('canvas')).visibility") == "hidden"
    assert page.run("reviewPage.viewer.slices") == 0
    assert page.run("document.getElementById('form').hidden") is True


def test_names_of_files_are_text_and_the_page_asks_nobody_else(page):
    page.show(HOSTILE)
    assert page.text("#title") == HOSTILE
    assert page.driver.title == "Injury review"
    assert page.run("document.querySelectorAll('img[src=x], li script').length") == 0
    page.find("[aria-label='spleen: healthy']").click()
    page.save()
    assert page.server.get("/datastore/label", params={"label": HOSTILE, "tag": "final"}).ok
    asked = {url for url in page.requests() if not url.startswith(("data:", "blob:"))}
    assert all(url.startswith(page.server.url + "/") for url in asked)
    assert f"{page.server.url}/review/niivue.umd.js" in asked
    # but for the question whether there is a label, to which the browser writes down that there was none
    assert [said for said in page.messages() if "/datastore/label?" not in said] == []


def test_policy_stops_what_a_page_without_it_would_ask_for(page):
    """That no other request was seen above means something."""
    page.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    page.run(
        "document.head.append(Object.assign(document.createElement('script'), {text: 'document.title = \"ran\"'}))"
    )
    page.wait("performance.now() > 0")
    assert page.driver.title == "Injury review"
    said = " ".join(page.messages())
    assert "127.0.0.1:9" in said
    assert said.count("Content Security Policy") >= 2


def test_without_weights_the_volume_is_shown_and_can_be_labelled(driver, start_server, tmp_path):
    shutil.copy(DATA / "cptac_pda_c3l_00189.nii.gz", tmp_path / "a.nii.gz")
    page = Page(driver, start_server(tmp_path, shipped=None))
    page.load()
    page.show("a.nii.gz")
    assert page.text("#answer").startswith("No prediction. there are no weights yet")
    assert page.run("document.getElementById('confirm').disabled") is True
    page.find("[aria-label='liver: low']").click()
    page.save()
    stored = page.server.get("/datastore/label", params={"label": "a.nii.gz", "tag": "final"}).json()
    assert stored["groups"] == {"liver": "low"}
    page.server.stop()
    page.find("#next").click()
    page.wait("document.getElementById('error').textContent === 'The server does not answer.'")
