// The map of index.map: points and pictures on a canvas, to pan, zoom, search and look at.
//
// Everything comes from this page: #data is JSON, #sheet-N are pictures of many thumbnails in base64.
// Text from the collection is set as text, never as markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const X = new Uint16Array(bytes(data.x).buffer);
const Y = new Uint16Array(bytes(data.y).buffer);
const L = new Uint16Array(bytes(data.label).buffer);
const TILE = new Int32Array(bytes(data.tile).buffer);
const N = X.length;
const PICTURES_BELOW = 400; // points in view from which on pictures show by themselves
const REACH_PX = 14;
const GAP_PX = 46; // from picture to picture
const CELLS = 128;
const CELL = 65536 / CELLS;

const canvas = document.getElementById("map");
const paper = canvas.getContext("2d");
const search = document.getElementById("search");
const status = document.getElementById("status");
const details = document.getElementById("details");
const picture = document.getElementById("picture");
const legend = document.getElementById("legend");
const toggle = document.getElementById("pictures");
const dark = matchMedia("(prefers-color-scheme: dark)");

let scale = 1, left = 0, top_ = 0; // screen = world * scale + (left, top_)
let width = 0, height = 0;
let isPictures = false;
let chosen = -1, hovered = -1;
let matches = [], match = -1;
let isMatch = null;
const hidden = new Set();
const pictured = new Map(); // which picture stands in which square

// Points by cell, so that looking for one near the pointer looks at few.
const starts = new Uint32Array(CELLS * CELLS + 1);
const inCell = new Uint32Array(N);
const cellOf = (i) => Math.floor(Y[i] / CELL) * CELLS + Math.floor(X[i] / CELL);
for (let i = 0; i < N; i++) starts[cellOf(i) + 1]++;
for (let c = 0; c < CELLS * CELLS; c++) starts[c + 1] += starts[c];
{
  const next = starts.slice();
  for (let i = 0; i < N; i++) inCell[next[cellOf(i)]++] = i;
}

function* visible(x0, y0, x1, y1) {
  const clamp = (v) => Math.max(0, Math.min(CELLS - 1, Math.floor(v / CELL)));
  for (let cy = clamp(y0); cy <= clamp(y1); cy++) {
    for (let cx = clamp(x0); cx <= clamp(x1); cx++) {
      const cell = cy * CELLS + cx;
      for (let n = starts[cell]; n < starts[cell + 1]; n++) {
        const i = inCell[n];
        if (X[i] >= x0 && X[i] <= x1 && Y[i] >= y0 && Y[i] <= y1 && !hidden.has(L[i])) yield i;
      }
    }
  }
}

const view = () => [-left / scale, -top_ / scale, (width - left) / scale, (height - top_) / scale];
// The labels' colours as pixels: red is the lowest byte.
const INK = data.labels.map(({ colour: c }) => {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(c.slice(at, at + 2), 16));
  return (b << 16) | (g << 8) | r;
});
const colour = (i) => data.labels[L[i]].colour;

const sheets = new Map();
function sheet(number) {
  if (!sheets.has(number)) {
    const image = new Image();
    image.onload = () => { image.ready = true; redraw(); show(chosen >= 0 ? chosen : hovered); };
    image.src = "data:image/jpeg;base64," + document.getElementById("sheet-" + number).textContent;
    sheets.set(number, image);
  }
  return sheets.get(number);
}

// Draw the thumbnail of point i into a square; false where it has none, or not yet.
function drawTile(context, i, x, y, size) {
  if (TILE[i] < 0) return false;
  const perSheet = data.columns * data.columns;
  const image = sheet(Math.floor(TILE[i] / perSheet));
  if (!image.ready) return false;
  const place = TILE[i] % perSheet;
  const px = data.px;
  context.drawImage(
    image, (place % data.columns) * px, Math.floor(place / data.columns) * px, px, px, x, y, size, size
  );
  return true;
}

let isWaiting = false;
function redraw() {
  if (isWaiting) return;
  isWaiting = true;
  requestAnimationFrame(() => { isWaiting = false; draw(); });
}

function draw() {
  const ratio = devicePixelRatio || 1;
  paper.setTransform(ratio, 0, 0, ratio, 0, 0);
  paper.clearRect(0, 0, width, height);
  const seen = [...visible(...view())];
  pictured.clear();
  if (isPictures || seen.length <= PICTURES_BELOW) drawPictures(seen);
  else drawPoints(seen);
  if (!pictured.size && matches.length <= 200) for (const i of matches) ring(i, 5, dark.matches ? "#fff" : "#000", 1.5);
  if (hovered >= 0) ring(hovered, 9, dark.matches ? "#fff" : "#000", 2);
  if (chosen >= 0) ring(chosen, 11, "#d1242f", 3);
}

