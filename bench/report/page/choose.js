// Length, depth and memory → the variants that fit, by quality and by speed.

/** The trained cells that speak for quality: those of the length and depth nearest to what is asked, in doublings;
    of another setting of the same task only where none was trained in this one. */
function trainedNear(setting, length, depth) {
  const far = (cell) => Math.abs(Math.log2(doc.length[cell] / length)) + Math.abs(Math.log2(doc.depth[cell] / depth));
  const away = (cell) => (doc.setting[cell] === setting ? 0 : 1);
  const trained = cells.filter((cell) => doc.score[cell] !== null && doc.tasks[doc.setting[cell]] === doc.tasks[setting]);
  const [first] = trained.sort((a, b) => away(a) - away(b) || far(a) - far(b));
  return trained.filter((cell) => ["setting", "length", "depth"].every((key) => doc[key][cell] === doc[key][first]));
}

/** Where and on what those cells were trained, in words. */
function trainedWhere([cell, ...others], setting, length, depth) {
  if (cell === undefined) return "No model was trained on this task.";
  const on = distinct([cell, ...others].map((one) => doc.trained[one])).filter(Boolean).join("; ");
  const where = `Models trained at length ${full(doc.length[cell])}, depth ${doc.depth[cell]}${on && ` on ${on}`}`;
  if (doc.setting[cell] !== setting) return `${where}, in another setting (${doc.settings[doc.setting[cell]]}): none was in this one.`;
  return doc.length[cell] === length && doc.depth[cell] === depth ? `${where}.` : `${where}: the nearest to what is asked.`;
}

/** The trained cell that speaks for a candidate: its own way of saving activations first. */
function trainedLike(cell, pool) {
  const like = pool.filter((other) => doc.label[other] === doc.label[cell]);
  return like.find((other) => doc.activations[other] === doc.activations[cell]) ?? like[0] ?? null;
}

const asName = (cell, ways) => doc.label[cell] + (doc.leaks[cell] ? "†" : "") + (ways > 1 ? `, ${doc.activations[cell]}` : "");

