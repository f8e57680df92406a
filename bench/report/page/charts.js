// Cost against length and quality against cost, drawn by Vega-Lite from the rows of what is chosen.
const MOST_TICKS = 7, HEIGHT = 270, STRIP = 11, NAME_HEIGHT = 13, NAME_WIDTH = 130, LETTER = 6.2;
const DISTURBED = "timed while something else ran, without an undisturbed measurement (§)";
const CROSS = "M-1,-1L1,1M-1,1L1,-1";
const night = matchMedia("(prefers-color-scheme: dark)");
const views = new Set();
const fronts = new Set(doc.pareto.flatMap((pool) => pool.costs.flatMap((cost) => pool.label.filter((_, place) => cost.front[place]))));
const leftOut = new Set(doc.left_out.filter((label) => !fronts.has(label)));
const hidden = new Set(leftOut); // the variants that are not drawn
const tone = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Ends and ticks of a logarithmic axis: the finest level that is not too many; room for `rows` of crosses above. */
function axis(values, levels, rows = 0) {
  let low = Math.log2(Math.min(...values)), high = Math.log2(Math.max(...values));
  const margin = Math.max(0.06 * (high - low), 0.45 - (high - low) / 2, 0.1);
  low -= margin; high += margin;
  const inside = levels.map((level) => level.filter(([at]) => at >= 2 ** low && at <= 2 ** high));
  const ticks = inside.find((level) => level.length <= MOST_TICKS) ?? inside.at(-1);
  const top = low + (high - low) / (1 - (rows * STRIP + (rows ? 6 : 0)) / HEIGHT);
  return { domain: [2 ** low, 2 ** top], ticks };
}
const ticked = (ticks, more) => ({ values: ticks.map(([at]) => at), labelExpr: `(${JSON.stringify(Object.fromEntries(ticks))})[datum.value]`, ...more });
const paint = (label) => doc.styles[label][night.matches ? "dark" : "colour"];
const looks = (label) => ({ label, colour: paint(label), outline: doc.styles[label].outline, half: doc.styles[label].half });

const opacity = (strong) => ({ condition: { test: "hot === '' || datum.label === hot", value: strong }, value: 0.12 * strong });
const raw = (field) => ({ field, type: "nominal", scale: null, legend: null });
/** Markers as the plots have them: hollow where `hollow`, filled by half where a variant's is. */
function markers(position, tooltip, transform = []) {
  const back = tone("back");
  return [
    { transform, mark: { type: "point", size: 75, strokeWidth: 1.4, opacity: 1 }, encoding: { ...position, tooltip, shape: raw("outline"), stroke: raw("colour"), opacity: opacity(1),
      fill: { condition: { test: "datum.hollow || datum.half !== null || (datum.dashed && datum.count < 2)", value: back }, ...raw("colour") } } },
    { transform: [...transform, { filter: "datum.half !== null && !datum.hollow" }],
      mark: { type: "point", size: 75, strokeWidth: 0, opacity: 1 }, encoding: { ...position, tooltip, shape: raw("half"), fill: raw("colour"), opacity: opacity(1) } },
  ];
}

/** Draw a specification into an element; what is under the pointer there stands out in every chart. */
async function draw(figure, spec) {
  const ink = tone("ink"), quiet = tone("quiet");
  const style = { labelColor: quiet, titleColor: ink, gridColor: tone("grid"), domainColor: tone("line"), tickColor: tone("line"), titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12, labelOverlap: true, labelSeparation: 6 };
  const room = figure.querySelector(".chart");
  if (figure.view) { views.delete(figure.view); figure.view.finalize(); figure.view = null; }
  figure.querySelector(".left").textContent = notDrawn();
  const hollow = distinct((spec?.data.values ?? []).map((row) => row.hollow).filter(Boolean));
  figure.querySelector(".hollow").textContent = hollow.length ? `Hollow: ${hollow.join("; ")}.` : "";
  if (spec === null) { room.replaceChildren(make("p", { class: "empty" }, "Nothing to draw for this choice.")); return; }
  const whole = { width: "container", height: HEIGHT, autosize: { type: "fit-x", contains: "padding" }, background: null, description: figure.dataset.title,
    params: [{ name: "hot", value: "" }], config: { font: getComputedStyle(document.body).fontFamily, view: { stroke: null }, axis: style, axisY: { minExtent: 52 } }, ...spec };
  room.style.minHeight = "0";
  const drawn = await vegaEmbed(room, whole, { mode: "vega-lite", renderer: "svg", actions: false, ast: true, tooltip: { theme: "custom" } });
  figure.view = drawn.view;
  views.add(drawn.view);
  drawn.view.addEventListener("mouseover", (_, item) => item?.datum?.label && heat(item.datum.label));
  drawn.view.addEventListener("mouseout", () => heat(""));
}
const heat = (label) => views.forEach((view) => view.signal("hot", label).runAsync());

