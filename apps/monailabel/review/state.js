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
  predictions: new Map(), // id -> reply of /infer
  drafts: new Map(), // id -> label that is not saved yet
  version: null,
};

export const viewer = new Viewer($("canvas"));
globalThis.reviewPage = { state, viewer }; // for the browser's console and for tests
