// Keys for what is on the page as links and buttons: j leads to the next regression, 1 2 3 4 cast a vote.
"use strict";
(() => {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target.closest("input, textarea, select, [contenteditable]")) return;
    const found = document.querySelector('[data-key="' + CSS.escape(event.key) + '"]');
    if (!found) return;
    event.preventDefault();
    found.click();
  });
  const began = document.getElementById("ms");
  if (began) document.getElementById("vote").addEventListener("submit", () => { began.value = Math.round(performance.now()); });
})();