function costRows(figure, chosen) {
  return figure.curves.flatMap((curve) => chosen.filter((cell) => curve.value[cell] !== null).map((cell) => ({
    ...looks(doc.label[cell]), name: doc.label[cell] + (doc.leaks[cell] ? "†" : ""), length: doc.length[cell], value: curve.value[cell],
    low: curve.low?.[cell] ?? null, high: curve.high?.[cell] ?? null, text: curve.text[cell] + (curve.name ? ` (${curve.name})` : ""),
    group: `${doc.label[cell]}\n${curve.name}`, curve: curve.name, dashed: curve.dashed, hollow: curve.hollow ? curve.name : curve.timed && doc.disturbed[cell] ? DISTURBED : "", replicates: doc.replicate_counts[cell] })));
}

/** Places at least `gap` apart, in the order of `places` (ascending) and as near to them as possible, between 0 and `room` if they fit. */
function spread(places, gap, room) {
  const blocks = [];
  for (const [number, place] of places.entries()) {
    let block = { sum: place - number * gap, size: 1 };
    while (blocks.length && blocks.at(-1).sum / blocks.at(-1).size > block.sum / block.size) {
      const before = blocks.pop();
      block = { sum: before.sum + block.sum, size: before.size + block.size };
    }
    blocks.push(block);
  }
  const spare = room - gap * (places.length - 1), start = Math.min(spare, 0) / 2;
  const free = blocks.flatMap(({ sum, size }) => Array(size).fill(Math.min(Math.max(sum / size, start), start + Math.max(spare, 0))));
  return free.map((place, number) => place + number * gap);
}

/** Pixels for the names beside a chart: of a wide one more. */
const roomFor = (wide) => Math.max(NAME_WIDTH, Math.min(0.4 * wide, 260));
/** A name in lines that fit into the room, as far as its words allow. */
function inLines(name, room) {
  const most = Math.floor(room / LETTER);
  return name.split(" ").reduce(([...lines], word) => {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
    if (lines.length && longer.length > most) return [...lines, word];
    return [...lines.slice(0, -1), longer];
  }, []);
}

/** The name of each variant at the right end of its line, with a leader from its last point. */
function nameEnds(rows, x, cost, room) {
  const [low, high] = cost.scale.domain.map(Math.log2);
  const ends = Object.values(Object.groupBy(rows, (row) => row.label)).map((own) => own.reduce((last, row) => (row.length > last.length ? row : last)));
  ends.sort((a, b) => a.value - b.value);
  const words = ends.map((row) => inLines(row.name, room));
  const gap = NAME_HEIGHT * Math.max(...words.map((lines) => lines.length)), whole = gap * ends.length > HEIGHT;
  const places = spread(ends.map((row) => (Math.log2(row.value) - low) / (high - low) * HEIGHT), whole ? NAME_HEIGHT : gap, HEIGHT);
  const values = ends.map((row, number) => ({ ...row, words: whole ? row.name : words[number], at: 2 ** (low + places[number] / HEIGHT * (high - low)) }));
  const right = { value: "width" };
  return [
    { data: { values }, mark: { type: "rule", strokeWidth: 0.8, x2Offset: 5 }, encoding: { x, x2: right, y: { ...cost, field: "value" }, y2: { field: "at" }, stroke: raw("colour"), opacity: opacity(0.6) } },
    { data: { values }, mark: { type: "text", align: "left", baseline: "middle", dx: 7, fontSize: 11, lineHeight: NAME_HEIGHT, limit: room }, encoding: { x: right, y: { ...cost, field: "at" }, text: { field: "words" }, color: raw("colour"), opacity: opacity(1) } },
  ];
}

