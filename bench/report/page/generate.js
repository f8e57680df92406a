// The chooser for readers who generate: length, depth and memory → the variants that fit, by the time of a token and
// by the tokens a second of the largest batch, from the cells that measured decoding.
const decoded = doc.generating;
const every = decoded ? decoded.label.map((_, place) => place) : [];
/** Whether the chooser advises on generating: it is chosen, or nothing else was measured. */
const isGenerating = () => decoded !== null && $("purpose")?.value !== "train";

function ofDecoding() {
  const chosen = Number($("decoding-setting").value);
  return every.filter((cell) => decoded.setting[cell] === chosen);
}

/** The cells by a figure, the best first; those that were disturbed come after the others, those without the
    figure last, and neither have a rank. */
function byFigure(fit, figure, sign) {
  const group = (cell) => (decoded[figure][cell] === null ? 2 : decoded.disturbed[cell] ? 1 : 0);
  const sorted = [...fit].sort((a, b) => group(a) - group(b) || sign * (decoded[figure][a] - decoded[figure][b]) || 0);
  return sorted.map((cell, place) => ({ cell, rank: group(cell) ? MISSING : String(place + 1) }));
}

function answer(table, titles, order, columns) {
  const head = ["", "variant", ...titles].map((title, column) => make("th", { scope: "col", class: column === 0 ? "rank" : column > 1 ? "number" : null }, title));
  const rows = order.map(({ rank, cell }) => make("tr", {}, make("td", { class: "rank" }, rank),
    make("th", { scope: "row" }, nameOf(decoded.label[cell], decoded.label[cell])),
    ...columns.map((name) => make("td", { class: "number" }, decoded[name][cell]))));
  table.replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

function chooseGenerating() {
  const own = ofDecoding(), length = Number($("choose-length").value), depth = Number($("choose-depth").value);
  const typed = $("budget").valueAsNumber, budget = typed > 0 ? typed * Number($("budget-unit").value) : null;
  const at = own.filter((cell) => decoded.length[cell] === length && decoded.depth[cell] === depth);
  const fit = at.filter((cell) => budget === null || (decoded.memory[cell] !== null && decoded.memory[cell] <= budget));
  answer($("by-token"), ["time a token", "/ dense", "state"], byFigure(fit, "token", 1), ["token_text", "token_ratio_text", "state_text"]);
  const batched = fit.filter((cell) => decoded.rate[cell] !== null);
  answer($("by-rate"), ["rate", "batch", "memory"], byFigure(batched, "rate", -1), ["rate_text", "batch_text", "memory_text"]);
  $("token-note").textContent = `One sequence with a context of ${full(length)} tokens, depth ${depth}; state: bytes that all layers hold.`;
  $("rate-note").textContent = batched.length ? "With the largest batch that was found to fit; memory: the peak for one sequence, with the weights." : "No batch was measured here.";
  $("by-rate").parentElement.hidden = !batched.length;
  $("generating").hidden = !fit.length;
  const limit = budget === null ? "" : ` into ${full(typed)} ${$("budget-unit").selectedOptions[0].text}`;
  $("chosen").textContent = `${fit.length} of ${at.length} decoded with a context of ${full(length)}, depth ${depth} ${budget === null ? "finished" : "fit"}${limit}.`;
  const listed = (title, names) => (names.length ? [make("p", { class: "note" }, make("strong", {}, title), " ", names.join(", "), ".")] : []);
  const here = new Set(at.map((cell) => decoded.label[cell]));
  $("left-out").replaceChildren(
    ...listed("Too large:", at.filter((cell) => !fit.includes(cell)).map((cell) => `${decoded.label[cell]} (${decoded.memory_text[cell]})`)),
    ...listed("Not decoded there:", distinct(own.map((cell) => decoded.label[cell])).filter((label) => !here.has(label))));
}

function offerGenerating() {
  offer($("decoding-setting"), decoded.settings.map((words, value) => [value, words]));
  const own = ofDecoding(), lengths = ascending(own.map((cell) => decoded.length[cell]));
  offer($("choose-length"), lengths.map((length) => [length, full(length)]), { preferred: lengths.at(-1), stay: true });
  offer($("choose-depth"), named(ascending(own.map((cell) => decoded.depth[cell]))), { stay: true });
  chooseGenerating();
}
