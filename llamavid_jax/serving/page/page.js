"use strict";
// A chat about one film at a time.  All that comes from elsewhere is put in as text, never as markup.
const $ = (id) => document.getElementById(id);
const stored = (name, value) => (value === undefined ? sessionStorage.getItem(name) : sessionStorage.setItem(name, value));
let model = "", film = null, messages = [], running = null, video = Promise.resolve(null), leaving = false;

const headers = () => (stored("key") ? { Authorization: `Bearer ${stored("key")}` } : {});

function say(text, wrong = false) {
  $("state").textContent = text;
  $("state").classList.toggle("wrong", wrong);
}

async function call(path, options = {}) {
  const reply = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (reply.ok) return reply;
  if (reply.status === 401) {
    $("key-field").hidden = false;
    $("key").focus();
  }
  const body = await reply.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the server answered ${reply.status}`);
}

async function begin() {
  try {
    model = (await (await call("/v1/models")).json()).data[0].id;
    $("model").textContent = model;
    await list();
    const last = JSON.parse(stored("film") ?? "null");
    if (last) await use(last, JSON.parse(stored("messages") ?? "[]"));
  } catch (error) {
    say(error.message, true);
  }
}

async function list() {
  const files = (await (await call("/v1/files")).json()).data;
  $("films").replaceChildren(...files.map((file) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.textContent = file.filename;
    button.dataset.url = file.id;
    button.setAttribute("aria-pressed", film?.url === file.id);
    button.onclick = () => use({ url: file.id, name: file.filename });
    item.append(button);
    return item;
  }));
}

const isPicture = (name) => /\.(png|jpe?g|gif|webp|bmp|avif|tiff?)$/i.test(name);

async function use(chosen, before = []) {
  running?.abort();
  busy(false);
  film = chosen;
  messages = before;
  stored("film", JSON.stringify(film));
  keep();
  say(film.name);
  for (const button of $("films").querySelectorAll("button")) button.setAttribute("aria-pressed", button.dataset.url === film.url);
  video = preview(film);
  $("retry").hidden = true;
  $("chat").replaceChildren();
  for (const turn of messages) show(turn.role, turn.words, turn.rests);
  $("question").focus();
  if (messages.at(-1)?.role === "user") await ask(messages.pop().words, $("chat").lastChild); // the page was left before its answer
}

// The film's element, once its address is known; null where it is a picture or a link.
async function preview({ url, name }) {
  $("preview").replaceChildren();
  if (!url.startsWith("file-")) return null;
  const media = document.createElement(isPicture(name) ? "img" : "video"), content = `/v1/files/${url}/content`;
  media.alt = name;
  media.controls = true;
  $("preview").replaceChildren(media);
  try { // an element sends no key
    media.src = stored("key") ? URL.createObjectURL(await (await call(content)).blob()) : content;
  } catch (error) {
    say(error.message, true);
  }
  return isPicture(name) ? null : media;
}

const keep = () => stored("messages", JSON.stringify(messages));

function upload(file) {
  const form = new FormData(), request = new XMLHttpRequest(); // fetch tells nothing of what has been sent
  form.append("purpose", "user_data");
  form.append("file", file);
  $("progress").hidden = false;
  const started = Date.now();
  request.upload.onprogress = ({ loaded, total }) => {
    $("progress").value = loaded / total;
    const left = ((Date.now() - started) / 1000) * (total / loaded - 1);
    say(`uploading ${file.name}: ${Math.round((100 * loaded) / total)} %, ${Math.ceil(left)} s left`);
  };
  request.onloadend = async () => {
    $("progress").hidden = true;
    let body = null;
    try { body = JSON.parse(request.responseText); } catch { /* no reply */ }
    if (request.status !== 200) return say(body?.error?.message ?? "the upload broke off; try again", true);
    await use({ url: body.id, name: body.filename });
    await list();
  };
  request.open("POST", "/v1/files");
  for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
  request.send(form);
}

function show(role, text, rests = null) {
  const turn = made("div", `turn ${role}`, made("p", "words", text));
  if (rests) turn.append(evidenceOf(rests, video));
  $("chat").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function body() {
  const kind = film && isPicture(film.name) ? "image_url" : "video_url";
  const shown = film ? [{ type: kind, [kind]: { url: film.url } }] : [];
  return messages.map(({ role, words }, number) => ({
    role,
    content: number || !shown.length ? words : [...shown, { type: "text", text: words }],
  }));
}

async function ask(question, asked = show("user", question)) {
  const own = messages, turn = show("assistant", "…"), words = turn.querySelector(".words"), stopping = new AbortController();
  own.push({ role: "user", words: question });
  keep();
  running = stopping;
  busy(true);
  let text = "", rests = null, ended = false;
  const told = film?.url.startsWith("file-") ? setInterval(tell, 1000, film.url, words, Date.now()) : 0;
  try {
    const fields = { model, messages: body(), stream: true, fps: Number($("fps").value) };
    if (film && !isPicture(film.name)) fields.evidence = true;
    const [subtitles] = $("subtitles").files;
    if (subtitles) fields.subtitles = await subtitles.text();
    const reply = await call("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(fields),
      signal: stopping.signal,
    });
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      clearInterval(told);
      text += choice?.delta.content ?? "";
      words.textContent = text || "…";
      ended ||= Boolean(choice?.finish_reason);
      if (choice?.evidence) rests = summary(choice.evidence);
      turn.scrollIntoView({ block: "end" });
    }
    if (!ended) throw new Error("the answer broke off; try again");
    own.push({ role: "assistant", words: text, rests });
  } catch (error) {
    if (leaving) return; // the next page asks again
    own.pop();
    turn.classList.add("wrong");
    words.textContent = error.name === "AbortError" ? `${text} (stopped)` : error.message;
    $("retry").onclick = () => { turn.remove(); ask(question, asked); };
  }
  clearInterval(told);
  if (own !== messages) return; // another film is asked about by now
  keep();
  busy(false);
  if (rests) turn.append(evidenceOf(rests, video));
  $("retry").hidden = !turn.classList.contains("wrong");
  turn.scrollIntoView({ block: "end" });
}

// How far the film is encoded, in place of the words that wait for it.
async function tell(url, words, started) {
  const { encoding } = await call(`/v1/files/${url}`).then((reply) => reply.json()).catch(() => ({}));
  if (!encoding?.frames || !words.textContent.startsWith("…")) return;
  const left = ((Date.now() - started) / 1000) * (encoding.of / encoding.frames - 1);
  words.textContent = `… ${encoding.frames} of ${encoding.of} frames, ${Math.ceil(left)} s left`;
}

async function* events(reply) {
  let left = "";
  for await (const piece of reply.body.pipeThrough(new TextDecoderStream())) {
    const lines = (left + piece).split("\n\n");
    left = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

function busy(on) {
  $("stop").hidden = !on;
  $("send").hidden = on;
  $("retry").hidden = true;
  if (!on) $("question").focus();
}

$("file").onchange = () => $("file").files[0] && upload($("file").files[0]);
$("drop").onkeydown = (event) => ["Enter", " "].includes(event.key) && $("file").click();
document.ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
document.ondragleave = () => $("drop").classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
};
$("link").onsubmit = (event) => {
  event.preventDefault();
  if ($("url").value) use({ url: $("url").value, name: $("url").value });
};
window.onpagehide = () => { leaving = true; };
window.onpageshow = () => { leaving = false; };
$("ask").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  $("question").value = "";
  if (question && $("stop").hidden) ask(question);
};
$("stop").onclick = () => running?.abort();
$("key").onchange = () => { stored("key", $("key").value); begin(); };
begin();
