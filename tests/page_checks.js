// What a browser can say of a page that it shows; each function returns what is wrong, nothing if all is well.

/** Pairs of visible headings, controls and figures of which neither holds the other and that overlap. */
function overlaps() {
  const kinds = ["h1", "h2", "h3", "nav a", "button", "figcaption", "figure .chart", ".lede", ".note", ".scroll", "legend",
    "#legend label", ".controls label", ".controls select", ".controls input", ".setting label", ".setting select"];
  const shown = (e) => e.checkVisibility() && e.getBoundingClientRect().width > 1;
  const boxes = [...document.querySelectorAll(kinds.join())].filter(shown);
  const found = [];
  for (const [i, a] of boxes.entries()) {
    for (const b of boxes.slice(i + 1)) {
      const inside = a.contains(b) || b.contains(a) || (a.closest(".scroll") && b.closest(".scroll"));
      if (!inside && common(a, b).every((length) => length > 1)) found.push([a.outerHTML.slice(0, 80), b.outerHTML.slice(0, 80)]);
    }
  }
  return found;
}

/** The width and the height that two elements have in common. */
function common(a, b) {
  const p = a.getBoundingClientRect(), q = b.getBoundingClientRect();
  return [Math.min(p.right, q.right) - Math.max(p.left, q.left), Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top)];
}

/** Pairs of labels of a chart's axes that run into one another. */
function crowded() {
  const found = [];
  for (const chart of document.querySelectorAll(".chart svg.marks")) {
    const labels = [...chart.querySelectorAll(".role-axis-label text")].filter((text) => text.textContent && getComputedStyle(text).opacity !== "0");
    for (const [i, a] of labels.entries()) {
      for (const b of labels.slice(i + 1)) {
        const [wide, high] = common(a, b);
        if (wide > 1 && high > 3) found.push([a.textContent, b.textContent]);
      }
    }
  }
  return found;
}

/** Texts whose contrast with what is behind them is below 4.5 (WCAG 2.2, 1.4.3). */
function faint() {
  const kinds = "p, a, h1, h2, h3, dt, dd, th, td, label, legend, button, select, input, figcaption, .note";
  const parts = (colour) => colour.match(/[\d.]+/g).map(Number);
  const clear = (colour) => parts(colour)[3] === 0;
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => parts(colour).slice(0, 3).reduce((sum, value, k) => sum + linear(value / 255) * [0.2126, 0.7152, 0.0722][k], 0);
  function behind(element) {
    while (element && clear(getComputedStyle(element).backgroundColor)) element = element.parentElement;
    return element ? getComputedStyle(element).backgroundColor : "rgb(255, 255, 255)";
  }
  const found = [];
  for (const element of document.querySelectorAll(kinds)) {
    if (!element.checkVisibility() || !element.textContent.trim()) continue;
    const [low, high] = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) found.push([element.outerHTML.slice(0, 90), contrast]);
  }
  return found;
}
