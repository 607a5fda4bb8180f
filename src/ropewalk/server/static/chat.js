// Replies as they come. Without this file the form does the same, and waits for the whole reply.
"use strict";
(() => {
  const form = document.getElementById("ask");
  if (!form) return;
  const thread = document.getElementById("thread");
  const told = document.getElementById("told");
  const question = document.getElementById("question");
  const send = document.getElementById("send");
  const stop = document.getElementById("stop");

  const add = (parent, tag, className, text) => {
    const element = parent.appendChild(document.createElement(tag));
    element.className = className;
    element.textContent = text;
    element.dir = "auto";
    return element;
  };

  // The events of a stream: {type, ...}, one for each blank line.
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      for (let end; (end = held.indexOf("\n\n")) >= 0; held = held.slice(end + 2)) {
        const data = held.slice(0, end).split("\n").find((line) => line.startsWith("data: "));
        if (data) yield JSON.parse(data.slice(6));
      }
    }
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (send.disabled) return;
    const body = new URLSearchParams(new FormData(form));
    const live = add(thread, "article", "turn", "");
    add(live, "h2", "asked", question.value);
    const said = add(live, "div", "said", "");
    live.setAttribute("aria-busy", "true");
    const cut = new AbortController();
    stop.onclick = () => cut.abort();
    send.disabled = true;
    stop.hidden = false;
    told.textContent = "Reading";
    let failed = "";
    let whole = false;
    try {
      const headers = { Accept: "text/event-stream, application/json" };
      const response = await fetch(form.action, { method: "POST", headers, body, signal: cut.signal });
      if (!response.ok) {
        let answer = {};
        try { answer = await response.json(); } catch { /* a proxy's page, not ours */ }
        throw new Error(answer.error ? answer.error.message : "the server answered " + response.status);
      }
      for await (const found of events(response)) {
        if (found.type === "said") said.textContent += found.text;
        if (found.type === "failed") failed = found.message;
        if (found.type === "answer") {
          const made = document.createElement("template"); // escaped by the server's templates
          made.innerHTML = found.html;
          live.replaceWith(made.content);
          form.elements.thread.value = found.thread;
          whole = true;
        }
      }
      if (!whole && !failed) failed = "The connection was cut.";
    } catch (error) {
      failed = cut.signal.aborted ? "Stopped." : error.message;
    }
    live.removeAttribute("aria-busy");
    if (failed) add(live, "p", "notice bad", failed);
    else question.value = "";
    told.textContent = failed || "Answered";
    send.disabled = false;
    stop.hidden = true;
    question.focus();
  });
})();
