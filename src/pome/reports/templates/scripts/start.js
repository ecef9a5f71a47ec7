"use strict";
// The first look: the middle one of the matrices that an edit takes by default.
if (byId("copy"))
  byId("copy").onclick = () => {
    const range = document.createRange();
    range.selectNodeContents(byId("command"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy");
    byId("copy").textContent = "Copied";
  };
findNames();
drawAll();
const first = order.filter((i) => data.roles[data.role[i]] === "up" || !data.roles.includes("up"));
if (total) choose(first[first.length >> 1]);
else drawHeat();
let waiting = 0;
const redraw = () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => {
    drawHeat();
    if (total) drawSpectrum();
  });
};
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.documentElement.dataset.drawn = total;
