// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// Slices and window: sliders, presets, wheel, drag and keys.

import { $, state, viewer } from "./state.js";

const PRESETS = [["Soft tissue", 40, 400], ["Bone", 400, 1800], ["Lung", -600, 1500]];

export function showSlice() {
  const number = viewer.slice;
  const z = viewer.millimetres(number).toFixed(1);
  $("slice").value = number;
  $("slice-text").textContent = `${number} / ${viewer.slices}`;
  $("slice").setAttribute("aria-valuetext", `slice ${number} of ${viewer.slices}, z = ${z} mm`);
  $("where").textContent = `${number} / ${viewer.slices}   z = ${z} mm`;
}

export function goTo(number) {
  if (!state.shown) return;
  viewer.goTo(number);
  showSlice();
}

export function showWindow() {
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

export function showPresets() {
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

/** What a key does to a study in view; nothing for other keys. */
export function keyAction(key) {
  const preset = "1234".includes(key) ? $("presets").children[Number(key) - 1] : null;
  return preset ? () => preset.click() : KEYS[key];
}

const KEYS = {
  ArrowUp: () => goTo(viewer.slice - 1),
  ArrowDown: () => goTo(viewer.slice + 1),
  PageUp: () => goTo(viewer.slice - 5),
  PageDown: () => goTo(viewer.slice + 5),
  Home: () => goTo(1),
  End: () => goTo(viewer.slices),
  0: () => viewer.resetView(),
};

export function listenToControls() {
  $("slice").addEventListener("input", (event) => goTo(Number(event.target.value)));
  $("centre").addEventListener("input", (event) => setWindow(Number(event.target.value), viewer.width));
  $("width").addEventListener("input", (event) => setWindow(viewer.centre, Number(event.target.value)));
  $("view").addEventListener("wheel", onWheel, { passive: false, capture: true });
  $("view").addEventListener("mousemove", (event) => {
    const value = state.shown && event.target === $("canvas") ? viewer.valueAt(event) : null;
    $("value").textContent = value === null ? "" : `${Math.round(value)} HU`;
  });
  $("canvas").addEventListener("pointermove", onDrag);
}
