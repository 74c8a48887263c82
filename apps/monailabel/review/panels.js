// Copyright (c) the 2D-VoCo bundles authors.
// SPDX-License-Identifier: Apache-2.0
// Parts of the page as elements. Text goes in as text: ids come from file names and may hold anything.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const percent = (probability) => `${(100 * probability).toFixed(1)} %`;

/** One study of the list. */
export function studyItem(study, { current, draft, open }) {
  const tags = [];
  if (study.failed) tags.push(element("span", { class: "tag failed", title: study.failed }, "cannot be read"));
  if (study.label_error) tags.push(element("span", { class: "tag failed", title: study.label_error }, "unusable label"));
  if (study.label) tags.push(element("span", { class: "tag labelled" }, "labelled"));
  if (draft) tags.push(element("span", { class: "tag draft" }, "not saved"));
  const scored = study.entropy !== null && study.entropy !== undefined;
  const uncertainty = scored
    ? [element("meter", { min: 0, max: 1, value: study.entropy, title: "uncertainty (entropy), 0 to 1" }),
       ` uncertainty ${study.entropy.toFixed(3)}`]
    : ["no score yet"];
  const button = element("button", { type: "button" },
    element("span", { class: "id" }, study.id),
    element("span", { class: "dim" }, ...(study.failed ? [] : uncertainty)), ...tags);
  if (current) button.setAttribute("aria-current", "true");
  button.addEventListener("click", () => open(study.id));
  const item = element("li", {}, button);
  item.dataset.id = study.id;
  return item;
}

/** A group: each class with its probability and its place in the label. `chosen` is called with a class or null. */
export function groupCard(group, { probabilities, evidence, label, chosen, jump }) {
  const rows = [];
  const best = probabilities && Object.entries(probabilities).sort((a, b) => b[1] - a[1])[0][0];
  for (const name of [...group.classes, null]) {
    const radio = element("input", { type: "radio", name: `label-${group.name}`, value: name ?? "" });
    radio.checked = (label ?? null) === name;
    radio.setAttribute("aria-label", `${group.name}: ${name ?? "unknown"}`);
    radio.addEventListener("change", () => chosen(name));
    const model = element("span", { class: name !== null && name === best ? "model best" : "model" });
    if (name !== null && probabilities) {
      model.append(element("meter", { min: 0, max: 1, value: probabilities[name] }), percent(probabilities[name]));
    }
    rows.push(element("label", { class: name === null ? "row-class unknown" : "row-class" }, element("span", {}, name ?? "unknown"), model,
      element("span", { class: "reader" }, radio)));
  }
  const card = element("fieldset", { class: "group" }, element("legend", {}, group.name));
  if (evidence) card.append(evidenceLine(evidence, jump));
  card.append(...rows);
  card.dataset.group = group.name;
  return card;
}

/** `evidence`: [{slice, z, change}], the strongest first. */
function evidenceLine(evidence, jump) {
  const line = element("p", { class: "evidence" }, "Evidence: slices");
  for (const { slice, z, change } of evidence) {
    const sign = change > 0 ? "raises" : "lowers";
    const button = element("button", { type: "button" }, String(slice));
    button.title = `z = ${z.toFixed(1)} mm; ${sign} the log-odds of injury by ${Math.abs(change).toPrecision(2)}`;
    button.setAttribute("aria-label", `Go to slice ${slice}: ${button.title}`);
    button.addEventListener("click", () => jump(slice));
    line.append(button);
  }
  return line;
}

const VERSION_COLUMNS = [
  ["version", (version) => version.name],
  ["made", (version) => version.created?.slice(0, 16).replace("T", " ") ?? ""],
  ["score, lower is better", (version) => version.score?.toFixed?.(4) ?? ""],
  ["labelled patients", (version) => version.labels ?? ""],
  ["why", (version) => version.reason ?? ""],
];

export function versionHeader() {
  return element("tr", {}, ...VERSION_COLUMNS.map(([name]) => element("th", { scope: "col" }, name)), element("th"));
}

export function versionRow(version, choose) {
  const cells = VERSION_COLUMNS.map(([name, text]) =>
    element("td", { class: name === "why" ? "long" : "" }, String(text(version))));
  const button = element("button", { type: "button", disabled: version.chosen }, version.chosen ? "in use" : "use");
  button.setAttribute("aria-label", version.chosen ? `${version.name} is in use` : `Use version ${version.name}`);
  button.addEventListener("click", () => choose(version.name));
  return element("tr", {}, ...cells, element("td", {}, button));
}
