"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const total = data.names.length;
const byId = (id) => document.getElementById(id);
const make = (tag, text, parent, attributes = {}) => {
  const svg = ["svg", "path", "line", "text", "g", "circle"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  if (text !== null) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
};
const show = (x) => {
  if (x === null || x === undefined) return "–";
  if (Number.isInteger(x)) return String(x);
  const size = Math.abs(x);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? x.toExponential(2) : String(Number(x.toPrecision(3)));
};
const median = (numbers) => {
  const sorted = numbers.filter((x) => x !== null).sort((a, b) => a - b);
  return sorted.length ? (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2 : null;
};
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const quantities = Object.fromEntries(data.quantities.map(([key, label, help, log]) => [key, { key, label, help, log }]));
let chosen = 0;