// Pixels by hand: 60,000 calls of fillRect take twice as long and more.
function drawPoints(seen) {
  const image = paper.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  const ratio = devicePixelRatio || 1;
  const size = Math.max(1.6, Math.min(5, 90 / Math.sqrt(seen.length))) * ratio;
  for (const i of seen) {
    const side = Math.max(1, Math.round(isMatch && isMatch[i] ? size + 1.5 * ratio : size));
    const x0 = Math.round((X[i] * scale + left) * ratio - side / 2);
    const y0 = Math.round((Y[i] * scale + top_) * ratio - side / 2);
    const alpha = !isMatch || isMatch[i] ? 0xff000000 : 0x40000000;
    const value = (INK[L[i]] | alpha) >>> 0;
    for (let y = Math.max(0, y0); y < Math.min(canvas.height, y0 + side); y++) {
      const from = y * canvas.width;
      for (let x = Math.max(0, x0); x < Math.min(canvas.width, x0 + side); x++) pixels[from + x] = value;
    }
  }
  paper.putImageData(image, 0, 0);
}

// One picture a square of the map at this scale, so that none hides another; what was chosen or found wins.
function drawPictures(seen) {
  const size = GAP_PX - 6;
  const rank = (i) => (i === chosen ? 2 : isMatch ? isMatch[i] : 0);
  for (const i of seen.sort((a, b) => rank(b) - rank(a))) {
    const column = Math.floor(X[i] * scale / GAP_PX), row = Math.floor(Y[i] * scale / GAP_PX);
    const square = column + ":" + row;
    if (pictured.has(square)) continue;
    pictured.set(square, i);
    const x0 = column * GAP_PX + left + 3, y0 = row * GAP_PX + top_ + 3;
    paper.fillStyle = colour(i);
    paper.globalAlpha = isMatch && !isMatch[i] ? 0.25 : 1;
    paper.fillRect(x0 - 2, y0 - 2, size + 4, size + 4);
    if (!drawTile(paper, i, x0, y0, size)) {
      paper.fillStyle = dark.matches ? "#333" : "#ddd";
      paper.fillRect(x0, y0, size, size);
    }
  }
  paper.globalAlpha = 1;
}

function ring(i, radius, stroke, line) {
  paper.beginPath();
  paper.arc(X[i] * scale + left, Y[i] * scale + top_, radius, 0, 7);
  paper.strokeStyle = stroke;
  paper.lineWidth = line;
  paper.stroke();
}

function near(sx, sy) {
  const square = Math.floor((sx - left) / GAP_PX) + ":" + Math.floor((sy - top_) / GAP_PX);
  if (pictured.has(square)) return pictured.get(square);
  const wx = (sx - left) / scale, wy = (sy - top_) / scale, reach = REACH_PX / scale;
  let best = -1, least = Infinity;
  for (const i of visible(wx - reach, wy - reach, wx + reach, wy + reach)) {
    const d = (X[i] - wx) ** 2 + (Y[i] - wy) ** 2;
    if (d < least) { least = d; best = i; }
  }
  return best;
}

function show(i) {
  details.hidden = i < 0;
  if (i < 0) return;
  document.getElementById("key").textContent = data.keys[i];
  document.getElementById("label").textContent = data.labels[L[i]].name;
  document.getElementById("swatch").style.background = colour(i);
  const context = picture.getContext("2d");
  context.clearRect(0, 0, picture.width, picture.height);
  context.imageSmoothingEnabled = data.px > 40;
  const isDrawn = drawTile(context, i, 0, 0, picture.width);
  document.getElementById("none").hidden = isDrawn || TILE[i] >= 0;
}

function choose(i, isCentred) {
  chosen = i;
  if (i >= 0 && isCentred) {
    scale = Math.max(scale, 12 * fitted());
    left = width / 2 - X[i] * scale;
    top_ = height / 2 - Y[i] * scale;
  }
  show(i);
  redraw();
}

const fitted = () => 0.94 * Math.min(width, height) / 65536;
function fit() {
  scale = fitted();
  left = (width - 65536 * scale) / 2;
  top_ = (height - 65536 * scale) / 2;
  redraw();
}

function zoom(factor, sx, sy) {
  const next = Math.max(fitted() / 2, Math.min(fitted() * 2000, scale * factor));
  left = sx - (sx - left) * next / scale;
  top_ = sy - (sy - top_) * next / scale;
  scale = next;
  redraw();
}

function resize() {
  const isFirst = width === 0;
  const ratio = devicePixelRatio || 1;
  const [oldWidth, oldHeight] = [width, height];
  width = canvas.clientWidth;
  height = canvas.clientHeight;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  if (isFirst) fit();
  else { left += (width - oldWidth) / 2; top_ += (height - oldHeight) / 2; }
  draw(); // at once: setting the size has cleared the canvas
}

