// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// The review page: one study is open at a time; its volume, the model's prediction and the reader's label.

import { goTo, keyAction, listenToControls, showPresets, showSlice, showWindow } from "./controls.js";
import { groupCard, studyItem } from "./panels.js";
import * as server from "./server.js";
import { $, state, viewer } from "./state.js";
import { loadVersions } from "./versions.js";

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
    $("save").disabled = !state.shown;
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

// ---- start

const KEYS = {
  s: () => $("save").disabled || $("form").requestSubmit(),
  n: () => nextStudy(),
};

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, textarea, select")) return;
  const action = KEYS[event.key] ?? (state.shown ? keyAction(event.key) : null);
  if (!action) return;
  event.preventDefault();
  action();
}

function listen() {
  listenToControls();
  $("filter").addEventListener("input", showStudies);
  $("score").addEventListener("click", score);
  $("refresh").addEventListener("click", () => loadStudies().catch(showError));
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

async function predictAgain() {
  if (!state.shown) return;
  hidePicture();
  await predict(state.open);
}

async function start() {
  listen();
  await viewer.start();
  state.table = await server.table();
  showPresets();
  showWindow();
  await Promise.all([loadStudies(), loadVersions(predictAgain)]);
}

start().then(() => document.body.classList.add("ready"), (error) => message(error.message, true));
