"use strict";
// Spectrum: SVG made for the one matrix that is shown
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
  const width = Math.max(300, box.clientWidth), height = width < 460 ? 300 : 340, left = 58, right = 14, top = 14, bottom = 40;
  const svg = make("svg", null, box, { viewBox: "0 0 " + width + " " + height, role: "img", "aria-label": "Singular values of " + data.names[chosen] });
  const floor = data.floor[chosen], after = data.after[chosen], n = Math.max(2, all[all.length - 1][0]);
  const heights = points.map(([, s]) => s).concat(after ? [after[1]] : []);
  let high = Math.ceil(Math.log10(Math.max(...heights)) * 4) / 4 + 0.05, low = Math.log10(Math.min(...heights));
  if (floor > 0 && Math.log10(floor) > low - 2.5) low = Math.min(low, Math.log10(floor));
  low = Math.floor((Math.max(low, high - 9) - 0.1) * 4) / 4;
  const X = (k) => left + (Math.log10(k) / Math.log10(n)) * (width - left - right);
  const Y = (s) => top + ((high - Math.max(low, Math.log10(s))) / (high - low)) * (height - top - bottom);
  const line = (x1, y1, x2, y2, stroke, extra = {}) => make("line", null, svg, { x1, y1, x2, y2, stroke, ...extra });
  for (let k = 1; k <= n; k *= 10) { line(X(k), top, X(k), height - bottom, "var(--line)"); make("text", k, svg, { x: X(k), y: height - bottom + 16, "text-anchor": k === 1 ? "start" : "middle" }); }
  const step = high - low > 5 ? 2 : 1, tight = high - low < 1.2;
  for (let e = Math.ceil(low); e <= high; e += step) { const y = Y(10 ** e); line(left, y, width - right, y, "var(--line)"); make("text", "1e" + e, svg, { x: left - 6, y: y + 4, "text-anchor": "end" }); }
  if (tight) for (const s of [10 ** low, 10 ** ((low + high) / 2), 10 ** high]) make("text", s.toPrecision(2), svg, { x: left - 6, y: Y(s) + 4, "text-anchor": "end" });
  make("text", "direction", svg, { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" });
  make("path", null, svg, { d: points.map(([k, s], j) => (j ? "L" : "M") + X(k).toFixed(1) + " " + Y(s).toFixed(1)).join(""), fill: "none", stroke: "var(--c0)", "stroke-width": 2 });
  if (points.length <= 3) for (const [k, s] of points) make("circle", null, svg, { cx: X(k), cy: Y(s), r: 3.5, fill: "var(--c0)" });
  if (after) make("path", null, svg, { d: "M" + X(1) + " " + Y(after[1]) + "L" + X(after[0]) + " " + Y(after[1]) + "L" + X(after[0]) + " " + (height - bottom), fill: "none", stroke: "var(--c2)", "stroke-width": 2 });
  const key = make("div", null, box, { class: "controls legend" });
  const entry = (stroke, text, dash) => { const item = make("span", null, key); make("b", dash ? "╌ " : "━ ", item, { style: "color:" + stroke }); item.append(text); };
  entry("var(--c0)", after ? "singular values before" : "singular values of the delta");
  if (after) entry("var(--c2)", "after: " + after[0] + " values of " + show(after[1]));
  if (floor > 0) {
    const visible = Math.log10(floor) >= low;
    if (visible) line(left, Y(floor), width - right, Y(floor), "var(--c1)", { "stroke-dasharray": "5 4", "stroke-width": 1.5 });
    entry("var(--c1)", "edge of storage rounding " + show(floor) + (visible ? "" : " (below)"), true);
  }
  const tones = ["--c3", "--c2", "--c1", "--c4", "--c0"];
  data.rules.forEach((rule, j) => {
    const k = data.k[chosen][j];
    if (!k || after) return;
    const x = X(k), tone = "var(" + tones[j % 5] + ")";
    line(x, top, x, height - bottom, tone, { "stroke-width": 1.5, "stroke-dasharray": ["none", "6 3", "2 3", "8 3 2 3", "1 3"][j % 5] });
    entry(tone, rule + " k = " + k);
  });
}
