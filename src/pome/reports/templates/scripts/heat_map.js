"use strict";
// Heat map: one canvas, redrawn on demand, whatever the size of the model
const cells = new Map();
for (let i = 0; i < total; i++) {
  const key = data.place[i] * 64 + data.role[i];
  if (cells.has(key)) cells.get(key).push(i); else cells.set(key, [i]);
}
const names = data.places.map((place) => (place.length > 28 ? "…" + place.slice(-27) : place));
let heat = {};
const mix = (a, b, t) => {
  const parse = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const [from, to] = [parse(a), parse(b)];
  return "rgb(" + from.map((x, i) => Math.round(x + (to[i] - x) * t)).join(",") + ")";
};
function drawHeat() {
  const quantity = quantities[byId("quantity").value];
  byId("help").textContent = quantity.help;
  const column = data.values[quantity.key];
  const values = new Map();
  for (const [key, members] of cells) { const m = median(members.map((i) => column[i])); if (m !== null) values.set(key, m); }
  const scale = (x) => (quantity.log ? Math.log10(Math.max(x, 1e-300)) : x);
  let sorted = [...values.values()].filter((x) => !quantity.log || x > 0).map(scale).sort((a, b) => a - b);
  if (!sorted.length) sorted = [0];
  const low = sorted[Math.floor(sorted.length * 0.02)], high = sorted[Math.ceil(sorted.length * 0.98) - 1];
  const canvas = byId("heat"), box = byId("heatbox"), ratio = window.devicePixelRatio || 1;
  const phone = box.clientWidth < 520, left = phone ? 96 : 200, top = 24, tall = 20;
  const wide = Math.max(34, Math.min(120, (box.clientWidth - left - 4) / data.roles.length));
  const width = Math.max(box.clientWidth, left + wide * data.roles.length), height = top + tall * data.places.length + 4;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.clearRect(0, 0, width, height);
  pen.font = "12px system-ui, sans-serif"; pen.textBaseline = "middle";
  const [ink, blank, from, to] = ["--soft", "--blank", "--low", "--high"].map(color);
  pen.textAlign = "center"; pen.fillStyle = ink;
  data.roles.forEach((role, x) => pen.fillText(role, left + wide * (x + 0.5), top / 2));
  data.places.forEach((_, y) => {
    pen.textAlign = "right"; pen.fillStyle = ink;
    const name = phone && names[y].length > 14 ? "…" + names[y].slice(-13) : names[y];
    pen.fillText(name, left - 8, top + tall * (y + 0.5));
    data.roles.forEach((_, x) => {
      const value = values.get(y * 64 + x);
      const t = value === undefined ? null : high > low ? Math.max(0, Math.min(1, (scale(value) - low) / (high - low))) : 0.5;
      pen.fillStyle = t === null ? blank : mix(from, to, t);
      pen.fillRect(left + wide * x + 1, top + tall * y + 1, wide - 2, tall - 2);
    });
  });
  if (total) {
    pen.strokeStyle = color("--c1"); pen.lineWidth = 2;
    pen.strokeRect(left + wide * data.role[chosen] + 1, top + tall * data.place[chosen] + 1, wide - 2, tall - 2);
  }
  const back = (x) => show(quantity.log ? 10 ** x : x);
  byId("least").textContent = back(low); byId("most").textContent = back(high) + (quantity.log ? " (log)" : "");
  heat = { left, top, tall, wide, values, quantity };
}
function cellAt(event) {
  const bounds = byId("heat").getBoundingClientRect();
  const x = Math.floor((event.clientX - bounds.left - heat.left) / heat.wide), y = Math.floor((event.clientY - bounds.top - heat.top) / heat.tall);
  const key = y * 64 + x;
  return x >= 0 && x < data.roles.length && cells.has(key) ? { key, x, y, members: cells.get(key) } : null;
}
byId("heat").onmousemove = (event) => {
  const cell = cellAt(event);
  if (cell) byId("tip").textContent = data.places[cell.y] + ", " + data.roles[cell.x] + ": " + heat.quantity.label + " " + show(heat.values.get(cell.key)) + (cell.members.length > 1 ? " (median of " + cell.members.length + ")" : "");
};
byId("heat").onclick = (event) => {
  const cell = cellAt(event);
  if (!cell) return;
  if (cell.members.length > 1) fillList(cell.members, data.places[cell.y] + ", " + data.roles[cell.x]); else fillList([...Array(total).keys()], "");
  choose(cell.members[0]);
};
byId("quantity").onchange = drawHeat;
