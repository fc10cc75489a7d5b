// Sends the same question to several models and streams their answers side by side.

const MOST_LISTED = 200;
const $ = (id) => document.getElementById(id);
let names = [];
let running = [];

function headers() {
  const key = $("key").value;
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `HTTP ${response.status}`);
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  names = (await response.json()).data.map((model) => model.id);
  showModels();
}

function showModels() {
  const wanted = $("filter").value.toLowerCase();
  const chosen = new Set(selected());
  const shown = names.filter((name) => chosen.has(name) || name.toLowerCase().includes(wanted)).slice(0, MOST_LISTED);
  $("models").replaceChildren(...shown.map((name) => {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name });
    box.checked = chosen.has(name) || (chosen.size === 0 && !wanted && names.indexOf(name) < 4);
    label.append(box, ` ${name}`);
    return label;
  }));
}

function selected() {
  return [...$("models").querySelectorAll("input:checked")].map((box) => box.value);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(model, signal) {
  const article = document.createElement("article");
  const [title, text, note] = ["h2", "pre", "small"].map((tag) => document.createElement(tag));
  title.textContent = model;
  article.append(title, text, note);
  $("answers").append(article);
  const isChat = $("chat").checked;
  const prompt = $("prompt").value;
  const body = {
    model, stream: true, stream_options: { include_usage: true },
    max_tokens: Number($("tokens").value), temperature: Number($("temperature").value),
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  const begin = performance.now();
  try {
    const url = isChat ? "v1/chat/completions" : "v1/completions";
    const response = await fetch(url, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!response.ok) throw await failure(response);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      text.textContent += choice?.delta?.content ?? choice?.text ?? "";
      if (event.usage) {
        const seconds = ((performance.now() - begin) / 1000).toFixed(2);
        note.textContent = `${event.usage.completion_tokens} tokens in ${seconds} s`;
        note.className = "done";
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") note.textContent = error.message;
  }
}

$("filter").addEventListener("input", showModels);
$("key").addEventListener("change", () => loadModels().then(() => tell(""), tell));
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  running.forEach((each) => each.abort());
  $("answers").replaceChildren();
  tell("");
  running = selected().map((model) => {
    const controller = new AbortController();
    ask(model, controller.signal);
    return controller;
  });
});

function tell(problem) {
  $("problem").textContent = problem.message ?? problem;
}

loadModels().catch(tell);
