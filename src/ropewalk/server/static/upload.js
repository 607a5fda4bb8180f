// Uploads by drop or by choice, with progress. Without this file the form beside it does the same, page by page.
"use strict";
(() => {
  const form = document.getElementById("upload");
  if (!form) return;
  const input = form.querySelector("input[type=file]");
  const list = document.getElementById("uploads");
  const said = document.getElementById("said");
  const limit = Number(form.dataset.maxBytes);
  const AT_ONCE = 2; // the rest wait: more would only share the same line
  const waiting = [];
  let running = 0;

  form.querySelectorAll("[data-scripts-off]").forEach((element) => { element.hidden = true; });
  form.querySelectorAll("[data-scripts-on]").forEach((element) => { element.hidden = false; });
  input.classList.add("hidden-label");
  input.tabIndex = -1;
  form.querySelector("#choose").addEventListener("click", () => input.click());

  const size = (bytes) => {
    for (const [unit, of] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (bytes >= of) return (bytes / of).toFixed(1) + " " + unit;
    return bytes + " B";
  };

  // As the server shows names: what has no shape, or turns the direction of text, is spelt out.
  const shown = (name) => name.replace(/(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (c) => "[U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "]");

  const row = (file) => {
    const item = list.appendChild(document.createElement("li"));
    const parts = {};
    for (const [name, tag] of [["name", "span"], ["state", "span"], ["stop", "button"], ["bar", "progress"]]) {
      parts[name] = item.appendChild(document.createElement(tag));
      parts[name].className = name;
    }
    parts.name.textContent = shown(file.name);
    parts.name.dir = "auto";
    parts.state.textContent = "waiting";
    parts.stop.type = "button";
    parts.stop.className = "small-button";
    parts.stop.textContent = "Cancel";
    parts.stop.setAttribute("aria-label", "Cancel the upload of " + parts.name.textContent);
    parts.bar.max = 100;
    parts.bar.value = 0;
    parts.bar.setAttribute("aria-label", "Upload of " + parts.name.textContent);
    return { item, ...parts };
  };

  const finish = (line, kind, words) => {
    line.item.classList.add(kind);
    line.state.textContent = words;
    line.stop.textContent = "Dismiss";
    line.stop.setAttribute("aria-label", "Dismiss " + line.name.textContent);
    line.stop.onclick = () => { line.item.remove(); form.querySelector("#choose").focus(); };
    said.textContent = line.name.textContent + ": " + words;
  };

  const start = ({ file, keep, line }) => {
    running += 1;
    const request = new XMLHttpRequest();
    const ended = (kind, words) => {
      running -= 1;
      finish(line, kind, words);
      if (kind === "done") document.body.dispatchEvent(new CustomEvent("files-changed"));
      next();
    };
    request.open("POST", form.action);
    request.setRequestHeader("Accept", "application/json");
    request.setRequestHeader("X-CSRF-Token", form.elements.csrf.value);
    request.upload.onprogress = (event) => {
      const share = event.total ? (100 * event.loaded) / event.total : 0;
      line.bar.value = share;
      line.state.textContent = share < 100 ? Math.floor(share) + "% of " + size(file.size) : "storing";
    };
    request.onload = () => {
      let answer = {};
      try { answer = JSON.parse(request.responseText); } catch { /* a proxy's page, not ours */ }
      if (request.status === 200) ended("done", "stored, " + size(file.size));
      else ended("failed", answer.error ? answer.error.message : "the server answered " + request.status);
    };
    request.onerror = () => ended("failed", "the connection was cut; nothing was stored, try again");
    request.onabort = () => ended("failed", "cancelled; nothing was stored");
    line.stop.onclick = () => request.abort();
    const body = new FormData();
    if (keep) body.append("expires_in_seconds", keep);
    body.append("file", file, file.name);
    request.send(body);
  };

  const next = () => { while (running < AT_ONCE && waiting.length) start(waiting.shift()); };

  const add = (files) => {
    for (const file of files) {
      const line = row(file);
      if (file.size > limit) { finish(line, "failed", size(file.size) + " is more than the " + size(limit) + " that a file may have"); continue; }
      const entry = { file, keep: form.elements.expires_in_seconds.value, line };
      line.stop.onclick = () => { waiting.splice(waiting.indexOf(entry), 1); finish(line, "failed", "cancelled; nothing was stored"); };
      waiting.push(entry);
    }
    next();
  };

  input.addEventListener("change", () => { add(input.files); input.value = ""; });
  const holdsFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    form.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) form.classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    form.classList.remove("over");
    add(event.dataTransfer.files);
  });
  window.addEventListener("beforeunload", (event) => { if (running) event.preventDefault(); });
})();
