// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// Which version of the model answers.

import { versionHeader, versionRow } from "./panels.js";
import * as server from "./server.js";
import { $, state } from "./state.js";

/** `changed` is called when another version is in use. */
export async function loadVersions(changed) {
  $("version-header").replaceChildren(versionHeader());
  try {
    const list = await server.versions();
    state.version = list.find((version) => version.chosen)?.name ?? "none";
    $("version-rows").replaceChildren(...list.map((version) => versionRow(version, (name) => choose(name, changed))));
    $("version").textContent = state.version;
  } catch (error) {
    $("version").textContent = `unknown (${error.message})`;
  }
}

async function choose(name, changed) {
  $("error").textContent = "";
  try {
    await server.chooseVersion(name);
    state.predictions.clear();
    await loadVersions(changed);
    await changed();
  } catch (error) {
    $("error").textContent = error.message;
  }
}
