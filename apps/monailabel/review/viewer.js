// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// Axial slices of one volume, drawn by NiiVue (global `niivue`), in radiological convention.

const OPTIONS = {
  isRadiologicalConvention: true,
  isOrientationTextVisible: true,
  showAllOrientationMarkers: true,
  sagittalNoseLeft: true,
  crosshairWidth: 0,
  dragAndDropEnabled: false, // studies come from the server only
  fontColor: [0.95, 0.8, 0.4, 1],
  clipPlaneHotKey: "",
  cycleClipPlaneHotKey: "",
  viewModeHotKey: "",
  logLevel: "error",
  loadingText: "",
};

// of the NIfTI-1 header, little-endian as the server writes it
const HEADER = { dimensions: 40, datatype: 70, start: 108, rows: 280 };
const INT16 = 4;

/**
 * NiiVue gets one slice at a time, whose voxels are replaced to move: it works through all that it has with each change
 * of the window, which takes seconds for a whole CT, and half a gigabyte of the graphics card.
 */
export class Viewer {
  constructor(canvas) {
    this.canvas = canvas;
    this.centre = 40;
    this.width = 400;
    this.clear();
  }

  async start() {
    if (!document.createElement("canvas").getContext("webgl2")) {
      throw new Error("This browser has no WebGL 2, which the viewer needs.");
    }
    this.nv = new niivue.Niivue(OPTIONS);
    await this.nv.attachToCanvas(this.canvas);
    this.nv.setSliceType(this.nv.sliceTypeAxial);
    this.nv.opts.dragModePrimary = niivue.DRAG_MODE.none; // the page's, for the window
    this.nv.opts.dragMode = niivue.DRAG_MODE.pan;
    const view = this.canvas.parentElement;
    // the page's own wheel and keys are for slices; double click would guess a window
    for (const name of ["wheel", "dblclick", "keydown", "keyup"]) {
      view.addEventListener(name, (event) => event.target === this.canvas && event.stopPropagation(), true);
    }
  }

  clear() {
    for (const image of [...(this.nv?.volumes ?? [])]) this.nv.removeVolume(image);
    this.voxels = null;
    this.slices = 0;
    this.slice = 0;
  }

  /** Shows the middle slice of a NIfTI file's content, and never that of a study which `signal` says was left. */
  async show(buffer, signal) {
    const header = new DataView(buffer);
    const [columns, rows, slices] = [1, 2, 3].map((axis) => header.getInt16(HEADER.dimensions + 2 * axis, true));
    const start = header.getFloat32(HEADER.start, true);
    if (header.getInt16(HEADER.datatype, true) !== INT16) throw new Error("Expected a volume of 16-bit integers.");
    const single = buffer.slice(0, start + 2 * columns * rows);
    new DataView(single).setInt16(HEADER.dimensions + 6, 1, true);
    const image = await niivue.NVImage.loadFromUrl({
      url: "slice.nii",
      name: "slice.nii",
      buffer: single,
      colormap: "gray",
      cal_min: this.centre - this.width / 2,
      cal_max: this.centre + this.width / 2,
    });
    if (signal.aborted) return;
    this.clear();
    this.voxels = new Int16Array(buffer, start, columns * rows * slices);
    Object.assign(this, { columns, rows, slices });
    this.third = [0, 4, 8, 12].map((offset) => header.getFloat32(HEADER.rows + 32 + offset, true));
    this.nv.addVolume(image);
    this.resetView();
    this.goTo(Math.ceil(slices / 2));
  }

  /** To a slice: 1 is the most cranial. */
  goTo(number) {
    this.slice = Math.min(this.slices, Math.max(1, Math.round(number)));
    const size = this.columns * this.rows;
    const first = (this.slices - this.slice) * size; // the first in the file is the most caudal
    this.nv.volumes[0].img.set(this.voxels.subarray(first, first + size));
    this.nv.updateGLVolume();
  }

  setWindow(centre, width) {
    Object.assign(this, { centre, width: Math.max(1, width) });
    if (!this.slices) return;
    this.nv.volumes[0].cal_min = this.centre - this.width / 2;
    this.nv.volumes[0].cal_max = this.centre + this.width / 2;
    this.nv.updateGLVolume();
  }

  /** Height of a slice's centre in mm (patient coordinates, towards the head). */
  millimetres(number) {
    const [x, y, z, origin] = this.third;
    return (x * (this.columns - 1)) / 2 + (y * (this.rows - 1)) / 2 + z * (this.slices - number) + origin;
  }

  /** The slice nearest to a height in mm. */
  sliceAt(millimetres) {
    const number = Math.round(1 + (this.millimetres(1) - millimetres) / this.third[2]);
    return Math.min(this.slices, Math.max(1, number));
  }

  /** HU under the pointer, or null beside the volume. */
  valueAt(event) {
    const scale = this.nv.uiData.dpr ?? 1;
    const place = this.nv.canvasPos2frac([event.offsetX * scale, event.offsetY * scale]);
    if (place[0] < 0) return null;
    const [column, row] = this.nv.frac2vox(place);
    return this.voxels[((this.slices - this.slice) * this.rows + row) * this.columns + column];
  }

  zoom(factor) {
    const [x, y, z, scale] = this.nv.scene.pan2Dxyzmm;
    this.nv.setPan2Dxyzmm([x, y, z, Math.min(10, Math.max(0.5, scale * factor))]);
  }

  resetView() {
    this.nv.setPan2Dxyzmm([0, 0, 0, 1]);
  }
}
