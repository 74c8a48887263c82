// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// The review page: one study is open at a time; its volume, the model's prediction and the reader's label.

import { groupCard, studyItem, versionHeader, versionRow } from "./panels.js";
import * as server from "./server.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const PRESETS = [["Soft tissue", 40, 400], ["Bone", 400, 1800], ["Lung", -600, 1500]];

const state = {
  table: null, // groups with their classes
  studies: [],
  open: null, // id of the study in view
  shown: false, // its volume is in view
  predictions: new Map(), // id -> reply of /infer
  drafts: new Map(), // id -> label that is not saved yet
  version: null,
};
const viewer = new Viewer($("canvas"));
globalThis.reviewPage = { state, viewer }; // for the browser's console and for tests

// ---- studies

async function loadStudies() {
  state.studies = await server.studies();
  showStudies();
}

function showStudies() {
  const wanted = $("filter").value.toLowerCase();
  const rows = state.studies.filter((study) => study.id.toLowerCase().includes(wanted)).map((study) =>
    studyItem(study, { current: study.id === state.open, draft: state.drafts.has(study.id), open: openStudy }));
  $("studies").replaceChildren(...rows);
  const labelled = state.studies.filter((study) => study.label).length;
  $("count").textContent = `${state.studies.length}, ${labelled} labelled`;
}

const study = () => state.studies.find((item) => item.id === state.open);

let opening = new AbortController();

async function openStudy(id) {
  opening.abort();
  opening = new AbortController();
  const { signal } = opening;
  Object.assign(state, { open: id, shown: false });
  $("title").textContent = id;
  $("view").classList.remove("shown");
  $("controls").disabled = true;
  for (const name of ["where", "window", "value", "error", "answer"]) $(name).textContent = "";
  $("form").hidden = $("save").disabled = $("confirm").disabled = true;
  $("label-state").textContent = "";
  hidePicture();
  viewer.clear();
  message("Loading …");
  showStudies();
  $("view").focus({ preventScroll: true });
  try {
    const buffer = await server.volume(id, (part) => message(`Loading … ${Math.round(100 * part)} %`), signal);
    if (signal.aborted) return;
    await viewer.show(buffer, signal);
    if (signal.aborted) return;
  } catch (error) {
    if (!signal.aborted) message(`This study cannot be shown. ${error.message}`, true);
    return;
  }
  showVolume();
  await predict(id);
}

const SCORING = ["SUBMITTED", "RUNNING"];
const pause = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

/** The uncertainty of every study without a label, by the server's background task; the list follows it. */
async function score() {
  $("score").disabled = true;
  try {
    let { status } = await server.score();
    while (SCORING.includes(status)) {
      $("score-state").textContent = "at work …";
      await pause(2000);
      ({ status } = await server.scoring());
      await loadStudies();
    }
    $("score-state").textContent = status === "DONE" ? "" : "No study could be scored; the server's log says why.";
  } catch (error) {
    $("score-state").textContent = error.message;
  } finally {
    $("score").disabled = false;
  }
}

function message(text, failed = false) {
  $("message").textContent = text;
  $("message").classList.toggle("failed", failed);
}

function showVolume() {
  state.shown = true;
  message("");
  $("view").classList.add("shown");
  $("controls").disabled = false;
  $("slice").max = viewer.slices;
  showSlice();
  showWindow();
}

/** The study to label next: the most uncertain one by the server's strategy, never the one that is open. */
async function nextStudy() {
  $("error").textContent = "";
  try {
    const { id } = await server.next();
    await loadStudies();
    const rest = state.studies.filter((item) => !item.label && !item.failed && item.id !== state.open);
    const next = id && id !== state.open ? id : rest[0]?.id;
    if (next) await openStudy(next);
    else $("error").textContent = "No other study is left without a label.";
  } catch (error) {
    $("error").textContent = error.message;
  }
}

// ---- slices and window

function showSlice() {
  const number = viewer.slice;
  const z = viewer.millimetres(number).toFixed(1);
  $("slice").value = number;
  $("slice-text").textContent = `${number} / ${viewer.slices}`;
  $("slice").setAttribute("aria-valuetext", `slice ${number} of ${viewer.slices}, z = ${z} mm`);
  $("where").textContent = `${number} / ${viewer.slices}   z = ${z} mm`;
}

function goTo(number) {
  if (!state.shown) return;
  viewer.goTo(number);
  showSlice();
}

function showWindow() {
  const [centre, width] = [Math.round(viewer.centre), Math.round(viewer.width)];
  $("centre").value = centre;
  $("width").value = width;
  $("centre-text").textContent = `${centre} HU`;
  $("width-text").textContent = `${width} HU`;
  $("window").textContent = `C ${centre}  W ${width}`;
  for (const button of $("presets").children) {
    button.setAttribute("aria-pressed", String(button.dataset.window === `${centre} ${width}`));
  }
}

let pending = 0; // a slider moves faster than a large volume is drawn

function setWindow(centre, width) {
  Object.assign(viewer, { centre, width });
  showWindow();
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => viewer.setWindow(centre, width));
}

