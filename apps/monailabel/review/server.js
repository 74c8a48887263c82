// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// What the page asks of the server, all of it by the REST interface. Addresses are relative to /review/.

export const MODEL = "rsna_cnn_lstm";

/** A reply that is no success, with the server's own words. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function address(path, query = {}) {
  const parameters = new URLSearchParams(query).toString();
  return parameters ? `../${path}?${parameters}` : `../${path}`;
}

async function ask(path, { query, ...options } = {}) {
  let response;
  try {
    response = await fetch(address(path, query), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer.");
  }
  if (!response.ok) throw new Refusal(response.status, await reason(response));
  return response;
}

// what a reader can do about a reply that no retry changes; the app's README says how
const ADVICE = {
  401: "This server asks who is there, and this page has no form to log in: open it through a proxy that logs in and"
    + " adds the token, or have the server started without MONAI_LABEL_AUTH_ENABLE.",
  403: "The server does not allow this: your account may lack the role, or a proxy between may change the page's"
    + " address, which then has to be named in MONAI_LABEL_CORS_ORIGINS.",
};

async function reason(response) {
  const said = await words(response);
  return ADVICE[response.status] ? `${ADVICE[response.status]} (${response.status}: ${said})` : said;
}

async function words(response) {
  try {
    const { detail } = JSON.parse(await response.text());
    return typeof detail === "string" ? detail : JSON.stringify(detail);
  } catch {
    return `The server replied ${response.status} ${response.statusText}.`;
  }
}

const json = async (path, options) => (await ask(path, options)).json();

export const studies = () => json("review/studies");
export const table = () => json("review/labels");
export const next = () => json("activelearning/uncertain", { method: "POST" });
export const score = () => json("scoring/entropy", { method: "POST" });
export const scoring = () => json("scoring/");
export const versions = () => json(`versions/${MODEL}`);
export const chooseVersion = (version) => json(`versions/${MODEL}`, { method: "PUT", query: { version } });

export async function picture(image, version, signal) {
  return (await ask("review/evidence.png", { query: { image, version }, signal })).blob();
}

/** A reply says which version made it. An aborted request is given up by the server too. */
export async function predict(image, signal) {
  const body = new FormData();
  body.append("params", JSON.stringify({ evidence: true }));
  const reply = await json(`infer/${MODEL}`, { method: "POST", query: { image, output: "json" }, body, signal });
  return reply.params ?? reply;
}

/** The label as it is stored now, null if there is none or it is no JSON. */
export async function label(image) {
  try {
    const found = await json("datastore/label", { query: { label: image, tag: "final" }, cache: "no-store" });
    return found && typeof found === "object" ? found : null;
  } catch (error) {
    if (error.status === 404 || error instanceof SyntaxError) return null;
    throw error;
  }
}

export async function saveLabel(image, label) {
  const body = new FormData();
  body.append("label", new Blob([JSON.stringify(label)], { type: "application/json" }), "label.json");
  return json("datastore/label", { method: "PUT", query: { image, tag: "final" }, body });
}

/** The study's volume, straight into one buffer. `progress` is called with 0..1. */
export async function volume(image, progress, signal) {
  const response = await ask("review/volume", { query: { image }, signal });
  const total = Number(response.headers.get("content-length"));
  if (!total) return response.arrayBuffer();
  const bytes = new Uint8Array(total);
  const stream = response.body.getReader();
  for (let filled = 0; ; ) {
    const { done, value } = await stream.read();
    if (done) return bytes.buffer;
    bytes.set(value, filled);
    filled += value.length;
    progress(filled / total);
  }
}