function costSpec(figure, wide) {
  const depth = Number($("chart-depth").value), way = $("chart-activations").value;
  const chosen = inSetting().filter((cell) => doc.depth[cell] === depth && doc.activations[cell] === way && !hidden.has(doc.label[cell]));
  const rows = costRows(figure, chosen);
  if (!rows.length) return null;
  const tall = {};
  const lost = chosen.filter((cell) => doc.finished[cell] < doc.records[cell]).map((cell) => {
    const place = tall[doc.length[cell]] = (tall[doc.length[cell]] ?? 0) + 1;
    return { ...looks(doc.label[cell]), length: doc.length[cell], place: Math.min(place, 8), whole: doc.finished[cell] === 0, status: doc.status[cell], reason: doc.reason[cell] };
  });
  const ends = axis(rows.flatMap((row) => [row.value, row.low, row.high].filter((v) => v !== null)), figure.ticks, Math.min(Math.max(0, ...Object.values(tall)), 8));
  const lengths = ascending([...rows, ...lost].map((row) => row.length));
  const cost = { type: "quantitative", scale: { type: "log", base: 2, domain: ends.domain, nice: false }, axis: ticked(ends.ticks, { title: figure.axis }) };
  const tooltip = [["name", "variant"], ["length", "length"], ["text", figure.axis], ["replicates", "replicates"]].map(([field, title]) => ({ field, title, type: "nominal" }));
  if (lengths.length < 2) return dots(rows, cost, tooltip, lengths[0], figure, wide);
  const x = { field: "length", type: "quantitative", scale: { type: "log", base: 2, domain: [lengths[0] / 1.15, lengths.at(-1) * 1.15], nice: false },
    axis: ticked(lengths.map((length) => [length, doc.lengths[length]]), { title: "sequence length (tokens)", grid: false }) };
  const position = { x, y: { ...cost, field: "value" } };
  const several = { filter: { field: "count", gte: 2 } };
  const count = { joinaggregate: [{ op: "count", as: "count" }], groupby: ["group"] };
  return { data: { values: rows }, layer: [
    { transform: [{ filter: "datum.low !== null" }, count, several], mark: { type: "area" }, encoding: { x, y: { ...cost, field: "low" }, y2: { field: "high" }, detail: { field: "group" }, fill: raw("colour"), opacity: opacity(0.18) } },
    { transform: [count, several], mark: { type: "line", strokeWidth: 1.8 }, encoding: { ...position, detail: { field: "group" }, stroke: raw("colour"), opacity: opacity(1),
      strokeDash: { condition: { test: "datum.dashed", value: [5, 4] }, value: [1, 0] } } },
    ...nameEnds(rows, x, cost, roomFor(wide)),
    ...markers(position, tooltip, [count, { filter: "!datum.dashed || datum.hollow || datum.count < 2" }]),
    { data: { values: lost }, mark: { type: "point", size: 60, strokeWidth: 2, shape: CROSS, y: { expr: `datum.place * ${STRIP} - 4` } },
      encoding: { x, stroke: raw("colour"), opacity: { condition: { test: "datum.whole", value: 1 }, value: 0.5 },
        tooltip: ["label", "length", "status", "reason"].map((field) => ({ field, type: "nominal", title: field === "label" ? "variant" : field })) } },
  ] };
}

/** Of a single length: a row a variant instead of a line, the best on top. */
function dots(lines, cost, tooltip, length, figure, wide) {
  const rows = lines.map((row) => ({ ...row, hollow: row.hollow || (row.dashed ? row.curve : "") }));
  const room = roomFor(wide), words = Object.fromEntries(rows.map(({ name }) => [name, inLines(name, room)]));
  const y = { field: "name", type: "nominal", sort: { field: "value", op: "min", order: "ascending" }, axis: { title: null, grid: true, labelLimit: room, labelLineHeight: 11, labelOverlap: false, labelExpr: `(${JSON.stringify(words)})[datum.value]` } };
  const { axis: { values, labelExpr }, scale } = cost;
  const x = { field: "value", type: "quantitative", scale, axis: { values, labelExpr, labelFlush: 24, title: `${figure.axis} at length ${full(length)}`, titleAnchor: "end" } };
  const each = distinct(rows.map((row) => row.name)).length;
  return { height: Math.max(120, 24 * each), data: { values: rows }, layer: [
    { transform: [{ filter: "datum.low !== null" }], mark: { type: "rule" }, encoding: { y, x: { ...x, field: "low" }, x2: { field: "high" }, stroke: raw("colour"), opacity: opacity(1) } },
    ...markers({ x, y }, tooltip)] };
}

