// Length, depth and memory → the variants that fit, by quality and by speed.

/** The length and depth nearest to those asked for at which models were trained, in doublings; null without any. */
function trainedNear(own, length, depth) {
  const far = (cell) => Math.abs(Math.log2(doc.length[cell] / length)) + Math.abs(Math.log2(doc.depth[cell] / depth));
  const trained = own.filter((cell) => doc.score[cell] !== null).sort((a, b) => far(a) - far(b));
  return trained.length ? { length: doc.length[trained[0]], depth: doc.depth[trained[0]] } : null;
}

/** The trained cell that speaks for a candidate: its own way of saving activations first. */
function trainedLike(cell, pool) {
  const like = pool.filter((other) => doc.label[other] === doc.label[cell]);
  return like.find((other) => doc.activations[other] === doc.activations[cell]) ?? like[0] ?? null;
}

const asName = (cell, ways) => doc.label[cell] + (doc.leaks[cell] ? "†" : "") + (ways > 1 ? `, ${doc.activations[cell]}` : "");

/** Rows under titles; the first column names the row. */
function fill(table, titles, rows) {
  const head = titles.map((title, column) => make("th", { scope: "col", class: column > 1 ? "number" : null }, title));
  table.replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

function ranked(order, ways, columns) {
  return order.map(({ rank, cell }) => make("tr", {},
    make("td", {}, rank),
    make("th", { scope: "row" }, swatch(doc.label[cell]), asName(cell, ways)),
    ...columns.map((show) => make("td", { class: "number" }, show(cell)))));
}

function choose() {
  const own = inSetting();
  const length = Number($("choose-length").value), depth = Number($("choose-depth").value);
  const typed = $("budget").valueAsNumber;
  const budget = typed > 0 ? typed * Number($("budget-unit").value) : null;
  const at = own.filter((cell) => doc.length[cell] === length && doc.depth[cell] === depth);
  const ways = new Set(own.map((cell) => doc.activations[cell])).size;
  // One that ran out of memory here may yet be predicted to fit into a budget that is asked for.
  const ran = (cell) => doc.finished[cell] > 0 || (budget !== null && /oom/.test(doc.status[cell]) && doc.memory[cell] !== null);
  const known = at.filter(ran);
  const fit = known.filter((cell) => budget === null || (doc.memory[cell] !== null && doc.memory[cell] <= budget));

  const near = trainedNear(own, length, depth);
  const pool = near ? own.filter((cell) => doc.score[cell] !== null && doc.length[cell] === near.length && doc.depth[cell] === near.depth) : [];
  const speaks = new Map(fit.map((cell) => [cell, trainedLike(cell, pool)]));
  const value = (cell) => {
    const trained = speaks.get(cell);
    if (trained === null) return Infinity;
    return doc.accurate[trained] ? -doc.score[trained] : doc.score[trained];
  };
  const sound = (cell) => (speaks.get(cell) === null ? 2 : doc.leaks[cell] ? 1 : 0);
  const best = [...fit].sort((a, b) => sound(a) - sound(b) || value(a) - value(b) || 0);
  const memory = (cell) => doc.memory_text[cell];
  const score = (cell) => {
    const trained = speaks.get(cell);
    if (trained === null) return MISSING;
    const other = doc.activations[trained] === doc.activations[cell] ? "" : ` (${doc.activations[trained]})`;
    return doc.score_text[trained] + other;
  };
  fill($("by-quality"), ["", "variant", pool.some((cell) => doc.accurate[cell]) ? "accuracy" : "perplexity", "peak memory"],
    ranked(best.map((cell, place) => ({ rank: sound(cell) ? MISSING : String(place + 1), cell })), ways, [score, memory]));
  const exact = near && near.length === length && near.depth === depth;
  const trained = distinct(pool.map((cell) => doc.trained[cell])).filter(Boolean).join("; ");
  $("quality-note").textContent = !near ? "No model was trained in this setting."
    : `Models trained at length ${full(near.length)}, depth ${near.depth}${trained ? ` on ${trained}` : ""}.`
      + (exact ? "" : ` None was at length ${full(length)}, depth ${depth}: this is the nearest.`);

  const timed = (cell) => (doc.seconds[cell] === null ? 1 : 0);
  const order = (cell) => doc.seconds[cell] ?? doc.flops[cell] ?? Infinity;
  const fastest = [...fit].sort((a, b) => timed(a) - timed(b) || (order(a) === order(b) ? 0 : order(a) - order(b)));
  const ratio = doc.table.find((column) => column.title === "time / dense");
  const time = (cell) => (timed(cell) ? `not timed, ${doc.flops_text[cell]}` : doc.seconds_text[cell]);
  const columns = [["step time", time], ["/ dense", (cell) => ratio?.text[cell] ?? MISSING], ["peak memory", memory]];
  fill($("by-speed"), ["", "variant", ...columns.map(([title]) => title)],
    ranked(fastest.map((cell, place) => ({ rank: timed(cell) ? MISSING : String(place + 1), cell })), ways, columns.map(([, show]) => show)));
  const untimed = fit.filter(timed).length, guessed = fit.filter((cell) => doc.predicted[cell]).length;
  $("speed-note").textContent = untimed === 0 ? `Measured at length ${full(length)}, depth ${depth}.`
    : `${untimed === fit.length ? "None was" : `${untimed} were not`} timed at length ${full(length)}, depth ${depth}: by executed FLOPs instead, unranked.`;

  const limit = budget === null ? "" : ` into ${full(typed)} ${$("budget-unit").selectedOptions[0].text}`;
  const source = !fit.length ? "" : guessed === 0 ? "peak memory measured in all." : guessed === fit.length ? "peak memory predicted (ᵖ) in all."
    : `peak memory predicted (ᵖ) in ${guessed}, measured in the others.`;
  $("chosen").textContent = `${fit.length} of ${at.length} recorded at length ${full(length)}, depth ${depth} ${budget === null ? "finished" : "fit"}${limit}; ${source}`.replace(/; $/, ".");
  const listed = (title, names) => (names.length ? [make("p", { class: "note" }, make("strong", {}, title), " ", names.join(", "), ".")] : []);
  const here = new Set(at.map((cell) => doc.label[cell]));
  $("left-out").replaceChildren(
    ...listed("Too large:", known.filter((cell) => !fit.includes(cell)).map((cell) => `${asName(cell, ways)} (${memory(cell)})`)),
    ...listed("Did not finish:", at.filter((cell) => !ran(cell)).map((cell) => `${asName(cell, ways)} (${doc.status[cell]})`)),
    ...listed("Not recorded there:", distinct(own.map((cell) => doc.label[cell])).filter((label) => !here.has(label))));
}

function offerChoices() {
  const own = inSetting();
  const lengths = ascending(own.map((cell) => doc.length[cell]));
  offer($("choose-length"), lengths.map((length) => [length, full(length)]), lengths.at(-1));
  const depths = ascending(own.map((cell) => doc.depth[cell]));
  offer($("choose-depth"), named(depths), depths[0]);
  choose();
}
$("choice").addEventListener("input", choose);
$("choice").addEventListener("submit", (event) => event.preventDefault());
onSetting.push(offerChoices);
offerChoices();
