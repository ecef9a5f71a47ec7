"use strict";
// The spectrum of the matrix that is shown, before and after the edit: an SVG made anew for each.
const RULE_DASHES = ["", "7 4", "2 3", "9 3 2 3", "1 4"];

function readSpectrum(i) {
  const [levels, lowest, decades, alphabet] = data.levels, text = data.spectra[i];
  return data.grids[data.grid[i]].map((index, j) => {
    const level = alphabet.indexOf(text[2 * j]) * 64 + alphabet.indexOf(text[2 * j + 1]);
    return [index, level === 0 ? 0 : 10 ** (lowest + ((level - 1) / (levels - 2)) * decades)];
  });
}

function drawSpectrum() {
  const box = byId("spectrum"), all = readSpectrum(chosen), points = all.filter(([, s]) => s > 0);
  box.replaceChildren();
  const width = Math.max(280, box.clientWidth), height = width < 460 ? 300 : 340;
  const left = 58, right = 14, top = 14, bottom = 40, floor = data.floor[chosen];
  const [kept, alpha] = data.after.map((key) => data.values[key][chosen]), power = data.power[chosen] || 0;
  const matched = kept === null; // the method equivalence: the values shown are the base's, and the edit has them
  const edited = matched
    ? []
    : power
    ? points.filter(([k]) => k <= kept).map(([k, s]) => [k, alpha * s ** power])
    : [[1, alpha], [kept, alpha]];
  const svg = make("svg", null, box, {
    viewBox: "0 0 " + width + " " + height,
    role: "img",
    "aria-label": "Singular values of " + data.names[chosen] + ", before and after the edit",
  });

  // Both axes are logarithmic; the vertical one holds the values before and after, and the noise where it is near.
  const n = Math.max(2, all[all.length - 1][0]), heights = [...points, ...edited].map(([, s]) => s);
  const high = Math.ceil(Math.log10(Math.max(...heights)) * 4) / 4 + 0.05;
  let low = Math.log10(Math.min(...heights));
  if (floor > 0 && Math.log10(floor) > low - 2.5) low = Math.min(low, Math.log10(floor));
  low = Math.floor((Math.max(low, high - 9) - 0.1) * 4) / 4;
  const X = (k) => left + (Math.log10(k) / Math.log10(n)) * (width - left - right);
  const Y = (s) => top + ((high - Math.max(low, Math.log10(s))) / (high - low)) * (height - top - bottom);
  const line = (x1, y1, x2, y2, attributes) => make("line", null, svg, { x1, y1, x2, y2, ...attributes });
  const label = (text, x, y, anchor) => make("text", text, svg, { x, y, "text-anchor": anchor });
  for (let k = 1; k <= n; k *= 10) {
    line(X(k), top, X(k), height - bottom, { class: "grid" });
    label(k, X(k), height - bottom + 16, k === 1 ? "start" : "middle");
  }
  for (let e = Math.ceil(low); e <= high; e += high - low > 5 ? 2 : 1) {
    line(left, Y(10 ** e), width - right, Y(10 ** e), { class: "grid" });
    if (high - low >= 1.2) label("1e" + e, left - 6, Y(10 ** e) + 4, "end");
  }
  if (high - low < 1.2)
    for (const s of [10 ** low, 10 ** ((low + high) / 2), 10 ** high]) label(s.toPrecision(2), left - 6, Y(s) + 4, "end");
  label("direction", (left + width - right) / 2, height - 6, "middle");

  const path = (pairs) => "M" + pairs.map(([k, s]) => X(k).toFixed(1) + " " + Y(s).toFixed(1)).join("L");
  const end = X(kept).toFixed(1) + " " + (height - bottom);
  const drop = kept < n ? "L" + end : "";
  const legend = make("div", null, box, { class: "legend" });
  // A mark in the legend is drawn as its line is.
  const entry = (style, text) => {
    const item = make("span", null, legend);
    const mark = make("svg", null, item, { viewBox: "0 0 28 8", class: "key" });
    make("line", null, mark, { x1: 0, y1: 4, x2: 28, y2: 4, ...style });
    item.append(text);
  };
  const before = { class: "before" }, after = { class: "edited" }, noise = { class: "noise" };
  if (!matched) make("path", null, svg, { d: path(edited) + "L" + end + "L" + X(1) + " " + (height - bottom) + "Z", class: "fill" });
  make("path", null, svg, { d: path(points), ...before });
  if (!matched) make("path", null, svg, { d: path(edited) + drop, ...after });
  entry(before, matched ? "singular values of the base, and after the edit" : "before: singular values of the delta");
  const values = power ? " values of " + show(alpha) + " s^" + show(power) : " values of " + show(alpha);
  if (!matched) entry(after, (data.kind === "edit" ? "after: " : "after an edit with defaults: ") + kept + values);
  if (floor > 0) {
    const visible = Math.log10(floor) >= low;
    if (visible) line(left, Y(floor), width - right, Y(floor), noise);
    entry(noise, "edge of storage rounding " + show(floor) + (visible ? "" : " (below the picture)"));
  }
  data.rules.forEach((rule, j) => {
    const k = data.values["k_" + rule][chosen];
    const style = { class: "rule rule" + (j % 5), "stroke-dasharray": RULE_DASHES[j % 5] };
    line(X(k), top, X(k), height - bottom, style);
    entry(style, rule + " k = " + k);
  });
}
