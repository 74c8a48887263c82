// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// What all parts of the page share.

import { Viewer } from "./viewer.js";

export const $ = (id) => document.getElementById(id);

export const state = {
  table: null, // groups with their classes
  studies: [],
  open: null, // id of the study in view
  shown: false, // its volume is in view
  predictions: new Map(), // id -> newest reply of /infer, which says its version
  drafts: new Map(), // id -> label that is not saved yet
  bases: new Map(), // id -> stored label that a draft began from, null for none
  version: null, // in use, null if that is not known
};

/** The study in view. */
export const study = () => state.studies.find((item) => item.id === state.open);

/** What the version in use says of the study in view, nothing if it has not been asked yet. */
export function prediction() {
  const found = state.predictions.get(state.open);
  return state.version === null || found?.version === state.version ? found : undefined;
}

export const viewer = new Viewer($("canvas"));
globalThis.reviewPage = { state, viewer }; // for the browser's console and for tests