function paretoSpec() {
  const pool = doc.pareto[Number($("pool").value)], cost = pool?.costs[Number($("cost").value)];
  if (!cost) return null;
  const rows = pool.label.map((label, place) => ({ ...looks(label), name: label + (pool.leaks[place] ? "†" : "") + (pool.undertrained[place] ? "ᵘ" : ""), hollow: pool.leaks[place] ? "sees the future (†)" : cost.disturbed[place] ? DISTURBED : "", activations: pool.activations[place],
    value: cost.value[place], low: cost.low[place], high: cost.high[place], text: cost.text[place], front: cost.front[place], quality: pool.quality.value[place],
    worst: pool.quality.low[place], most: pool.quality.high[place], said: pool.quality.text[place] })).filter((row) => row.value !== null && !hidden.has(row.label));
  if (!rows.length) return null;
  const ends = axis(rows.flatMap((row) => [row.value, row.low, row.high].filter((v) => v !== null)), cost.ticks);
  const x = { field: "value", type: "quantitative", scale: { type: "log", base: 2, domain: ends.domain, nice: false }, axis: ticked(ends.ticks, { title: cost.name }) };
  const span = [...rows.flatMap((row) => [row.quality, row.worst, row.most].filter((v) => v !== null)), ...pool.baselines.map(({ value }) => value)];
  const [least, most] = [Math.min(...span), Math.max(...span)], margin = 0.08 * (most - least) || 0.05;
  const y = { field: "quality", type: "quantitative", scale: { zero: false, nice: false, domain: [least - margin, most + margin] }, axis: { title: pool.axis, tickCount: 6 } };
  const tooltip = [["name", "variant"], ["activations", "activations"], ["text", cost.name], ["said", "quality"]].map(([field, title]) => ({ field, title, type: "nominal" }));
  const bar = (from, to, encoding) => ({ transform: [{ filter: `datum.${from} !== null` }], mark: { type: "rule" }, encoding: { ...encoding, stroke: raw("colour"), opacity: opacity(0.8) } });
  return { data: { values: rows }, layer: [
    { data: { values: pool.baselines }, mark: { type: "rule", color: tone("quiet"), strokeDash: [4, 4] },
      encoding: { y: { ...y, field: "value" }, tooltip: [{ field: "name", title: "baseline", type: "nominal" }, { field: "text", title: "bits per byte", type: "nominal" }] } },
    { data: { values: pool.baselines }, mark: { type: "text", x: 4, dy: -5, align: "left", fontSize: 10, color: tone("quiet") }, encoding: { y: { ...y, field: "value" }, text: { field: "name" } } },
    { transform: [{ filter: "datum.front" }], mark: { type: "line", interpolate: "step-after", color: tone("quiet"), strokeWidth: 1 }, encoding: { x, y } },
    bar("low", "high", { y, x: { ...x, field: "low" }, x2: { field: "high" } }), bar("worst", "most", { x, y: { ...y, field: "worst" }, y2: { field: "most" } }),
    ...markers({ x, y }, tooltip)] };
}

