"use strict";
// The list of matrices, and choosing one. The list never holds more than a few hundred names.
const MOST_LISTED = 200;

function listMatrices(indices, what) {
  const list = byId("list");
  list.replaceChildren();
  for (const i of indices.slice(0, MOST_LISTED)) makeLink(i, make("li", null, list));
  const more = indices.length > MOST_LISTED ? ", the first " + MOST_LISTED + " shown; type more of the name" : "";
  byId("found").textContent = (what ? what + ": " : "") + indices.length + " of " + total + more;
  markChosen(false);
}

function findNames() {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean), indices = [];
  for (let i = 0; i < total; i++) {
    const text = (data.names[i] + " " + data.roles[data.role[i]]).toLowerCase();
    if (words.every((word) => text.includes(word))) indices.push(i);
  }
  listMatrices(indices, "");
}

function markChosen(scroll) {
  for (const button of byId("list").querySelectorAll("button")) {
    const isChosen = Number(button.dataset.matrix) === chosen;
    button.setAttribute("aria-current", isChosen);
    if (isChosen && scroll) byId("list").scrollTop = button.offsetTop - byId("list").clientHeight / 2;
  }
}

// Show a matrix; `scroll` brings what is shown of it into sight.
function choose(i, scroll = false) {
  chosen = i;
  byId("chosen").textContent = data.names[i];
  byId("shape").textContent = data.shape[i] + ", " + data.roles[data.role[i]];
  byId("facts").replaceChildren();
  for (const { key, label, help } of Object.values(quantities)) {
    const fact = make("div", null, byId("facts"), { title: help });
    make("dt", label, fact);
    make("dd", show(data.values[key][i]), fact);
  }
  markChosen(true);
  drawSpectrum();
  drawHeat();
  if (scroll) byId("matrix").scrollIntoView({ block: "start" });
}

byId("find").oninput = findNames;
// Links to matrices stand in the list, in the warnings and in the table of all.
document.addEventListener("click", (event) => {
  const link = event.target.closest("[data-matrix], [data-matrices]");
  if (!link) return;
  if (link.dataset.matrices) {
    const indices = JSON.parse(link.dataset.matrices);
    listMatrices(indices, "of the warning");
    choose(indices[0], true);
  } else {
    pointed = null;
    choose(Number(link.dataset.matrix), !byId("list").contains(link));
  }
});