function find() {
  const wanted = search.value.trim().toLowerCase();
  matches = [];
  match = -1;
  isMatch = null;
  if (wanted) {
    isMatch = new Uint8Array(N);
    const labels = data.labels.map((label) => label.name.toLowerCase().includes(wanted));
    for (let i = 0; i < N; i++) {
      if (!hidden.has(L[i]) && (labels[L[i]] || data.keys[i].toLowerCase().includes(wanted))) {
        matches.push(i);
        isMatch[i] = 1;
      }
    }
  }
  say();
  redraw();
}

function say() {
  const total = `${N.toLocaleString("en")} images`;
  const place = match >= 0 ? `${match + 1} of ` : "";
  status.textContent = isMatch ? `${place}${matches.length.toLocaleString("en")} found` : total;
}

function step(by) {
  if (!matches.length) return;
  match = (match + by + matches.length) % matches.length;
  choose(matches[match], true);
  say();
}

function setPictures(on) {
  isPictures = on;
  toggle.setAttribute("aria-pressed", String(on));
  redraw();
}

data.labels.forEach((label, number) => {
  const button = document.createElement("button");
  const swatch = document.createElement("span");
  swatch.className = "swatch";
  swatch.style.background = label.colour;
  button.append(swatch, ` ${label.name} `);
  const count = document.createElement("small");
  count.textContent = label.count.toLocaleString("en");
  button.append(count);
  button.setAttribute("aria-pressed", "true");
  button.title = "show or hide; with Shift: this one alone";
  button.addEventListener("click", (event) => {
    const others = data.labels.map((_, n) => n).filter((n) => n !== number);
    if (event.shiftKey) {
      const isAlone = !hidden.has(number) && others.every((n) => hidden.has(n));
      hidden.clear();
      if (!isAlone) others.forEach((n) => hidden.add(n));
    } else if (hidden.has(number)) hidden.delete(number);
    else hidden.add(number);
    [...legend.children].forEach((b, n) => b.setAttribute("aria-pressed", String(!hidden.has(n))));
    find();
  });
  legend.append(button);
});

let grabbed = null;
canvas.addEventListener("pointerdown", (event) => {
  grabbed = { x: event.offsetX, y: event.offsetY, isMoved: false };
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointermove", (event) => {
  if (grabbed) {
    const dx = event.offsetX - grabbed.x, dy = event.offsetY - grabbed.y;
    if (grabbed.isMoved || Math.hypot(dx, dy) > 4) {
      left += dx;
      top_ += dy;
      grabbed = { x: event.offsetX, y: event.offsetY, isMoved: true };
      redraw();
    }
    return;
  }
  const i = near(event.offsetX, event.offsetY);
  if (i !== hovered) {
    hovered = i;
    show(i >= 0 ? i : chosen);
    redraw();
  }
});
canvas.addEventListener("pointerup", (event) => {
  if (grabbed && !grabbed.isMoved) choose(near(event.offsetX, event.offsetY), false);
  grabbed = null;
});
canvas.addEventListener("pointerleave", () => { hovered = -1; show(chosen); redraw(); });
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * 0.0015), event.offsetX, event.offsetY);
}, { passive: false });
canvas.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
  if (by[event.key]) { left += by[event.key][0]; top_ += by[event.key][1]; redraw(); }
  else if (event.key === "+" || event.key === "=") zoom(1.4, width / 2, height / 2);
  else if (event.key === "-") zoom(1 / 1.4, width / 2, height / 2);
  else if (event.key === "0") fit();
  else if (event.key === "p") setPictures(!isPictures);
  else if (event.key === "n") step(1);
  else if (event.key === " ") choose(nearCentre(), false);
  else if (event.key === "Escape") choose(-1, false);
  else return;
  event.preventDefault();
});

function nearCentre() {
  let best = -1, least = Infinity;
  for (const i of visible(...view())) {
    const d = (X[i] * scale + left - width / 2) ** 2 + (Y[i] * scale + top_ - height / 2) ** 2;
    if (d < least) { least = d; best = i; }
  }
  return best;
}

search.addEventListener("input", find);
search.addEventListener("keydown", (event) => {
  if (event.key === "Enter") { step(event.shiftKey ? -1 : 1); event.preventDefault(); }
  if (event.key === "Escape") { search.value = ""; find(); }
});
toggle.addEventListener("click", () => setPictures(!isPictures));
document.getElementById("fit").addEventListener("click", fit);
dark.addEventListener("change", redraw);
new ResizeObserver(resize).observe(canvas);
resize();
// index.html#pictures and index.html#find=boot open it so.
if (location.hash === "#pictures") setPictures(true);
if (location.hash.startsWith("#find=")) {
  search.value = decodeURIComponent(location.hash.slice(6));
  find();
  step(1);
}
say();
