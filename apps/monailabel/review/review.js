// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// The review page: one study is open at a time; its volume, the model's prediction and the reader's label.

import { goTo, keyAction, listenToControls, showPresets, showSlice, showWindow } from "./controls.js";
import { currentLabel, edit, listenToLabel, showLabelState } from "./label.js";
import { groupCard } from "./panels.js";
import * as server from "./server.js";
import { $, prediction, state, viewer } from "./state.js";
import { listenToStudies, loadStudies, showStudy } from "./studies.js";
import { followVersion, listenToVersions, loadVersions } from "./versions.js";

// ---- studies

let opening = new AbortController();

async function openStudy(id) {
  opening.abort();
  asking.abort(); // the server's one place for a prediction is for the study in view
  opening = new AbortController();
  const { signal } = opening;
  const left = state.open;
  Object.assign(state, { open: id, shown: false });
  $("title").textContent = id;
  $("view").classList.remove("shown");
  $("controls").disabled = true;
  for (const name of ["where", "window", "value", "error", "answer"]) $(name).textContent = "";
  $("form").hidden = $("save").disabled = $("confirm").disabled = true;
  $("label-state").textContent = "";
  $("take").hidden = true;
  hidePicture();
  viewer.clear();
  message("Loading …");
  showStudy(left);
  showStudy(id);
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
  await predict();
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
    if (!next) {
      $("error").textContent = "No other study is left without a label.";
      return;
    }
    await loadVersions();
    await openStudy(next);
  } catch (error) {
    $("error").textContent = error.message;
  }
}

async function refresh() {
  $("error").textContent = "";
  try {
    await loadStudies();
    await followVersion();
  } catch (error) {
    $("error").textContent = error.message;
  }
}

// ---- prediction

let asking = new AbortController();

async function predict() {
  asking.abort();
  asking = new AbortController();
  const { signal } = asking;
  $("answer").textContent = "The model is at work …";
  $("answer").classList.remove("failed");
  showForm(); // the reader need not wait
  let failure = "";
  try {
    await ask(state.open, signal);
  } catch (error) {
    failure = error.message;
  }
  if (signal.aborted || !state.shown) return;
  showAnswer(failure);
  showForm();
}

/** Until the version that answers is the one in use: it may change while the model is at work. */
async function ask(id, signal) {
  for (let attempt = 0; attempt < 3 && !signal.aborted && !prediction(); attempt += 1) {
    const reply = await server.predict(id, signal);
    if (signal.aborted) return;
    state.predictions.set(id, reply);
    if (reply.version !== state.version) await loadVersions();
  }
  if (!signal.aborted && !prediction()) throw new Error("The version in use keeps changing: open the study again.");
}

async function predictAgain() {
  if (!state.shown) return;
  hidePicture();
  await predict();
}

function showAnswer(failure) {
  const answer = prediction();
  $("answer").classList.toggle("failed", Boolean(failure));
  if (failure) {
    $("answer").textContent = `No prediction. ${failure}`;
    return;
  }
  const any = answer.any_injury;
  const parts = [`Version ${answer.version}.`];
  if (any !== null && any !== undefined) parts.push(`Any injury: ${(100 * any).toFixed(1)} %.`);
  parts.push(answer.evidence ? "Evidence is available." : "Evidence is not available.");
  $("answer").textContent = parts.join(" ");
}

function topSlices(answer, group) {
  const numbers = answer?.evidence?.groups?.[group];
  const found = numbers?.top_slices.map((index) => {
    const z = answer.evidence.slice_z_mm[index];
    return { slice: viewer.sliceAt(z), z, change: numbers.change[index] };
  });
  // several of the network's slices may lie nearest to one of the study's
  return found?.filter(({ slice }, place) => found.findIndex((other) => other.slice === slice) === place);
}

function showForm() {
  const answer = prediction();
  const label = currentLabel();
  const focused = document.activeElement?.getAttribute("aria-label");
  $("groups").replaceChildren(...state.table.groups.map((group) => groupCard(group, {
    probabilities: answer?.injuries?.[group.name],
    evidence: topSlices(answer, group.name),
    label: label.groups[group.name],
    jump: goTo,
    chosen: (name) => edit((changed) => {
      if (name === null) delete changed.groups[group.name];
      else changed.groups[group.name] = name;
    }),
  })));
  if (document.activeElement !== $("comment")) $("comment").value = label.comment ?? "";
  $("confirm").disabled = !answer;
  $("picture").hidden = !answer?.evidence;
  $("form").hidden = $("save").disabled = false;
  for (const radio of $("groups").querySelectorAll("input")) {
    if (radio.getAttribute("aria-label") === focused) radio.focus();
  }
  showLabelState();
}

// ---- picture of the evidence

let drawing = new AbortController();

function hidePicture() {
  drawing.abort();
  drawing = new AbortController();
  if ($("picture-image").src) URL.revokeObjectURL($("picture-image").src);
  $("picture-image").removeAttribute("src");
  $("picture-link").hidden = true;
  $("picture-message").textContent = "";
  $("picture").open = false;
}

async function showPicture() {
  if (!$("picture").open || $("picture-image").src || !prediction()) return;
  const { signal } = drawing;
  $("picture-message").textContent = "Drawing …";
  try {
    const blob = await server.picture(state.open, prediction().version, signal);
    await followVersion(); // the picture is by the version in use: another one takes it off the page
    if (signal.aborted) return;
    $("picture-image").src = URL.createObjectURL(blob);
    $("picture-image").alt = "Top slices of each group with a heat map, and how far each slice moves the decision";
    $("picture-link").href = $("picture-image").src;
    $("picture-link").hidden = false;
    $("picture-message").textContent = "";
  } catch (error) {
    if (!signal.aborted) $("picture-message").textContent = error.message;
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
  listenToStudies(openStudy, () => state.shown && showForm());
  listenToLabel(showForm);
  listenToVersions(predictAgain);
  $("refresh").addEventListener("click", refresh);
  document.addEventListener("keydown", onKey, true);
  $("next").addEventListener("click", nextStudy);
  $("picture").addEventListener("toggle", showPicture);
  addEventListener("beforeunload", (event) => state.drafts.size && event.preventDefault());
}

async function start() {
  listen();
  await viewer.start();
  state.table = await server.table();
  showPresets();
  showWindow();
  await Promise.all([loadStudies(), loadVersions()]);
}

start().then(() => document.body.classList.add("ready"), (error) => message(error.message, true));
