"use strict";
const $ = (id) => document.getElementById(id);
const messages = [];
let model = null, context = 0, attached = null, running = null, history = [];

const size = (n) => (n >= 1e9 ? (n / 1e9).toFixed(2) + " GB" : n >= 1e6 ? (n / 1e6).toFixed(1) + " MB" : (n / 1e3).toFixed(0) + " kB");

function headers(more) {
  const key = sessionStorage.getItem("key");
  return { ...more, ...(key ? { Authorization: "Bearer " + key } : {}) };
}

async function get(path) {
  const answer = await fetch(path, { headers: headers() });
  $("keybox").hidden = answer.status !== 401 && !sessionStorage.getItem("key");
  if (!answer.ok) throw new Error((await answer.json()).error?.message ?? answer.statusText);
  return answer.json();
}

async function connect() {
  try {
    const list = await get("v1/models");
    model = list.data[0].id;
    context = list.data[0].max_model_len ?? 0;
    $("model").textContent = context ? model : model + " is being loaded …";
    if (context) return;
  } catch (e) {
    $("model").textContent = e.message;
  }
  setTimeout(connect, 1000);
}

function show(role, text) {
  const turn = document.createElement("div");
  turn.className = "turn " + role;
  turn.textContent = text;
  $("chat").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  show("user", text);
  const turn = show("assistant", "");
  const started = performance.now();
  let first = null, last = null, pieces = 0, content = "";
  running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  try {
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      signal: running.signal,
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify({
        model, messages, stream: true, stream_options: { include_usage: true },
        temperature: Number($("temperature").value), max_tokens: Number($("tokens").value),
      }),
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
        const chunk = JSON.parse(event.slice(6));
        if (chunk.error) throw new Error(chunk.error.message);
        const piece = chunk.choices[0]?.delta?.content;
        if (piece) {
          last = performance.now();
          first ??= last;
          pieces += 1;
          content += piece;
          turn.textContent = content;
          turn.scrollIntoView({ block: "end" });
          $("first").textContent = ((first - started) / 1000).toFixed(2) + " s";
          if (pieces > 1) $("speed").textContent = (((pieces - 1) * 1000) / (last - first)).toFixed(1) + " tokens/s";
        }
        if (chunk.usage) {
          const u = chunk.usage, cached = u.prompt_tokens_details.cached_tokens;
          $("context").textContent = u.total_tokens + " of " + context;
          $("cached").textContent = cached + " of " + u.prompt_tokens;
          if (u.completion_tokens > 1 && last > first) {
            $("speed").textContent = (((u.completion_tokens - 1) * 1000) / (last - first)).toFixed(1) + " tokens/s";
          }
        }
      }
    }
  } catch (e) {
    if (e.name !== "AbortError") show("error", e.message);
  }
  // What the model has not said is not part of the chat.
  if (content) messages.push({ role: "assistant", content });
  else messages.pop();
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
}

function line(values, top) {
  return values.map((v, i) => ((i * 300) / 119).toFixed(1) + "," + (58 - (56 * v) / top).toFixed(1)).join(" ");
}

function draw(s) {
  $("spec").textContent = s.spec;
  $("ours").textContent = size(s.kv_bytes);
  $("half").textContent = size(s.fp16_bytes);
  $("times").textContent = s.kv_bytes > 0 ? (s.fp16_bytes / s.kv_bytes).toFixed(1) + " ×" : "–";
  const top = Math.max(s.fp16_bytes, s.kv_bytes, 1);
  $("bar-ours").style.width = (100 * s.kv_bytes) / top + "%";
  $("bar-half").style.width = (100 * s.fp16_bytes) / top + "%";
  history.push([s.kv_bytes, s.fp16_bytes]);
  history = history.slice(-120);
  const peak = Math.max(...history.flat(), 1);
  $("curve-ours").setAttribute("points", line(history.map((h) => h[0]), peak));
  $("curve-half").setAttribute("points", line(history.map((h) => h[1]), peak));
  const rows = s.sequences.map((q) => {
    const row = document.createElement("div");
    row.title = q.id + ": " + q.tokens + " tokens, " + size(q.bytes);
    for (const letter of q.blocks.slice(0, 2000)) {
      const block = document.createElement("i");
      block.className = letter;
      row.append(block);
    }
    return row;
  });
  if (!rows.length) {
    const row = document.createElement("div");
    for (let i = 0; i < Math.min(s.prefix_segments, 2000); i++) {
      const block = document.createElement("i");
      block.className = "k";
      row.append(block);
    }
    rows.push(row);
  }
  $("blocks").replaceChildren(...rows);
  $("kept").textContent = s.prefix_segments + " blocks kept (" + size(s.prefix_bytes) + ") of a budget of " + size(s.kv_budget_bytes)
    + (s.waiting ? "; " + s.waiting + " requests wait" : "");
}

async function watch() {
  try {
    draw(await get("stats"));
  } catch (e) {
    $("kept").textContent = e.message;
  }
  setTimeout(watch, running ? 250 : 500);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (running || !model || (!text && !attached)) return;
  $("question").value = "";
  ask(attached ? attached + "\n\n" + text : text);
  attached = null;
  $("attached").textContent = "";
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("chat").replaceChildren();
});
$("file").addEventListener("change", async () => {
  const file = $("file").files[0];
  if (!file) return;
  attached = await file.text();
  $("attached").textContent = file.name + ", " + size(file.size);
  $("file").value = "";
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  connect();
});
connect();
watch();
