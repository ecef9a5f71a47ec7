"use strict";
// Tables: medians of each role, and every matrix, a page at a time.
const PER_PAGE = 50;
let order = [...Array(total).keys()], page = 0, sorting = null, rising = true;

{
  const head = make("tr", null, byId("byrole"));
  for (const text of ["role", "matrices"]) make("th", text, head, { scope: "col" });
  for (const key of data.table) make("th", quantities[key].column, head, { scope: "col", title: quantities[key].help });
  data.roles.forEach((role, r) => {
    const members = order.filter((i) => data.role[i] === r), row = make("tr", null, byId("byrole"));
    make("td", role, row);
    make("td", members.length, row);
    for (const key of data.table) make("td", show(median(members.map((i) => data.values[key][i]))), row);
  });
}

function sortBy(key) {
  rising = sorting === key ? !rising : key === "name";
  sorting = key;
  page = 0;
  const column = key === "name" ? data.names : data.values[key], sign = rising ? 1 : -1;
  order.sort((a, b) => {
    const [x, y] = [column[a], column[b]];
    if (x === y) return a - b;
    if (x === null || y === null) return x === null ? 1 : -1; // what is unknown comes last
    return x < y ? -sign : sign;
  });
  drawAll();
}

function drawAll() {
  const table = byId("all"), head = make("tr", null, null);
  table.replaceChildren(head);
  const addHead = (text, key, help) => {
    const arrow = sorting === key ? (rising ? " ↑" : " ↓") : "";
    const cell = make("th", null, head, { scope: "col", title: help });
    make("button", text + arrow, cell, { type: "button" }).onclick = () => sortBy(key);
  };
  addHead("matrix", "name", "Name of the matrix");
  for (const key of data.table) addHead(quantities[key].column, key, quantities[key].help);
  for (const i of order.slice(page * PER_PAGE, (page + 1) * PER_PAGE)) {
    const row = make("tr", null, table);
    makeLink(i, make("td", null, row, { class: "name" }));
    for (const key of data.table) make("td", show(data.values[key][i]), row);
  }
  const pages = Math.max(1, Math.ceil(total / PER_PAGE));
  byId("page").textContent = "page " + (page + 1) + " of " + pages;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page >= pages - 1;
}

byId("previous").onclick = () => {
  page--;
  drawAll();
};
byId("next").onclick = () => {
  page++;
  drawAll();
};
