// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// The reader's label of the study in view. What another reader has stored since is shown, and replaced only when that
// is asked for.

import * as server from "./server.js";
import { $, prediction, state, study } from "./state.js";
import { loadStudies, showStudy } from "./studies.js";

let redraw = null;
const seen = new Map(); // id -> another's label that a second save replaces

/** The label as it is on the page: the reader's draft, or the one that is stored, or nothing. */
export function currentLabel() {
  return state.drafts.get(state.open) ?? study()?.label ?? { groups: {} };
}

export function edit(change) {
  const label = structuredClone(currentLabel());
  if (!state.drafts.has(state.open)) state.bases.set(state.open, study()?.label ?? null);
  change(label);
  state.drafts.set(state.open, label);
  showLabelState();
  showStudy(state.open);
}

export function showLabelState() {
  const stored = study()?.label;
  const draft = state.drafts.has(state.open);
  const theirs = draft && !same(stored, state.bases.get(state.open));
  const who = stored?.reader ? ` by ${stored.reader}` : "";
  const kept = stored ? `Labelled${who}: stored.` : (study()?.label_error ?? "No label yet.");
  $("label-state").textContent = theirs ? `Not saved yet. ${changed(stored)}` : draft ? "Not saved yet." : kept;
  $("label-state").dataset.state = draft ? "draft" : stored ? "stored" : "none";
  $("take").hidden = !theirs;
}

function changed(stored) {
  if (!stored) return "The label that was stored has been removed since you began.";
  const groups = Object.entries(stored.groups ?? {}).map(([name, item]) => `${name} ${item}`).join(", ");
  return `A label was stored since you began${stored.reader ? `, by ${stored.reader}` : ""}: ${groups}.`;
}

/** Whether two labels, null for none, say the same. */
function same(first, second) {
  const text = (label) => label && JSON.stringify([Object.entries(label.groups ?? {}).sort(), label.comment ?? "", label.reader ?? ""]);
  return (text(first) ?? null) === (text(second) ?? null);
}

/** Takes the most probable class of each group into the label; nothing is stored before it is saved. */
function copyAnswer() {
  const injuries = prediction()?.injuries;
  if (!injuries) return;
  edit((label) => {
    for (const { name, classes } of state.table.groups) {
      const probabilities = injuries[name];
      label.groups[name] = classes.reduce((best, item) => (probabilities[item] > probabilities[best] ? item : best));
    }
  });
  redraw();
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
    if (await store(id, label, draft)) await listAgain(id);
  } finally {
    $("save").disabled = !state.shown;
  }
}

/** Whether the label is stored; if not, the page says why. */
async function store(id, label, draft) {
  try {
    const stored = await server.label(id);
    const base = state.bases.has(id) ? state.bases.get(id) : (state.studies.find((item) => item.id === id)?.label ?? null);
    const known = seen.has(id) && same(stored, seen.get(id));
    if (!same(stored, base) && !known) {
      showTheirs(id, stored);
      return false;
    }
    await server.saveLabel(id, label);
  } catch (error) {
    if (id === state.open) $("error").textContent = `The label was not saved. ${error.message}`;
    return false;
  }
  seen.delete(id);
  if (state.drafts.get(id) === draft) {
    state.drafts.delete(id);
    state.bases.delete(id);
  } else {
    state.bases.set(id, label); // it was changed meanwhile
  }
  const item = state.studies.find((each) => each.id === id);
  if (item) Object.assign(item, { label, label_error: null });
  showStudy(id);
  if (id === state.open) redraw();
  return true;
}

/** Another reader's label is there: it is shown, beside the draft if there is one, and a second save replaces it. */
function showTheirs(id, stored) {
  const item = state.studies.find((each) => each.id === id);
  if (item) item.label = stored;
  showStudy(id);
  if (id !== state.open) return;
  redraw();
  $("error").textContent = "Not saved: the stored label has changed since it was loaded, see below. Save again to replace it.";
  seen.set(id, stored);
}

async function listAgain(id) {
  try {
    await loadStudies();
    if (id === state.open) redraw();
  } catch (error) {
    $("error").textContent = `The label is stored; the list of studies could not be loaded again. ${error.message}`;
  }
}

function takeStored() {
  state.drafts.delete(state.open);
  state.bases.delete(state.open);
  seen.delete(state.open);
  $("error").textContent = "";
  showStudy(state.open);
  redraw();
}

/** `drawn` shows the form anew. */
export function listenToLabel(drawn) {
  redraw = drawn;
  $("comment").addEventListener("input", (event) => edit((label) => { label.comment = event.target.value.trim(); }));
  $("reader").addEventListener("change", (event) => localStorage.setItem("reader", event.target.value.trim()));
  $("reader").value = localStorage.getItem("reader") ?? "";
  $("form").addEventListener("submit", save);
  $("confirm").addEventListener("click", copyAnswer);
  $("take").addEventListener("click", takeStored);
}
