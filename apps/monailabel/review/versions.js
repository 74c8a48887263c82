// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// Which version of the model answers. A training, or another reader, may change it at any time.

import { versionHeader, versionRow } from "./panels.js";
import * as server from "./server.js";
import { $, state } from "./state.js";

let changed = null;

export async function loadVersions() {
  $("version-header").replaceChildren(versionHeader());
  try {
    const list = await server.versions();
    state.version = list.find((version) => version.chosen)?.name ?? null;
    $("version-rows").replaceChildren(...list.map((version) => versionRow(version, choose)));
    $("version").textContent = state.version ?? "none";
  } catch (error) {
    state.version = null;
    $("version").textContent = `unknown (${error.message})`;
  }
}

/** Loads the versions; if another one is in use, the study in view is predicted anew. */
export async function followVersion() {
  const before = state.version;
  await loadVersions();
  if (state.version !== before) await changed();
}

async function choose(name) {
  $("error").textContent = "";
  try {
    await server.chooseVersion(name);
    await followVersion();
  } catch (error) {
    $("error").textContent = error.message;
  }
}

/** `switched` is called when another version is in use. */
export function listenToVersions(switched) {
  changed = switched;
}
