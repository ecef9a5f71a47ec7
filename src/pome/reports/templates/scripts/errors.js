"use strict";
window.errors = [];
window.addEventListener("error", (event) => {
  window.errors.push(event.message);
  document.documentElement.dataset.errors = window.errors.join("; ");
  document.getElementById("broken").textContent = "This page could not be drawn: " + event.message;
});
