"use strict";
// What all scripts of the page share: the data, the state, small helpers.
const data = JSON.parse(document.getElementById("data").textContent);
const total = data.names.length;
const quantities = Object.fromEntries(
  data.quantities.map(([key, label, help, log, column]) => [key, { key, label, help, log, column }]),
);
let chosen = 0; // index of the matrix that is shown

const byId = (id) => document.getElementById(id);
const SVG_TAGS = ["svg", "path", "line", "text", "circle"];

function make(tag, text, parent, attributes = {}) {
  const isSvg = SVG_TAGS.includes(tag);
  const node = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  if (text !== null) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
}

// A button that shows a matrix, its name free to break after dots and underscores.
function makeLink(i, parent) {
  const link = make("button", null, parent, { type: "button", "data-matrix": i });
  for (const piece of data.names[i].split(/(?<=[._])/)) {
    link.append(piece);
    make("wbr", null, link);
  }
}

// A number with three digits.
function show(x) {
  if (x === null || x === undefined) return "–";
  if (Number.isInteger(x)) return String(x);
  const size = Math.abs(x);
  const exponential = size !== 0 && (size < 0.001 || size >= 1e5);
  return exponential ? x.toExponential(2) : String(Number(x.toPrecision(3)));
}

function median(numbers) {
  const sorted = numbers.filter((x) => x !== null).sort((a, b) => a - b);
  return sorted.length ? (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2 : null;
}

const readColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