/** A chart's place on the page; it is drawn when it first comes near the screen or in idle time, and again when the choice changes. */
const waiting = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
  target.near = isIntersecting;
  if (isIntersecting && target.stale) refresh(target);
}), { rootMargin: "300px" });
function refresh(figure) {
  figure.stale = !figure.near;
  if (figure.near) draw(figure, figure.spec(figure.clientWidth));
}
function place(host, title, note, spec) {
  const figure = make("figure", { "data-title": title }, make("figcaption", {}, title, " ", make("span", { class: "note" }, note)), make("div", { class: "chart" }), make("p", { class: "note hollow" }), make("p", { class: "note left" }));
  Object.assign(figure, { spec, stale: true, near: false });
  host.append(figure);
  waiting.observe(figure);
}
function redraw() {
  document.querySelectorAll("#charts figure").forEach(refresh);
  drawTheRest();
}
/** Draw the charts that are not near the screen in idle time, so that all of them are there when the page is printed. */
const whenIdle = window.requestIdleCallback ?? ((act) => setTimeout(act, 100));
const drawTheRest = () => whenIdle(async () => {
  const figure = [...document.querySelectorAll("#charts figure")].find((one) => one.stale && one.offsetWidth > 0);
  if (!figure) return;
  figure.stale = false;
  await draw(figure, figure.spec(figure.clientWidth));
  drawTheRest();
});

function offerCharts() {
  const own = inSetting();
  offer($("chart-depth"), named(ascending(own.map((cell) => doc.depth[cell]))));
  offer($("chart-activations"), named(doc.strategies.filter((name) => own.some((cell) => doc.activations[cell] === name))));
  const pools = doc.pareto.map((pool, number) => [number, pool.pool]).filter(([number]) => doc.pareto[number].setting === Number($("setting")?.value ?? 0));
  $("pareto").hidden = !pools.length;
  offer($("pool"), pools);
  if (pools.length) offer($("cost"), doc.pareto[Number($("pool").value)].costs.map((cost, number) => [number, cost.name]));
  const here = new Set(own.map((cell) => doc.label[cell]));
  const entryOf = (label) => {
    const box = make("input", { type: "checkbox", value: label });
    box.checked = !hidden.has(label);
    box.addEventListener("change", () => { hidden[box.checked ? "delete" : "add"](label); redraw(); });
    const entry = make("label", {}, box, swatch(label), label);
    for (const [event, hot] of [["pointerenter", label], ["pointerleave", ""], ["focusin", label], ["focusout", ""]]) entry.addEventListener(event, () => heat(hot));
    return entry;
  };
  const families = doc.families.map(({ name, labels }) => ({ name, labels: labels.filter((label) => here.has(label)) })).filter(({ labels }) => labels.length);
  $("legend").replaceChildren(...families.map(({ name, labels }) => {
    const head = make("button", { type: "button", class: "head", title: `Show or hide: ${name}` }, name);
    head.addEventListener("click", () => { const some = labels.some((label) => hidden.has(label)); tick((label) => (labels.includes(label) ? some : !hidden.has(label))); });
    return make("div", { class: "family", role: "group", "aria-label": name }, ...(labels.length > 1 ? [head] : []), ...labels.map(entryOf));
  }));
  redraw();
}
/** How many of the setting's variants the charts do not draw, in words. */
function notDrawn() {
  const here = distinct(inSetting().map((cell) => doc.label[cell])), left = here.filter((label) => hidden.has(label)).length;
  return left ? `${left} of ${here.length} variants are not drawn.` : "";
}
/** Draw the variants for which `wanted` is true. */
function tick(wanted) {
  for (const box of $("legend").querySelectorAll("input")) {
    box.checked = wanted(box.value);
    hidden[box.checked ? "delete" : "add"](box.value);
  }
  redraw();
}

for (const figure of doc.figures) place($("figures"), figure.title, figure.curves.filter((curve) => curve.name).map((curve) => `${curve.hollow ? "hollow" : curve.dashed ? "dashed or hollow" : "solid"}: ${curve.name}`).join(", "), (wide) => costSpec(figure, wide));
if (doc.pareto.length) place($("pareto-figure"), "Quality against cost, trained on equally many tokens", "the line joins what nothing beats in both", paretoSpec);
if (!doc.figures.length && !doc.pareto.length) $("charts").hidden = true;
$("charts").addEventListener("change", (event) => event.target.tagName === "SELECT" && redraw());
$("all").addEventListener("click", () => tick(() => true));
$("none").addEventListener("click", () => tick(() => false));
$("best")?.addEventListener("click", () => tick((label) => !leftOut.has(label)));
night.addEventListener("change", redraw);
onSetting.push(offerCharts);
offerCharts();
