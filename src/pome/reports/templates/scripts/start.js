"use strict";
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
// The middle of the paper's default role is a fair first look.
const first = data.roles.includes("up") ? data.role.flatMap((r, i) => (data.roles[r] === "up" ? [i] : [])) : [0];
if (total) choose(first[first.length >> 1]); else drawHeat();
let waiting = 0;
const redraw = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => { drawHeat(); if (total) drawSpectrum(); }); };
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.documentElement.dataset.drawn = total;