function showPresets() {
  const [low, high] = state.table.window;
  const presets = [...PRESETS, ["Model", Math.round((low + high) / 2), high - low]];
  $("presets").replaceChildren(...presets.map(([name, centre, width], number) => {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.textContent = `${number + 1} ${name}`;
    button.title = `centre ${centre}, width ${width} HU`;
    button.dataset.window = `${centre} ${Math.round(width)}`;
    button.addEventListener("click", () => setWindow(centre, width));
    return button;
  }));
}

/** With the left button: to the right is wider, upwards is brighter. */
function onDrag(event) {
  if (!state.shown || event.buttons !== 1 || !(event.movementX || event.movementY)) return;
  setWindow(viewer.centre + 2 * event.movementY, Math.max(10, viewer.width + 4 * event.movementX));
}

let turned = 0; // a trackpad reports parts of a turn

function onWheel(event) {
  event.preventDefault();
  if (!state.shown) return;
  if (event.ctrlKey) {
    viewer.zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1);
    return;
  }
  turned += event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY : 100 * Math.sign(event.deltaY);
  const steps = Math.trunc(turned / 50);
  if (!steps) return;
  turned = 0;
  goTo(viewer.slice + Math.sign(steps));
}

const KEYS = {
  ArrowUp: () => goTo(viewer.slice - 1),
  ArrowDown: () => goTo(viewer.slice + 1),
  PageUp: () => goTo(viewer.slice - 5),
  PageDown: () => goTo(viewer.slice + 5),
  Home: () => goTo(1),
  End: () => goTo(viewer.slices),
  0: () => viewer.resetView(),
  s: () => $("form").hidden || $("form").requestSubmit(),
  n: () => nextStudy(),
};

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, textarea, select")) return;
  const preset = state.shown && "1234".includes(event.key) ? $("presets").children[Number(event.key) - 1] : null;
  const action = preset ? () => preset.click() : KEYS[event.key];
  if (!action || (!state.shown && event.key !== "n")) return;
  event.preventDefault();
  action();
}

// ---- prediction and label

async function predict(id) {
  $("answer").textContent = "The model is at work …";
  $("answer").classList.remove("failed");
  showForm(); // the reader need not wait
  let failure = "";
  if (!state.predictions.has(id)) {
    try {
      state.predictions.set(id, await server.predict(id));
    } catch (error) {
      failure = error.message;
    }
  }
  if (id !== state.open || !state.shown) return;
  showAnswer(failure);
  showForm();
}

function showAnswer(failure) {
  const prediction = state.predictions.get(state.open);
  $("answer").classList.toggle("failed", Boolean(failure));
  if (failure) {
    $("answer").textContent = `No prediction. ${failure}`;
    return;
  }
  const any = prediction.any_injury;
  const parts = [`Version ${prediction.version}.`];
  if (any !== null && any !== undefined) parts.push(`Any injury: ${(100 * any).toFixed(1)} %.`);
  parts.push(prediction.evidence ? "Evidence is available." : "Evidence is not available.");
  $("answer").textContent = parts.join(" ");
}

/** The label as it is on the page: the reader's draft, or the one that is stored, or nothing. */
function currentLabel() {
  return state.drafts.get(state.open) ?? study()?.label ?? { groups: {} };
}

function edit(change) {
  const label = structuredClone(currentLabel());
  change(label);
  state.drafts.set(state.open, label);
  showLabelState();
  showStudies();
}

function topSlices(prediction, group) {
  const numbers = prediction?.evidence?.groups?.[group];
  const found = numbers?.top_slices.map((index) => {
    const z = prediction.evidence.slice_z_mm[index];
    return { slice: viewer.sliceAt(z), z, change: numbers.change[index] };
  });
  // several of the network's slices may lie nearest to one of the study's
  return found?.filter(({ slice }, place) => found.findIndex((other) => other.slice === slice) === place);
}

function showForm() {
  const prediction = state.predictions.get(state.open);
  const label = currentLabel();
  const focused = document.activeElement?.getAttribute("aria-label");
  $("groups").replaceChildren(...state.table.groups.map((group) => groupCard(group, {
    probabilities: prediction?.injuries?.[group.name],
    evidence: topSlices(prediction, group.name),
    label: label.groups[group.name],
    jump: goTo,
    chosen: (name) => edit((changed) => {
      if (name === null) delete changed.groups[group.name];
      else changed.groups[group.name] = name;
    }),
  })));
  if (document.activeElement !== $("comment")) $("comment").value = label.comment ?? "";
  $("confirm").disabled = !prediction;
  $("picture").hidden = !prediction?.evidence;
  $("form").hidden = $("save").disabled = false;
  for (const radio of $("groups").querySelectorAll("input")) {
    if (radio.getAttribute("aria-label") === focused) radio.focus();
  }
  showLabelState();
}

