// Context, depth and memory → the variants that can generate in it, by the time of a token and by the state.

const generated = doc.decoding;

function offerGenerating() {
  const own = generated.cells.filter((cell) => cell.setting === Number($("generate-setting").value));
  const lengths = ascending(own.map((cell) => cell.length));
  offer($("generate-length"), lengths.map((length) => [length, full(length)]), { preferred: lengths.at(-1), stay: true });
  offer($("generate-depth"), named(ascending(own.map((cell) => cell.depth))), { stay: true });
  generate();
}

function generate() {
  const length = Number($("generate-length").value), depth = Number($("generate-depth").value);
  const typed = $("generate-budget").valueAsNumber;
  const budget = typed > 0 ? typed * Number($("generate-unit").value) : Infinity;
  const at = generated.cells.filter((cell) => cell.setting === Number($("generate-setting").value) && cell.length === length && cell.depth === depth);
  const fit = at.filter((cell) => cell.peak <= budget);

  // A time that was disturbed comes after the undisturbed, one that was not taken last; neither has a rank.
  const timed = (cell) => (cell.token === null ? 2 : cell.disturbed ? 1 : 0);
  const fastest = [...fit].sort((a, b) => timed(a) - timed(b) || (a.token ?? 0) - (b.token ?? 0));
  const rows = (order, isRanked, columns) => order.map((cell, place) => make("tr", {},
    make("td", { class: "rank" }, isRanked(cell) ? String(place + 1) : MISSING),
    make("th", { scope: "row" }, nameOf(cell.label, cell.label)),
    ...columns.map((key) => make("td", { class: "number" }, cell[key]))));
  fill($("by-token"), ["", "variant", "a token", "/ dense", "the prompt"],
    rows(fastest, (cell) => timed(cell) === 0, ["token_text", "ratio_text", "prompt_text"]));
  const smallest = [...fit].sort((a, b) => a.state - b.state);
  fill($("by-state"), ["", "variant", "state", "largest batch", "tokens a second"],
    rows(smallest, () => true, ["state_text", "batch_text", "rate_text"]));

  $("generated").hidden = !fit.length;
  const limit = budget === Infinity ? "" : ` fit into ${full(typed)} ${$("generate-unit").selectedOptions[0].text}`;
  const others = at.filter((cell) => !fit.includes(cell)).map((cell) => `${cell.label} (${cell.peak_text})`);
  $("generated-of").textContent = `${fit.length} of ${at.length} recorded at a context of ${full(length)}, depth ${depth}${limit}.`
    + (others.length ? ` Too large: ${others.join(", ")}.` : "");
}

$("generate-setting").addEventListener("change", offerGenerating);
for (const event of ["input", "change"]) {
  for (const id of ["generate-length", "generate-depth", "generate-budget", "generate-unit"]) $(id).addEventListener(event, generate);
}
$("to-generate").addEventListener("submit", (event) => event.preventDefault());
offer($("generate-setting"), generated.settings.map((words, place) => [place, words]));
offerGenerating();

// Only a page that has both asks what for.
for (const choice of document.querySelectorAll("#purpose input")) {
  choice.addEventListener("change", () => {
    for (const purpose of ["train", "generate"]) $(`to-${purpose}`).hidden = purpose !== choice.value;
  });
}
