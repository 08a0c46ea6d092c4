"use strict";
// A chat about one video at a time.  Everything from outside is inserted as text, never as markup.
const $ = (id) => document.getElementById(id);
const stored = (name, value) => (value === undefined ? sessionStorage.getItem(name) : sessionStorage.setItem(name, value));
const OVERLAP = 1 << 16, RETRY = 1000; // bytes, milliseconds
let sending = null, model = "", film = null, messages = [], running = null, video = Promise.resolve(null), leaving = false;

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
  throw failure(reply.status, await reply.json().catch(() => null));
}

function failure(status, body) {
  return Object.assign(new Error(body?.error?.message ?? `the server answered ${status}`), { status });
}

async function post(path, fields) {
  const body = JSON.stringify(fields);
  return (await call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body })).json();
}

async function begin() {
  try {
    model = (await (await call("/v1/models")).json()).data[0].id;
    $("model").textContent = model;
    await list();
    const last = JSON.parse(stored("film") ?? "null");
    if (last) await use(last, JSON.parse(stored("messages") ?? "[]"));
    await unfinished();
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
  if (messages.at(-1)?.role === "user") await ask(messages.pop().words, $("chat").lastChild); // the page was left before the answer
}

// The video element, once its address is known; null for an image.
async function preview({ url, name }) {
  const media = document.createElement(isPicture(name) ? "img" : "video"), content = `/v1/files/${url}/content`;
  media.alt = name;
  media.controls = true;
  $("preview").replaceChildren(media);
  try { // an element cannot send the key
    media.src = stored("key") ? URL.createObjectURL(await (await call(content)).blob()) : content;
  } catch (error) {
    say(error.message, true);
  }
  return isPicture(name) ? null : media;
}

const keep = () => stored("messages", JSON.stringify(messages));

// The received bytes stay on the server under an id that is stored here: the upload resumes after a broken connection,
// and after a reload once the same file is chosen again.
const place = ({ name, size, lastModified }) => `upload ${JSON.stringify([name, size, lastModified])}`;

async function upload(file) {
  sending?.abort();
  const own = (sending = new AbortController()), key = place(file);
  $("progress").hidden = false;
  try {
    let done = null;
    while (!done?.file) {
      own.signal.throwIfAborted();
      try {
        done = await send(file, await begun(file, key), own.signal);
      } catch (error) {
        if (error.status === 409) localStorage.removeItem(key); // the stored bytes are another file's
        else if (!(error instanceof TypeError)) throw error;
        else {
          say(`uploading ${file.name}: the connection is gone, trying again`, true); // or the server is down, for now
          await new Promise((resolve) => setTimeout(resolve, RETRY));
        }
      }
    }
    localStorage.removeItem(key);
    await use({ url: done.file.id, name: done.file.filename });
    await list();
  } catch (error) {
    if (!own.signal.aborted) say(error.message, true); // else another file is being sent
  } finally {
    if (own === sending) $("progress").hidden = true;
  }
}

// The upload of a file: one that was begun before, or a new one.
async function begun(file, key) {
  await file.slice(0, 1).arrayBuffer(); // fails if it has been changed or deleted
  const id = localStorage.getItem(key);
  const before = id && (await call(`/v1/uploads/${id}`).catch((error) => { if (error.status !== 404) throw error; }));
  if (before) return before.json();
  const made = await post("/v1/uploads", { filename: file.name, purpose: "user_data", bytes: file.size });
  localStorage.setItem(key, made.id);
  return made;
}

// Sends the rest of a file, with some overlap that the server compares, so that it refuses another file.
function send(file, { id, received = 0 }, signal) {
  const request = new XMLHttpRequest(), started = Date.now(); // fetch reports no upload progress
  const first = Math.max(0, Math.min(received, file.size) - OVERLAP);
  request.upload.onprogress = ({ loaded, total }) => {
    const part = (first + loaded) / file.size, left = ((Date.now() - started) / 1000) * (total / loaded - 1);
    $("progress").value = part;
    say(`uploading ${file.name}: ${Math.round(100 * part)} %, ${Math.ceil(left)} s left`);
  };
  return new Promise((resolve, reject) => {
    signal.onabort = () => request.abort();
    request.onabort = reject;
    request.onerror = () => reject(new TypeError());
    request.onload = () => {
      let body = null;
      try { body = JSON.parse(request.responseText); } catch { /* not a reply of this server */ }
      if (request.status === 200 && body) resolve(body);
      else reject([502, 503, 504].includes(request.status) ? new TypeError() : failure(request.status, body));
    };
    request.open("PUT", `/v1/uploads/${id}`);
    const sent = { ...headers(), "Content-Range": `bytes ${first}-${file.size - 1}/${file.size}` };
    for (const [name, value] of Object.entries(sent)) request.setRequestHeader(name, value);
    request.send(file.slice(first));
  });
}

// Reports uploads that broke off when the page was left.
async function unfinished() {
  for (const key of Object.keys(localStorage).filter((name) => name.startsWith("upload "))) {
    const about = await call(`/v1/uploads/${localStorage.getItem(key)}`).then((reply) => reply.json()).catch((error) => error);
    if (about.status === 404 || about.file) localStorage.removeItem(key);
    else if (about.received && !sending) {
      say(`${about.filename}: ${Math.floor((100 * about.received) / about.bytes)} % are there; choose it again to go on`);
    }
  }
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
  const told = film ? setInterval(tell, 1000, film.url, words, Date.now()) : 0;
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
  if (own !== messages) return; // another video has been chosen meanwhile
  keep();
  busy(false);
  if (rests) turn.append(evidenceOf(rests, video));
  $("retry").hidden = !turn.classList.contains("wrong");
  turn.scrollIntoView({ block: "end" });
}

// Shows how far the video is encoded, until the answer begins.
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

$("file").onchange = () => {
  const [file] = $("file").files;
  $("file").value = ""; // so that the same file can be chosen again
  if (file) upload(file);
};
$("drop").onkeydown = (event) => ["Enter", " "].includes(event.key) && $("file").click();
document.ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
document.ondragleave = () => $("drop").classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]);
};
$("link").onsubmit = async (event) => { // the server fetches it once, so that it can be played too
  event.preventDefault();
  const url = $("url").value;
  if (!url) return;
  say(`fetching ${url}`);
  try {
    const about = await post("/v1/files", { url });
    await use({ url: about.id, name: about.filename });
    await list();
  } catch (error) {
    say(error.message, true);
  }
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
