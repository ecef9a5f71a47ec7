"use strict";
// The heat map: one canvas, drawn again on demand, whatever the size of the model.
const ROW = 20, LINE = 14, HEAD = 24; // heights in pixels: a layer, a line of its name, the roles
const TRIM = 0.02; // share of the cells at each end that may lie outside the colour scale

// The matrices of each cell, by layer and role.
const cells = new Map();
const cellKey = (place, role) => place * 64 + role;
for (let i = 0; i < total; i++) {
  const key = cellKey(data.place[i], data.role[i]);
  if (cells.has(key)) cells.get(key).push(i);
  else cells.set(key, [i]);
}
let heat = null; // where everything was drawn
let pointed = null; // the cell that the readout speaks of

function mixColors(a, b, t) {
  const parse = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const [from, to] = [parse(a), parse(b)];
  return "rgb(" + from.map((x, i) => Math.round(x + (to[i] - x) * t)).join(",") + ")";
}

// A name in lines that fit a width: broken at dots and underscores, else anywhere.
function wrapName(pen, name, width) {
  const lines = [""];
  for (let piece of name.split(/(?<=[._])/)) {
    if (lines[lines.length - 1] && pen.measureText(lines[lines.length - 1] + piece).width > width) lines.push("");
    while (piece && pen.measureText(lines[lines.length - 1] + piece).width > width) {
      let fits = piece.length;
      while (fits > 1 && pen.measureText(lines[lines.length - 1] + piece.slice(0, fits)).width > width) fits--;
      lines[lines.length - 1] += piece.slice(0, fits);
      piece = piece.slice(fits);
      if (piece) lines.push("");
    }
    lines[lines.length - 1] += piece;
  }
  return lines;
}

function layOutHeat(pen, available) {
  let left = 8;
  for (const place of data.places) left = Math.max(left, pen.measureText(place).width + 16);
  left = Math.min(left, Math.max(110, available * 0.3));
  const names = data.places.map((place) => wrapName(pen, place, left - 16));
  const tops = [HEAD];
  for (const lines of names) tops.push(tops[tops.length - 1] + Math.max(ROW, lines.length * LINE + 4));
  let widest = 34;
  for (const role of data.roles) widest = Math.max(widest, pen.measureText(role).width + 8);
  const wide = Math.max(widest, Math.min(120, (available - left - 4) / data.roles.length));
  return { left, names, tops, wide, width: Math.max(available, left + wide * data.roles.length + 2) };
}

function drawHeat() {
  const quantity = quantities[byId("quantity").value];
  byId("help").textContent = quantity.help;
  const column = data.values[quantity.key], values = new Map();
  for (const [key, members] of cells) {
    const value = median(members.map((i) => column[i]));
    if (value !== null) values.set(key, value);
  }
  const scale = (x) => (quantity.log ? Math.log10(Math.max(x, 1e-300)) : x);
  const shown = [...values.values()].filter((x) => !quantity.log || x > 0).sort((a, b) => a - b);
  const sorted = shown.length ? shown : [quantity.log ? 1 : 0];
  const lowest = sorted[Math.floor(sorted.length * TRIM)];
  const highest = sorted[Math.ceil(sorted.length * (1 - TRIM)) - 1];
  const low = scale(lowest), high = scale(highest);

  const canvas = byId("heat"), available = byId("heatbox").clientWidth, ratio = window.devicePixelRatio || 1;
  const pen = canvas.getContext("2d"), font = "12px system-ui, sans-serif";
  pen.font = font;
  const at = layOutHeat(pen, available), height = at.tops[data.places.length] + 4;
  canvas.width = at.width * ratio;
  canvas.height = height * ratio;
  canvas.style.width = at.width + "px";
  canvas.style.height = height + "px";
  pen.scale(ratio, ratio);
  pen.font = font;
  pen.textBaseline = "middle";
  const [ink, blank, from, to] = ["--soft", "--blank", "--low", "--high"].map(readColor);
  pen.textAlign = "center";
  pen.fillStyle = ink;
  data.roles.forEach((role, x) => pen.fillText(role, at.left + at.wide * (x + 0.5), HEAD / 2));
  data.places.forEach((_, y) => {
    const top = at.tops[y], tall = at.tops[y + 1] - top, lines = at.names[y];
    pen.textAlign = "right";
    pen.fillStyle = ink;
    lines.forEach((line, n) => pen.fillText(line, at.left - 8, top + tall / 2 + (n - (lines.length - 1) / 2) * LINE));
    data.roles.forEach((_, x) => {
      const value = values.get(cellKey(y, x));
      const place = high > low ? (scale(value) - low) / (high - low) : 0.5;
      pen.fillStyle = value === undefined ? blank : mixColors(from, to, Math.max(0, Math.min(1, place)));
      pen.fillRect(at.left + at.wide * x + 1, top + 1, at.wide - 2, tall - 2);
    });
  });
  if (total) {
    const [x, y] = [data.role[chosen], data.place[chosen]];
    pen.strokeStyle = readColor("--mark");
    pen.lineWidth = 2;
    pen.strokeRect(at.left + at.wide * x + 1, at.tops[y] + 1, at.wide - 2, at.tops[y + 1] - at.tops[y] - 2);
  }
  byId("least").textContent = (sorted[0] < lowest ? "at most " : "") + show(lowest);
  byId("most").textContent = (sorted[sorted.length - 1] > highest ? "at least " : "") + show(highest);
  byId("axis").textContent = quantity.log ? "logarithmic; " : "";
  heat = { ...at, values, quantity };
  showReadout();
}

// The readout: the cell that was pointed at, in the quantity that is shown.
function showReadout() {
  const cell = pointed || (total ? { x: data.role[chosen], y: data.place[chosen] } : null);
  if (!cell) return;
  const key = cellKey(cell.y, cell.x), count = cells.get(key).length;
  const value = heat.quantity.label + " " + show(heat.values.get(key)) + (count > 1 ? ", median of " + count : "");
  byId("tip").textContent = data.places[cell.y] + ", " + data.roles[cell.x] + ": " + value;
}

function findCell(event) {
  const bounds = byId("heat").getBoundingClientRect();
  const x = Math.floor((event.clientX - bounds.left - heat.left) / heat.wide);
  const y = heat.tops.findIndex((top) => top > event.clientY - bounds.top) - 1;
  return x >= 0 && x < data.roles.length && y >= 0 && cells.has(cellKey(y, x)) ? { x, y } : null;
}

byId("heat").onmousemove = (event) => {
  const cell = findCell(event);
  if (!cell) return;
  pointed = cell;
  showReadout();
};
byId("heat").onclick = (event) => {
  const cell = findCell(event);
  if (!cell) return;
  pointed = cell;
  const members = cells.get(cellKey(cell.y, cell.x));
  listMatrices(members, data.places[cell.y] + ", " + data.roles[cell.x]);
  choose(members[0], true);
};
byId("quantity").onchange = drawHeat;
