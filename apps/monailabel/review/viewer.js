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

export class Viewer {
  constructor(canvas) {
    this.canvas = canvas;
    this.centre = 40;
    this.width = 400;
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

  get volume() {
    return this.nv?.volumes[0];
  }

  /** Number of slices; 0 without a volume. */
  get slices() {
    return this.volume ? this.volume.dimsRAS[3] : 0;
  }

  /** Of the slice in view: 1 is the most cranial. */
  get slice() {
    const voxel = this.nv.frac2vox(this.nv.scene.crosshairPos);
    return this.slices - voxel[2];
  }

  set slice(number) {
    const [, x, y] = this.volume.dimsRAS;
    const z = this.slices - Math.min(this.slices, Math.max(1, Math.round(number)));
    this.nv.scene.crosshairPos = this.nv.vox2frac([Math.floor(x / 2), Math.floor(y / 2), z]);
    this.nv.drawScene();
  }

  /** Height of a slice in mm (patient coordinates, towards the head). */
  millimetres(number) {
    const [, x, y] = this.volume.dimsRAS;
    const voxel = [Math.floor(x / 2), Math.floor(y / 2), this.slices - number];
    return this.nv.frac2mm(this.nv.vox2frac(voxel))[2];
  }

  /** The slice nearest to a height in mm. */
  sliceAt(z) {
    const [low, high] = [this.millimetres(this.slices), this.millimetres(1)];
    if (this.slices < 2) return 1;
    const number = this.slices - Math.round(((z - low) / (high - low)) * (this.slices - 1));
    return Math.min(this.slices, Math.max(1, number));
  }

  setWindow(centre, width) {
    this.centre = centre;
    this.width = Math.max(1, width);
    if (!this.volume) return;
    this.volume.cal_min = this.centre - this.width / 2;
    this.volume.cal_max = this.centre + this.width / 2;
    this.nv.updateGLVolume();
  }

  zoom(factor) {
    const [x, y, z, scale] = this.nv.scene.pan2Dxyzmm;
    this.nv.setPan2Dxyzmm([x, y, z, Math.min(10, Math.max(0.5, scale * factor))]);
  }

  resetView() {
    this.nv.setPan2Dxyzmm([0, 0, 0, 1]);
  }

  /** HU under the pointer, or null beside the volume. */
  valueAt(event) {
    if (!this.volume) return null;
    const scale = this.nv.uiData.dpr ?? 1;
    const place = this.nv.canvasPos2frac([event.offsetX * scale, event.offsetY * scale]);
    if (place[0] < 0) return null;
    const [i, j, k] = this.nv.frac2vox(place);
    return this.volume.getValue(i, j, k);
  }

  clear() {
    for (const volume of [...(this.nv?.volumes ?? [])]) this.nv.removeVolume(volume);
  }

  /** Shows the middle slice of a NIfTI file's content, and never that of a study which `signal` says was left. */
  async show(buffer, signal) {
    const image = await niivue.NVImage.loadFromUrl({
      url: "volume.nii",
      name: "volume.nii",
      buffer,
      colormap: "gray",
      cal_min: this.centre - this.width / 2,
      cal_max: this.centre + this.width / 2,
    });
    if (signal.aborted) return;
    this.clear();
    const size = Math.max(...image.dimsRAS.slice(1, 4));
    if (size > this.nv.uiData.max3D) {
      throw new Error(`The volume is ${size} voxels wide; this graphics card takes ${this.nv.uiData.max3D}.`);
    }
    this.nv.addVolume(image);
    this.resetView();
    this.slice = Math.ceil(this.slices / 2);
  }
}
