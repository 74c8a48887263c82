// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// The list of the studies, and their scoring. There may be thousands: the first are shown, and one that changes is
// replaced alone.

import { studyItem } from "./panels.js";
import * as server from "./server.js";
import { $, state } from "./state.js";

const SHOWN = 200;
let open = null;
let listed = null;

export async function loadStudies() {
  state.studies = await server.studies();
  showStudies();
  listed();
}

function itemOf(study) {
  return studyItem(study, { current: study.id === state.open, draft: state.drafts.has(study.id), open });
}

function showStudies() {
  const wanted = $("filter").value.toLowerCase();
  const found = state.studies.filter((study) => study.id.toLowerCase().includes(wanted));
  $("studies").replaceChildren(...found.slice(0, SHOWN).map(itemOf));
  const labelled = state.studies.filter((study) => study.label).length;
  $("count").textContent = `${state.studies.length}, ${labelled} labelled`;
  $("more").textContent = found.length > SHOWN ? `${found.length - SHOWN} more: filter by id to see them.` : "";
}

/** One study has changed: no other item is touched. */
export function showStudy(id) {
  const study = state.studies.find((item) => item.id === id);
  const item = [...$("studies").children].find((each) => each.dataset.id === id);
  if (study && item) item.replaceWith(itemOf(study));
}

const SCORING = ["SUBMITTED", "RUNNING"];
const pause = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

/** How many the task has come to, by its last line that says so; "" before the first. */
function progress({ details }) {
  const counts = (details ?? []).map((line) => /(\d+ of \d+): /.exec(line)?.[1]).filter(Boolean);
  return counts.at(-1) ?? "";
}

/** The uncertainty of every study without a label, by the server's background task; the list follows its count. */
async function score() {
  $("score").disabled = true;
  try {
    let task = await server.score();
    let count = "";
    while (SCORING.includes(task.status)) {
      $("score-state").textContent = `at work … ${count}`;
      await pause(2000);
      task = await server.scoring();
      const now = progress(task) || count;
      if (now !== count) await loadStudies();
      count = now;
    }
    await loadStudies();
    $("score-state").textContent = task.status === "DONE" ? "" : "No study could be scored; the server's log says why.";
  } catch (error) {
    $("score-state").textContent = error.message;
  } finally {
    $("score").disabled = false;
  }
}

/** `opened` is called with the id of a study that is clicked, `renewed` when the list has been loaded. */
export function listenToStudies(opened, renewed) {
  open = opened;
  listed = renewed;
  $("filter").addEventListener("input", showStudies);
  $("score").addEventListener("click", score);
}
