// The table of cells: a button a column sorts, the controls above filter, long tables show their beginning.
const ROWS = 100;
const shown = { column: null, down: false, all: false };
const looksRight = doc.table.map((column) => column.sort.some((value) => typeof value === "number"));

function compare(a, b) {
  if (a === b) return 0;
  if (a === null) return 1; // nothing taken comes last, whichever way
  if (b === null) return -1;
  const order = typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  return shown.down ? -order : order;
}

function filtered() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const at = { length: $("filter-length").value, depth: $("filter-depth").value, activations: $("filter-activations").value };
  const found = inSetting().filter((cell) => Object.entries(at).every(([key, value]) => value === "" || String(doc[key][cell]) === value)
    && words.every((word) => `${doc.label[cell]} ${doc.activations[cell]} ${doc.status[cell]} ${doc.reason[cell]}`.toLowerCase().includes(word)));
  if (shown.column !== null) {
    const by = doc.table[shown.column].sort;
    found.sort((a, b) => compare(by[a], by[b]));
  }
  return found;
}

function row(cell) {
  return make("tr", {}, ...doc.table.map((column, place) => (place === 0
    ? make("th", { scope: "row" }, nameOf(doc.label[cell], column.text[cell]))
    : make("td", { class: looksRight[place] ? "number" : null, title: column.title === "status" && doc.reason[cell] ? doc.reason[cell] : null }, column.text[cell]))));
}

function list() {
  const found = filtered();
  const part = shown.all ? found : found.slice(0, ROWS);
  $("table").tBodies[0].replaceChildren(...part.map(row));
  $("count").textContent = `${full(found.length)} of ${full(inSetting().length)} cell${inSetting().length === 1 ? "" : "s"}` + (part.length < found.length ? `, the first ${ROWS} shown` : "");
  $("more").hidden = part.length === found.length;
  $("more").textContent = `Show all ${full(found.length)}`;
}

function sort(place) {
  shown.down = shown.column === place ? !shown.down : false;
  shown.column = place;
  [...$("table").tHead.rows[0].cells].forEach((head, other) => {
    head.setAttribute("aria-sort", other !== place ? "none" : shown.down ? "descending" : "ascending");
  });
  list();
}

$("table").append(make("thead", {}, make("tr", {}, ...doc.table.map((column, place) => {
  const button = make("button", { type: "button", title: column.about }, column.title);
  button.addEventListener("click", () => sort(place));
  return make("th", { scope: "col", "aria-sort": "none", class: looksRight[place] ? "number" : null }, button);
}))), make("tbody"));

function offerFilters() {
  const own = inSetting();
  const any = (pairs) => (pairs.length < 2 ? pairs.map(([, text]) => ["", text]) : [["", "any"], ...pairs]);
  offer($("filter-length"), any(ascending(own.map((cell) => doc.length[cell])).map((length) => [length, full(length)])));
  offer($("filter-depth"), any(named(ascending(own.map((cell) => doc.depth[cell])))));
  offer($("filter-activations"), any(named(doc.strategies.filter((name) => own.some((cell) => doc.activations[cell] === name)))));
  list();
}
for (const event of ["input", "change"]) $("filters").addEventListener(event, () => { shown.all = false; list(); });
$("filters").addEventListener("reset", () => setTimeout(list));
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("more").addEventListener("click", () => { shown.all = true; list(); });
onSetting.push(offerFilters);
offerFilters();