/** Rows under titles; the first column names the row. */
function fill(table, titles, rows) {
  const head = titles.map((title, column) => make("th", { scope: "col", class: column === 0 ? "rank" : column > 1 ? "number" : null }, title));
  table.replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

function ranked(order, ways, columns) {
  return order.map(({ rank, cell }) => make("tr", {},
    make("td", { class: "rank" }, rank),
    make("th", { scope: "row" }, nameOf(doc.label[cell], asName(cell, ways))),
    ...columns.map((show) => make("td", { class: "number" }, show(cell)))));
}

/** The rows of the best models, and among them those of the baselines of their text, which are not chosen. */
function amongBaselines(rows, values, baselines) {
  const all = rows.map((row, place) => ({ row, value: values[place] }));
  for (const { name, value, text } of baselines) {
    const row = make("tr", { class: "baseline" }, make("td", { class: "rank" }, MISSING), make("th", { scope: "row" }, `${name} (baseline)`),
      make("td", { class: "number" }, text), make("td", { class: "number" }, MISSING));
    const place = all.findIndex((other) => other.value === null || other.value > value);
    all.splice(place < 0 ? all.length : place, 0, { row, value });
  }
  return all.map(({ row }) => row);
}

/** The ranks that a cell may have among others, by `worse`, which lists for each cell those that are certainly worse:
    those that are certainly better come before it, those that are certainly worse after it; accuracies are not compared. */
function places(cell, others, worse) {
  const low = 1 + others.filter((other) => worse[other].includes(cell)).length;
  const high = others.length - others.filter((other) => worse[cell].includes(other)).length;
  return low === high ? String(low) : `${low}–${high}`;
}

function choose() {
  if (isGenerating()) { chooseGenerating(); return; }
  const own = inSetting(), setting = doc.setting[own[0]];
  const length = Number($("choose-length").value), depth = Number($("choose-depth").value);
  const typed = $("budget").valueAsNumber;
  const budget = typed > 0 ? typed * Number($("budget-unit").value) : null;
  const at = own.filter((cell) => doc.length[cell] === length && doc.depth[cell] === depth);
  const ways = new Set(own.map((cell) => doc.activations[cell])).size;
  // One that ran out of memory here may yet be predicted to fit into a budget that is asked for.
  const ran = (cell) => doc.finished[cell] > 0 || (budget !== null && /oom/.test(doc.status[cell]) && doc.memory[cell] !== null);
  const known = at.filter(ran);
  const fit = known.filter((cell) => budget === null || (doc.memory[cell] !== null && doc.memory[cell] <= budget));

  const pool = trainedNear(setting, length, depth);
  const speaks = new Map(fit.map((cell) => [cell, trainedLike(cell, pool)]));
  const value = (cell) => {
    const trained = speaks.get(cell);
    if (trained === null) return Infinity;
    return doc.accurate[trained] ? -doc.score[trained] : doc.score[trained];
  };
  // What leaks comes after the sound ones, and what is undertrained is as good as it is, but neither has a rank.
  const sound = (cell) => (speaks.get(cell) === null ? 2 : doc.leaks[cell] ? 1 : 0);
  const unranked = (cell) => sound(cell) > 0 || doc.unranked[speaks.get(cell)];
  const best = [...fit].sort((a, b) => sound(a) - sound(b) || value(a) - value(b) || 0);
  const memory = (cell) => doc.memory_text[cell];
  const score = (cell) => {
    const trained = speaks.get(cell);
    if (trained === null) return MISSING;
    const other = doc.activations[trained] === doc.activations[cell] ? "" : ` (${doc.activations[trained]})`;
    return doc.score_text[trained] + other;
  };
  const taking = best.filter((cell) => !unranked(cell));
  const rows = ranked(best.map((cell) => ({ rank: unranked(cell) ? MISSING : places(speaks.get(cell), taking.map((other) => speaks.get(other)), doc.beats), cell })), ways, [score, memory]);
  const values = best.map((cell) => (sound(cell) ? null : value(cell)));
  const baselines = pool.length && doc.score_name[pool[0]] === "bits per byte" ? doc.baselines[pool[0]] : [];
  fill($("by-quality"), ["", "variant", (pool.length && doc.score_name[pool[0]]) || "bits per byte", "memory"], amongBaselines(rows, values, baselines));
  $("by-quality").parentElement.hidden = !pool.length;
  $("quality-note").textContent = trainedWhere(pool, setting, length, depth);

  // What was disturbed comes after the undisturbed, and what was not timed last; neither has a rank. No time has one
  // where nothing tells any two apart.
  const timed = (cell) => (doc.seconds[cell] === null ? 2 : doc.disturbed[cell] ? 1 : 0);
  const isTimed = (cell) => doc.seconds[cell] !== null;
  const order = (cell) => doc.seconds[cell] ?? doc.flops[cell] ?? Infinity;
  const fastest = [...fit].sort((a, b) => timed(a) - timed(b) || (order(a) === order(b) ? 0 : order(a) - order(b)));
  const clocked = fastest.filter((cell) => timed(cell) === 0);
  const isTold = clocked.some((cell) => clocked.some((other) => doc.faster[cell].includes(other)));
  const ratio = doc.table.find((column) => column.title === "time / dense");
  const time = (cell) => (!isTimed(cell) ? `not timed, ${doc.flops_text[cell]}` : doc.seconds_text[cell]);
  const columns = [["step time", time], ["/ dense", (cell) => ratio?.text[cell] ?? MISSING], ["memory", memory]];
  fill($("by-speed"), ["", "variant", ...columns.map(([title]) => title)],
    ranked(fastest.map((cell) => ({ rank: timed(cell) || !isTold ? MISSING : places(cell, clocked, doc.faster), cell })), ways, columns.map(([, show]) => show)));
  const untimed = fit.filter((cell) => !isTimed(cell)).length, guessed = fit.filter((cell) => doc.predicted[cell]).length;
  const untold = clocked.length > 1 && !isTold ? " Nothing tells the undisturbed times apart: no ranks." : "";
  $("speed-note").textContent = (untimed === 0 ? `Measured at length ${full(length)}, depth ${depth}.`
    : `${untimed === fit.length ? "None was" : `${untimed} were not`} timed at length ${full(length)}, depth ${depth}: by executed FLOPs instead, unranked.`) + untold;

  $("answers").hidden = !fit.length;
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
  const generates = isGenerating();
  for (const id of ["generating", "decoding-setting"]) if ($(id)) $(id).closest(".generates").hidden = !generates;
  if ($("answers")) $("answers").closest(".trains").hidden = generates;
  if (generates) { offerGenerating(); return; }
  const own = inSetting();
  const lengths = ascending(own.map((cell) => doc.length[cell]));
  const done = ascending(own.filter((cell) => doc.finished[cell]).map((cell) => doc.length[cell]));
  offer($("choose-length"), lengths.map((length) => [length, full(length)]), { preferred: done.at(-1), stay: true });
  const depths = ascending(own.map((cell) => doc.depth[cell]));
  offer($("choose-depth"), named(depths), { stay: true });
  choose();
}
for (const event of ["input", "change"]) $("choice").addEventListener(event, ({ target }) => (["purpose", "decoding-setting"].includes(target.id) ? offerChoices() : choose()));
$("choice").addEventListener("submit", (event) => event.preventDefault());
onSetting.push(offerChoices);
offerChoices();
