// The document's lists have one entry a cell; a cell is known by its place in them.
const doc = JSON.parse(document.getElementById("data").textContent);
const cells = doc.label.map((_, place) => place);
const MISSING = "–";
const $ = (id) => document.getElementById(id);

/** An element with attributes and children; children that are strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** The marker of a variant as the plots have it. */
function swatch(label) {
  const { colour, dark, outline, half } = doc.styles[label];
  const drawn = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const attributes = { viewBox: "-1.3 -1.3 2.6 2.6", class: "swatch", "aria-hidden": "true" };
  for (const [name, value] of Object.entries(attributes)) drawn.setAttribute(name, value);
  drawn.style.setProperty("--light", colour);
  drawn.style.setProperty("--dark", dark);
  for (const [path, fill] of half ? [[outline, "none"], [half, "currentColor"]] : [[outline, "currentColor"]]) {
    const part = document.createElementNS("http://www.w3.org/2000/svg", "path");
    part.setAttribute("d", path);
    part.setAttribute("fill", fill);
    part.setAttribute("stroke", "currentColor");
    part.setAttribute("stroke-width", "0.2");
    drawn.append(part);
  }
  return drawn;
}

/** A variant's marker and name, on one line. */
const nameOf = (label, text) => make("span", { class: "name" }, swatch(label), make("span", {}, text));

/** Fill a select with [value, text] pairs, keeping what is chosen where it is still there; one that leaves no
    choice is hidden unless it is to `stay`. */
function offer(select, pairs, { preferred = null, stay = false } = {}) {
  const before = select.options.length ? select.value : preferred;
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
  const wanted = pairs.find(([value]) => String(value) === String(before));
  select.value = String((wanted ?? pairs[0] ?? [""])[0]);
  select.closest("div").hidden = pairs.length < 2 && !stay;
}

const distinct = (values) => [...new Set(values)];
const ascending = (values) => distinct(values).sort((a, b) => a - b);
const named = (values) => values.map((value) => [value, String(value)]);
const full = (count) => Number(count).toLocaleString("en");

/** The cells of the setting that is chosen for the page. */
function inSetting() {
  const chosen = Number($("setting")?.value ?? 0);
  return cells.filter((cell) => doc.setting[cell] === chosen);
}
const onSetting = []; // what to do when another setting is chosen
if ($("setting")) {
  $("setting").replaceChildren(...doc.settings.map((words, value) => make("option", { value }, words)));
  const sizes = doc.settings.map((_, place) => doc.setting.filter((setting) => setting === place).length);
  $("setting").value = String(sizes.indexOf(Math.max(...sizes)));
  $("setting").addEventListener("change", () => onSetting.forEach((act) => act()));
}
