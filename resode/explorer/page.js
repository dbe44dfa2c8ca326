"use strict";
// What is chosen and when it is drawn. Names from files become text nodes, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#9A7B12", "#8E6BD1", "#7F7F7F"];
const methods = new Map(data.methods.map((m) => [m.name, unpacked(m)]));
const chosen = {
  method: data.shown[0], compared: new Set(data.shown.slice(1)), view: "region", scale: 1,
  block: -1, // all of them
  mode: null, // {block, index} of the eigenvalue that is looked at
  field: "linear", start: FIELDS.linear.start.slice(), depth: data.depth,
};
const camera = { x: -1, y: 0, unit: 80 }; // pixels a unit
let region = null; // the drawn regions, kept while neither they nor the camera change
let limits = new Map();
const times = [];

function unpacked(m) {
  const exact = (text) => fraction(text);
  return {
    ...m,
    a: m.a && m.a.map((row) => row.map(exact)), b: m.b && m.b.map(exact), aText: m.a, bText: m.b,
    p: m.p && m.p.map(exact), q: m.q && m.q.map(exact), pText: m.p, qText: m.q,
  };
}

function method() {
  return methods.get(chosen.method);
}

const drawn = () => [chosen.method, ...[...chosen.compared].filter((name) => name !== chosen.method)];

// Its own for every method, in the order in which they were first drawn.
const inked = new Map();
function colourOf(name) {
  if (!inked.has(name)) inked.set(name, COLOURS[inked.size % COLOURS.length]);
  return inked.get(name);
}

const shownBlocks = () => (chosen.block < 0 ? data.blocks : [data.blocks[chosen.block]]).filter(Boolean);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const oneStep = () => data.blocks.every((b) => b.step === data.blocks[0].step);
const stepOf = (block) => chosen.scale * block.step;

function short(value, digits = 4) {
  if (value === Infinity) return "∞";
  return Number.isFinite(value) ? String(Number(value.toPrecision(digits))).replace("-", "−") : "–";
}

function complexText(re, im) {
  return im === 0 ? short(re) : `${short(re)} ${im < 0 ? "−" : "+"} ${short(Math.abs(im))}i`;
}

function limitsOf(name, index) {
  const key = `${name}\n${index}`;
  if (!limits.has(key)) limits.set(key, limitOf(methods.get(name), data.blocks[index]));
  return limits.get(key);
}

// What follows η: the plane, the texts and the small pictures of the chosen eigenvalue.
function draw() {
  const begun = performance.now();
  const { pen, width, height } = sized(at("plane"));
  if (!region) region = drawRegion(width, height);
  pen.drawImage(region, 0, 0, width, height);
  drawAxes(pen, width, height);
  const count = drawModes(pen, width, height);
  drawChosen(pen, width, height);
  verdict(count);
  statesOfLimits();
  tableOfMode();
  drawDepth();
  drawPath();
  drawAlongAxes();
  showStep();
  times.push(performance.now() - begun);
  if (times.length > 120) times.shift();
  const typical = times.slice().sort((a, b) => a - b)[Math.floor(times.length / 2)];
  at("cost").textContent = `${count.many.toLocaleString("en")} eigenvalues; a redraw takes ${typical.toFixed(1)} ms of script (median of ${times.length}).`;
  at("cost").dataset.ms = typical;
}

let asked = false;
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    draw();
  });
}

function showStep() {
  const value = chosen.scale * (oneStep() && data.blocks.length ? data.blocks[0].step : 1);
  at("eta-label").textContent = oneStep() ? "η" : "η, times its own";
  if (document.activeElement !== at("eta")) at("eta").value = Math.log10(chosen.scale);
  if (document.activeElement !== at("eta-value")) at("eta-value").value = Number(value.toPrecision(6));
}

function setScale(scale) {
  if (Number.isFinite(scale) && scale > 0) chosen.scale = Math.min(1e6, Math.max(1e-6, scale));
  redraw();
}

function changeMethod() {
  region = null;
  legend();
  tableOfLimits();
  drawMethod();
  redraw();
}

function choose(what, value) {
  if (what === "block") {
    chosen.block = Number(value);
    at("block").value = value;
    chosen.mode = chosen.block < 0 ? chosen.mode : { block: chosen.block, index: Math.max(0, limitsOf(chosen.method, chosen.block).worst) };
  } else chosen[what] = value;
  if (what === "method" || what === "view") changeMethod();
  redraw();
}

const least = (points, axis, sign = 1) => points.reduce((low, p) => Math.min(low, sign * p[axis]), 0);

function fit() {
  const { clientWidth: w, clientHeight: h } = at("plane");
  const z = shownBlocks().flatMap((b) => b.re.map((x, i) => [stepOf(b) * x, Math.abs(stepOf(b) * b.im[i])]));
  const widest = (key, own) => Math.max(own, ...drawn().map((name, n) => Math.min(methods.get(name)[key] ?? 4, n ? 4 : 30)));
  const far = widest("real", 2);
  const left = Math.min(-far, least(z, 0)) * 1.12;
  const right = Math.max(1, -least(z, 0, -1)) * 1.25;
  const top = Math.max(widest("imaginary", 1.3), far * 0.35, -least(z, 1, -1)) * 1.15;
  camera.x = (left + right) / 2;
  camera.y = 0;
  camera.unit = Math.min(w / (right - left), h / (2 * top));
  region = null;
  redraw();
}

function zoom(times_, px, py) {
  const { clientWidth: w, clientHeight: h } = at("plane");
  const [x, y] = toPlane(px ?? w / 2, py ?? h / 2, w, h);
  camera.unit = Math.min(1e7, Math.max(1e-3, camera.unit * times_));
  camera.x += x - toPlane(px ?? w / 2, py ?? h / 2, w, h)[0];
  camera.y += y - toPlane(px ?? w / 2, py ?? h / 2, w, h)[1];
  region = null;
  redraw();
}

function nearest(px, py, reach) {
  const { clientWidth: w, clientHeight: h } = at("plane");
  let best = { distance: reach, mode: null };
  for (const block of shownBlocks()) {
    const eta = stepOf(block);
    const { re, im } = counted(block);
    for (let i = 0; i < re.length; i++) {
      const [x, y] = toPixel(eta * re[i], eta * im[i], w, h);
      const distance = Math.hypot(x - px, y - py);
      if (distance < best.distance) best = { distance, mode: { block: data.blocks.indexOf(block), index: i } };
    }
  }
  return best.mode;
}

// The next eigenvalue of those shown, those that a step amplifies most first.
function walk(direction) {
  const all = shownBlocks().flatMap((block) => {
    const { re, im } = counted(block);
    const n = data.blocks.indexOf(block);
    return re.map((x, i) => ({ block: n, index: i, size: growth(method(), stepOf(block) * x, stepOf(block) * im[i]) }));
  }).sort((a, b) => b.size - a.size || a.block - b.block || a.index - b.index);
  if (!all.length) return;
  const here = all.findIndex((m) => chosen.mode && m.block === chosen.mode.block && m.index === chosen.mode.index);
  chosen.mode = all[(here + (here < 0 && direction < 0 ? 0 : direction) + all.length) % all.length];
  redraw();
}
