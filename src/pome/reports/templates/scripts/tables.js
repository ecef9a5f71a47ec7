"use strict";
// Tables
const ROLE_KEYS = data.table;
{
  const head = make("tr", null, byId("byrole"));
  for (const text of ["role", "matrices", ...ROLE_KEYS.map((key) => quantities[key].label)]) make("th", text, head, { scope: "col" });
  data.roles.forEach((role, r) => {
    const members = []; for (let i = 0; i < total; i++) if (data.role[i] === r) members.push(i);
    const row = make("tr", null, byId("byrole"));
    make("td", role, row); make("td", members.length, row);
    for (const key of ROLE_KEYS) make("td", show(median(members.map((i) => data.values[key][i]))), row);
  });
}
const PER_PAGE = 50;
let order = [...Array(total).keys()], page = 0, sorting = null, rising = true;
function drawAll() {
  const table = byId("all"), head = make("tr", null, null);
  table.replaceChildren(head);
  const button = (text, key) => { make("button", text + (sorting === key ? (rising ? " ↑" : " ↓") : ""), make("th", null, head, { scope: "col" }), { type: "button" }).onclick = () => {
    rising = sorting === key ? !rising : false; sorting = key; page = 0;
    const column = key === "name" ? data.names : data.values[key], sign = rising ? 1 : -1;
    order.sort((a, b) => { const [x, y] = [column[a], column[b]]; return x === y ? a - b : x === null ? 1 : y === null ? -1 : x < y ? -sign : sign; });
    drawAll();
  }; };
  button("matrix", "name");
  for (const key of ROLE_KEYS) button(quantities[key].label, key);
  for (const i of order.slice(page * PER_PAGE, (page + 1) * PER_PAGE)) {
    const row = make("tr", null, table);
    make("button", data.names[i], make("td", null, row, { class: "name" }), { type: "button" }).onclick = () => { choose(i); byId("chosen").scrollIntoView({ block: "center" }); };
    for (const key of ROLE_KEYS) make("td", show(data.values[key][i]), row);
  }
  const pages = Math.max(1, Math.ceil(total / PER_PAGE));
  byId("page").textContent = "page " + (page + 1) + " of " + pages;
  byId("previous").disabled = page === 0; byId("next").disabled = page >= pages - 1;
}
byId("previous").onclick = () => { page--; drawAll(); };
byId("next").onclick = () => { page++; drawAll(); };