function showLabelState() {
  const stored = study()?.label;
  const who = stored?.reader ? ` by ${stored.reader}` : "";
  const text = state.drafts.has(state.open) ? "Not saved yet." : stored ? `Labelled${who}: stored.` : (study()?.label_error ?? "No label yet.");
  $("label-state").textContent = text;
  $("label-state").dataset.state = state.drafts.has(state.open) ? "draft" : stored ? "stored" : "none";
}

/** Takes the most probable class of each group into the label; nothing is stored before it is saved. */
function copyAnswer() {
  const { injuries } = state.predictions.get(state.open);
  edit((label) => {
    for (const { name, classes } of state.table.groups) {
      const probabilities = injuries[name];
      label.groups[name] = classes.reduce((best, item) => (probabilities[item] > probabilities[best] ? item : best));
    }
  });
  showForm();
}

async function save(event) {
  event.preventDefault();
  const id = state.open;
  const draft = state.drafts.get(id);
  const label = structuredClone(currentLabel());
  const reader = $("reader").value.trim();
  if (reader) label.reader = reader;
  if (!label.comment) delete label.comment;
  $("error").textContent = "";
  if (!Object.keys(label.groups).length) {
    $("error").textContent = "Nothing to save: give at least one group a label.";
    return;
  }
  $("save").disabled = true;
  try {
    await server.saveLabel(id, label);
    if (state.drafts.get(id) === draft) state.drafts.delete(id); // else it was changed meanwhile
    await loadStudies();
    if (id === state.open) showForm();
  } catch (error) {
    $("error").textContent = `The label was not saved. ${error.message}`;
  } finally {
    $("save").disabled = false;
  }
}

// ---- picture of the evidence

function hidePicture() {
  if ($("picture-image").src) URL.revokeObjectURL($("picture-image").src);
  $("picture-image").removeAttribute("src");
  $("picture-link").hidden = true;
  $("picture-message").textContent = "";
  $("picture").open = false;
}

async function showPicture() {
  const id = state.open;
  if (!$("picture").open || $("picture-image").src) return;
  $("picture-message").textContent = "Drawing …";
  try {
    const blob = await server.picture(id);
    if (id !== state.open) return;
    $("picture-image").src = URL.createObjectURL(blob);
    $("picture-image").alt = "Top slices of each group with a heat map, and how far each slice moves the decision";
    $("picture-link").href = $("picture-image").src;
    $("picture-link").hidden = false;
    $("picture-message").textContent = "";
  } catch (error) {
    if (id === state.open) $("picture-message").textContent = error.message;
  }
}

// ---- versions of the model

async function loadVersions() {
  try {
    const reply = await server.versions();
    const list = Array.isArray(reply) ? reply : reply.versions;
    state.version = list.find((version) => version.chosen)?.name ?? "none";
    $("version-rows").replaceChildren(...list.map((version) => versionRow(version, chooseVersion)));
    $("version").textContent = state.version;
  } catch (error) {
    $("version").textContent = `unknown (${error.message})`;
  }
}

async function chooseVersion(name) {
  $("error").textContent = "";
  try {
    await server.chooseVersion(name);
    state.predictions.clear();
    await loadVersions();
    if (state.shown) {
      hidePicture();
      await predict(state.open);
    }
  } catch (error) {
    $("error").textContent = error.message;
  }
}

// ---- start

function listen() {
  $("filter").addEventListener("input", showStudies);
  $("score").addEventListener("click", score);
  $("refresh").addEventListener("click", () => loadStudies().catch(showError));
  $("slice").addEventListener("input", (event) => goTo(Number(event.target.value)));
  $("centre").addEventListener("input", (event) => setWindow(Number(event.target.value), viewer.width));
  $("width").addEventListener("input", (event) => setWindow(viewer.centre, Number(event.target.value)));
  $("view").addEventListener("wheel", onWheel, { passive: false, capture: true });
  $("view").addEventListener("mousemove", (event) => {
    const value = state.shown && event.target === $("canvas") ? viewer.valueAt(event) : null;
    $("value").textContent = value === null ? "" : `${Math.round(value)} HU`;
  });
  $("canvas").addEventListener("pointermove", onDrag);
  document.addEventListener("keydown", onKey, true);
  $("comment").addEventListener("input", (event) => edit((label) => { label.comment = event.target.value.trim(); }));
  $("reader").addEventListener("change", (event) => localStorage.setItem("reader", event.target.value.trim()));
  $("reader").value = localStorage.getItem("reader") ?? "";
  $("form").addEventListener("submit", save);
  $("confirm").addEventListener("click", copyAnswer);
  $("next").addEventListener("click", nextStudy);
  $("picture").addEventListener("toggle", showPicture);
  addEventListener("beforeunload", (event) => state.drafts.size && event.preventDefault());
}

function showError(error) {
  $("error").textContent = error.message;
}

async function start() {
  listen();
  document.querySelector("#versions thead").append(versionHeader());
  await viewer.start();
  state.table = await server.table();
  showPresets();
  showWindow();
  await Promise.all([loadStudies(), loadVersions()]);
}

start().then(() => document.body.classList.add("ready"), (error) => message(error.message, true));
