"use strict";
// What an answer rests on: the video's frames with the most attention, and a curve over all frames.
const STRONGEST = 6, POINTS = 300, WIDTH = 600, HEIGHT = 60;
let drawing = Promise.resolve(); // one answer after another, each with a video element of its own

const made = (name, className, ...inner) => {
  const element = document.createElement(name);
  element.className = className;
  element.append(...inner);
  return element;
};

function clock(seconds) {
  const [hours, minutes, rest] = [seconds / 3600, (seconds / 60) % 60, seconds % 60].map(Math.floor);
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

// Few enough points to be stored with the conversation; null for images, which have no time axis.
function summary([part]) {
  if (!part || part.seconds.length < 2) return null;
  const { seconds, weights } = part, size = Math.ceil(seconds.length / POINTS), curve = [];
  for (let start = 0; start < seconds.length; start += size) {
    const own = weights.slice(start, start + size), most = Math.max(...own);
    curve.push([seconds[start + own.indexOf(most)], most]);
  }
  const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, STRONGEST);
  const shown = order.filter((place) => weights[place] > weights[order[0]] / 10).sort((a, b) => a - b);
  const maps = new Map(part.looked.map(({ second, attention }) => [second, attention]));
  return { curve, strongest: shown.map((place) => [seconds[place], weights[place], maps.get(seconds[place])]) };
}

// `video`: a promise of the video element, or of null if there is none.
function evidenceOf({ curve, strongest }, video) {
  const play = async (second) => {
    const film = await video;
    if (!film) return;
    film.currentTime = second;
    film.scrollIntoView({ block: "nearest" });
    film.play().catch(() => {}); // a video that this browser cannot play
  };
  const frames = strongest.map(([second, weight, attention]) => {
    const canvas = made("canvas", ""), look = made("canvas", "look"), share = `${(100 * weight).toFixed(1)} %`;
    const picture = made("div", "picture", canvas, look);
    const button = made("button", "frame", picture, made("span", "", `${clock(second)} · ${share}`));
    button.setAttribute("aria-label", `Play from ${clock(second)}, where ${share} of the attention is`);
    button.onclick = () => play(second);
    return { second, canvas, look, attention, button };
  });
  const end = curve.at(-1)[0], top = Math.max(...curve.map(([, weight]) => weight)) || 1;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Attention over the film, from 0:00 to ${clock(end)}`);
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  const point = ([second, weight]) => `${(WIDTH * second) / end},${HEIGHT - 2 - ((HEIGHT - 4) * weight) / top}`;
  line.setAttribute("points", curve.map(point).join(" "));
  svg.append(line);
  svg.onclick = ({ clientX }) => {
    const { left, width } = svg.getBoundingClientRect();
    play((end * (clientX - left)) / width);
  };
  video.then((film) => { if (film) drawing = drawing.then(() => grab(film.src, frames)); });
  const ends = made("div", "ends", made("span", "", "0:00"), made("span", "", clock(end)));
  return made("figure", "evidence", made("div", "strip", ...frames.map(({ button }) => button)), svg, ends);
}

// Resolves once the frame of that second can be drawn: after seeking, a video may briefly show another one.
const painted = (film, second) => new Promise((resolve) => {
  const look = (_, { mediaTime }) => (Math.abs(mediaTime - second) < 0.02 ? resolve() : wait());
  const wait = () => film.requestVideoFrameCallback?.(look);
  wait();
  setTimeout(resolve, 500); // in case the browser does not report it, or the frame began before that second
});

// Darkens patches that get little attention from the question's context token; the model sees the central square.
function shade(look, { width, height }, attention) {
  const side = Math.min(width, height), left = (width - side) / 2, top = (height - side) / 2;
  const most = Math.max(...attention.flat()), edge = (start, place) => Math.round(start + (side * place) / attention.length);
  Object.assign(look, { width, height });
  const context = look.getContext("2d");
  attention.forEach((row, y) => row.forEach((weight, x) => {
    context.fillStyle = `rgb(0 0 0 / ${0.65 * (1 - weight / most)})`;
    const [x0, y0] = [edge(left, x), edge(top, y)];
    context.fillRect(x0, y0, edge(left, x + 1) - x0, edge(top, y + 1) - y0);
  }));
}

// Draws the frames one after another with a separate video element, so that the visible one keeps its position.
async function grab(source, frames) {
  const film = made("video", "");
  const reached = (name) => new Promise((resolve, reject) => { film[`on${name}`] = resolve; film.onerror = reject; });
  film.muted = true;
  const begun = reached("loadedmetadata");
  film.src = source;
  try {
    await begun;
    for (const { second, canvas, look, attention } of frames) {
      const there = Promise.all([reached("seeked"), painted(film, second)]);
      film.currentTime = second + 0.001; // not the end of the previous frame
      await there;
      canvas.width = 160;
      canvas.height = Math.round((160 * film.videoHeight) / film.videoWidth);
      canvas.getContext("2d").drawImage(film, 0, 0, canvas.width, canvas.height);
      if (attention) shade(look, canvas, attention);
    }
  } catch { /* the browser cannot play this video: only the times are shown */ }
  film.removeAttribute("src");
  film.load();
}
