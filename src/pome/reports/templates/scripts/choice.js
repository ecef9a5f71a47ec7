"use strict";
// Choosing a matrix: the list never holds more than a few hundred names
const LIMIT = 300;
const prefix = total ? data.names.reduce((a, b) => { let i = 0; while (i < a.length && a[i] === b[i]) i++; return a.slice(0, i); }) : "";
const skip = total > 1 ? prefix.lastIndexOf(".") + 1 : 0;
function fillList(indices, what) {
  byId("list").replaceChildren();
  for (const i of indices.slice(0, LIMIT)) make("option", data.names[i].slice(skip).replace(/\.weight$/, ""), byId("list"), { value: i, title: data.names[i] });
  byId("found").textContent = (what ? what + ": " : "") + indices.length + " of " + total + (indices.length > LIMIT ? ", the first " + LIMIT + " shown; type more of the name" : "");
}
function findNames() {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean), indices = [];
  for (let i = 0; i < total; i++) { const name = (data.names[i] + " " + data.roles[data.role[i]]).toLowerCase(); if (words.every((word) => name.includes(word))) indices.push(i); }
  fillList(indices, "");
}
byId("find").oninput = findNames;
byId("list").onchange = () => choose(Number(byId("list").value));
function choose(i) {
  chosen = i;
  byId("list").value = String(i);
  byId("chosen").textContent = data.names[i] + "   " + data.shape[i] + ", " + data.roles[data.role[i]];
  byId("facts").replaceChildren();
  for (const { key, label, help } of Object.values(quantities)) {
    const fact = make("div", null, byId("facts"), { title: help });
    make("dt", label, fact); make("dd", show(data.values[key][i]), fact);
  }
  drawSpectrum(); drawHeat();
}
