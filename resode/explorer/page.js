"use strict";
// The page: what is chosen, what is drawn, and the controls. Names from files become text nodes, never markup.

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

// --- the plane -------------------------------------------------------------------------------------------------

function sized(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    if (canvas.id === "plane") region = null;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "13px system-ui, sans-serif";
  return { pen, width, height };
}

const toPixel = (x, y, w, h) => [w / 2 + (x - camera.x) * camera.unit, h / 2 - (y - camera.y) * camera.unit];
const toPlane = (px, py, w, h) => [camera.x + (px - w / 2) / camera.unit, camera.y - (py - h / 2) / camera.unit];

// log|R|, or log|R e^−z| for the order star.
function level(m, x, y) {
  const size = Math.log(Math.max(growth(m, x, y), 1e-300));
  return chosen.view === "star" ? size - x : size;
}

function drawRegion(width, height) {
  const canvas = document.createElement("canvas");
  const ratio = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const names = chosen.view === "region" ? drawn() : [chosen.method];
  const cell = Math.max(2, Math.sqrt(width * height * names.length / 90000));
  for (const name of names.reverse()) {
    const grid = levels(methods.get(name), width, height, cell);
    fill(pen, grid, width, height, name);
    contour(pen, grid, cell, name, name === chosen.method ? 2.2 : 1.4);
  }
  return canvas;
}

function levels(m, width, height, cell) {
  const [columns, rows] = [Math.ceil(width / cell) + 1, Math.ceil(height / cell) + 1];
  const values = new Float64Array(columns * rows);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      const [x, y] = toPlane(j * cell, i * cell, width, height);
      values[i * columns + j] = level(m, x, y);
    }
  }
  return { values, columns, rows, cell };
}

function fill(pen, { values, columns, rows, cell }, width, height, name) {
  const small = document.createElement("canvas");
  [small.width, small.height] = [columns, rows];
  const brush = small.getContext("2d");
  const image = brush.createImageData(columns, rows);
  const colour = parseInt(colourOf(name).slice(1), 16);
  const sign = chosen.view === "star" ? -1 : 1;
  for (let n = 0; n < values.length; n++) {
    const v = sign * values[n];
    let alpha = v <= 0 ? 46 : 0;
    if (chosen.view === "growth") alpha = Math.max(0, Math.min(8, Math.ceil(-2 * values[n]))) * 22;
    image.data.set([colour >> 16, (colour >> 8) & 255, colour & 255, alpha], 4 * n);
  }
  brush.putImageData(image, 0, 0);
  pen.drawImage(small, -cell / 2, -cell / 2, columns * cell, rows * cell);
}

// The line where the level is 0, by marching squares.
function contour(pen, { values, columns, rows, cell }, _cell, name, width) {
  pen.beginPath();
  for (let i = 0; i + 1 < rows; i++) {
    for (let j = 0; j + 1 < columns; j++) {
      const n = i * columns + j;
      const corners = [values[n], values[n + 1], values[n + columns + 1], values[n + columns]];
      if (corners.every((v) => v <= 0) || corners.every((v) => v > 0)) continue;
      cut(pen, corners, j, i, cell);
    }
  }
  pen.strokeStyle = colourOf(name);
  pen.lineWidth = width;
  pen.stroke();
}

const EDGES = [[0, 0, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 0, 0]]; // of a cell, from corner to corner

function cut(pen, corners, j, i, cell) {
  const points = [];
  EDGES.forEach(([x0, y0, x1, y1], e) => {
    const [v, w] = [corners[e], corners[(e + 1) % 4]];
    if ((v <= 0) === (w <= 0)) return;
    const share = Math.min(1, Math.max(0, v / (v - w)));
    points.push([(j + x0 + share * (x1 - x0)) * cell, (i + y0 + share * (y1 - y0)) * cell]);
  });
  for (let k = 0; k + 1 < points.length; k += 2) {
    pen.moveTo(...points[k]);
    pen.lineTo(...points[k + 1]);
  }
}

function niceStep(span, parts) {
  const raw = span / parts;
  const power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 5, 10].find((m) => m * power >= raw);
}

function drawAxes(pen, width, height) {
  const step = niceStep(width / camera.unit, Math.max(3, width / 90));
  const [left, top] = toPlane(0, 0, width, height);
  const [right, bottom] = toPlane(width, height, width, height);
  const [x0, y0] = toPixel(0, 0, width, height);
  pen.strokeStyle = css("--line");
  pen.fillStyle = css("--soft");
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(0, y0); pen.lineTo(width, y0);
  pen.moveTo(x0, 0); pen.lineTo(x0, height);
  pen.stroke();
  const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
  pen.textAlign = "center";
  for (let k = Math.ceil(left / step); k * step <= right; k++) {
    const [px] = toPixel(k * step, 0, width, height);
    if (k !== 0) pen.fillText(short(k * step), px, clamp(y0 + 16, 16, height - 4));
  }
  pen.textAlign = "left";
  for (let k = Math.ceil(bottom / step); k * step <= top; k++) {
    const [, py] = toPixel(0, k * step, width, height);
    if (k !== 0) pen.fillText(`${short(k * step)}i`, clamp(x0 + 5, 2, width - 40), py + 4);
  }
  pen.fillText("Re ηλ", width - 44, clamp(y0 - 6, 14, height - 6));
  pen.fillText("Im ηλ", clamp(x0 + 6, 2, width - 44), 14);
}

function depthColour(n, count) {
  const dark = document.documentElement.dataset.dark === "1";
  return `hsl(${count < 2 ? 215 : 215 + 130 * (n / (count - 1))} 65% ${dark ? 68 : 38}%)`;
}

// Dots where a step does not amplify, crosses where it does; one path for each colour.
function drawModes(pen, width, height) {
  const blocks = shownBlocks();
  const m = method();
  const many = blocks.reduce((sum, b) => sum + b.re.length, 0);
  const r = many > 1000 ? 2 : many > 200 ? 2.6 : 4;
  const crosses = new Path2D();
  let amplified = 0;
  blocks.forEach((block, n) => {
    const eta = stepOf(block);
    const { re, im } = counted(block);
    const dots = new Path2D();
    for (let i = 0; i < re.length; i++) {
      const [x, y] = [eta * re[i], eta * im[i]];
      const [px, py] = toPixel(x, y, width, height);
      const inside = growth(m, x, y) <= STABLE;
      if (!inside) amplified += 1;
      if (px < -9 || py < -9 || px > width + 9 || py > height + 9) continue;
      if (inside) {
        dots.moveTo(px + r, py);
        dots.arc(px, py, r, 0, 7);
      } else {
        crosses.moveTo(px - r - 1, py - r - 1); crosses.lineTo(px + r + 1, py + r + 1);
        crosses.moveTo(px - r - 1, py + r + 1); crosses.lineTo(px + r + 1, py - r - 1);
      }
    }
    pen.fillStyle = depthColour(chosen.block < 0 ? n : 0, blocks.length);
    pen.fill(dots);
  });
  pen.strokeStyle = css("--bad");
  pen.lineWidth = many > 1000 ? 1.2 : 2;
  pen.stroke(crosses);
  return { many, amplified };
}

function drawChosen(pen, width, height) {
  const mode = chosenMode();
  if (!mode) return;
  const [px, py] = toPixel(mode.eta * mode.re, mode.eta * mode.im, width, height);
  pen.strokeStyle = css("--ink");
  pen.lineWidth = 2;
  pen.beginPath();
  pen.arc(px, py, 10, 0, 7);
  pen.stroke();
}

function chosenMode() {
  const block = chosen.mode && data.blocks[chosen.mode.block];
  if (!block) return null;
  const { re, im } = counted(block);
  return { re: re[chosen.mode.index], im: im[chosen.mode.index], eta: stepOf(block), block };
}

// --- texts -----------------------------------------------------------------------------------------------------

function say(id, text, kind = "") {
  if (at(id).textContent !== text) at(id).textContent = text;
  at(id).className = kind;
}

function verdict(count) {
  const blocks = shownBlocks();
  if (!blocks.length) return say("verdict", "No eigenvalues: type some below.");
  const found = blocks.map((b) => limitsOf(chosen.method, data.blocks.indexOf(b)));
  const over = blocks.filter((b, n) => stepOf(b) > found[n].decaying * (1 + 1e-12)).length;
  const growing = found.reduce((sum, f) => sum + f.growing, 0);
  const parts = [];
  const least = Math.min(...blocks.map((b, n) => found[n].decaying / b.step));
  const unit = oneStep() ? least * blocks[0].step : least;
  parts.push(over ? `${chosen.method}: over the limit ${blocks.length > 1 ? `in ${over} of ${blocks.length}` : ""}`.trim()
    : `${chosen.method}: within the limit`);
  parts.push(`${oneStep() ? "η ≤" : "scale ≤"} ${short(unit, 6)}${growing ? " for decaying modes" : ""}`);
  if (growing) parts.push(`${growing} grow${growing > 1 ? "" : "s"} with the equation itself`);
  parts.push(`|R| > 1 for ${count.amplified} of ${count.many} here`);
  return say("verdict", parts.join(" · "), over ? "bad" : "good");
}

function rowOf(cells, kind = "td") {
  const row = document.createElement("tr");
  for (const cell of cells) {
    const place = document.createElement(kind);
    place.textContent = cell;
    row.append(place);
  }
  return row;
}

// The table of limits: built for a method, then only its last column changes with η.
function tableOfLimits() {
  at("limits").tBodies[0].replaceChildren(...data.blocks.map((block, n) => {
    const found = limitsOf(chosen.method, n);
    const row = rowOf([block.name, block.re.length, "", short(found.step, 6), found.growing, short(found.decaying, 6), ""]);
    Object.assign(row.dataset, { step: found.step, decaying: found.decaying, growing: found.growing });
    row.addEventListener("click", () => choose("block", String(n)));
    return row;
  }));
}

function statesOfLimits() {
  [...at("limits").tBodies[0].rows].forEach((row, n) => {
    const eta = stepOf(data.blocks[n]);
    const within = eta <= Number(row.dataset.decaying) * (1 + 1e-12);
    row.cells[2].textContent = short(eta);
    row.cells[6].textContent = !within ? "over" : Number(row.dataset.growing) ? "within, but for growing modes" : "within";
    row.cells[6].className = within ? "good" : "bad";
    row.setAttribute("aria-selected", String(n === chosen.block));
  });
}

function tableOfMode() {
  const mode = chosenMode();
  const body = at("chosen").tBodies[0];
  if (!mode) return body.replaceChildren(rowOf(["Choose one in the plane, or with ← and →.", ""], "th"));
  const [x, y] = [mode.eta * mode.re, mode.eta * mode.im];
  const [re, im] = factor(method(), x, y);
  const size = growth(method(), x, y);
  const exit = firstExit(method(), mode.re, mode.im);
  const rows = [
    ["of", mode.block.name], ["λ", complexText(mode.re, mode.im)], ["ηλ", complexText(x, y)],
    ["R(ηλ)", complexText(re, im)], ["growth per step |R|", short(size, 6)], ["the flow's, |e^ηλ|", short(Math.exp(x), 6)],
    [`over ${chosen.depth} steps`, short(size ** chosen.depth)], ["the flow's", short(Math.exp(x * chosen.depth))],
    ["leaves the region at η =", short(exit, 6)],
  ];
  return body.replaceChildren(...rows.map(([name, value]) => {
    const row = rowOf([name], "th");
    row.append(rowOf([value]).firstChild);
    return row;
  }));
}

function legend() {
  at("legend").replaceChildren(...(chosen.view === "region" ? drawn() : [chosen.method]).map((name) => {
    const key = document.createElement("span");
    key.className = "key";
    const line = document.createElement("i");
    line.style.background = colourOf(name);
    key.append(line, name);
    return key;
  }));
}

// --- the small pictures ----------------------------------------------------------------------------------------

function chart(id, xs, lines, { marks = [], ground = null, bottom = null, top = null, labels = ["", ""] } = {}) {
  const { pen, width, height } = sized(at(id));
  const all = lines.flatMap((l) => l.y).filter(Number.isFinite);
  const low = bottom ?? Math.min(...all, ground ?? Infinity);
  const high = Math.max(top ?? Math.max(...all, ground ?? -Infinity), low + 1e-9);
  const box = { left: 46, right: width - 10, top: 24, bottom: height - 24 };
  const px = (x) => box.left + (x - xs[0]) / (xs[1] - xs[0]) * (box.right - box.left);
  const py = (y) => box.bottom - (y - low) / (high - low) * (box.bottom - box.top);
  pen.fillStyle = css("--soft");
  pen.strokeStyle = css("--line");
  pen.lineWidth = 1;
  const step = niceStep(high - low, 4);
  pen.textAlign = "right";
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) {
    pen.beginPath(); pen.moveTo(box.left, py(k * step)); pen.lineTo(box.right, py(k * step)); pen.stroke();
    pen.fillText(short(k * step), box.left - 5, py(k * step) + 4);
  }
  pen.textAlign = "center";
  const across = niceStep(Math.abs(xs[1] - xs[0]), 5);
  for (let k = Math.ceil(Math.min(...xs) / across); k * across <= Math.max(...xs) + 1e-9; k++) pen.fillText(short(k * across), px(k * across), height - 8);
  pen.textAlign = "left"; pen.fillText(labels[1], 2, 12);
  pen.textAlign = "right"; pen.fillText(labels[0], width - 4, 12);
  pen.save();
  pen.beginPath(); pen.rect(box.left - 6, box.top - 8, box.right - box.left + 12, box.bottom - box.top + 16); pen.clip();
  for (const line of lines) polyline(pen, line, px, py);
  for (const [x, y, colour] of marks) {
    pen.fillStyle = colour; pen.beginPath(); pen.arc(px(x), py(y), 4, 0, 7); pen.fill();
  }
  pen.restore();
}

function polyline(pen, { x, y, colour, dash = [], dots = false, width = 2 }, px, py) {
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = width;
  pen.setLineDash(dash);
  pen.beginPath();
  x.forEach((v, n) => (Number.isFinite(y[n]) ? pen.lineTo(px(v), py(y[n])) : null));
  pen.stroke();
  pen.setLineDash([]);
  if (dots) x.forEach((v, n) => { pen.beginPath(); pen.arc(px(v), py(y[n]), 3, 0, 7); pen.fill(); });
}

function drawDepth() {
  const mode = chosenMode();
  if (!mode) return void sized(at("over-depth"));
  const [x, y] = [mode.eta * mode.re, mode.eta * mode.im];
  const rate = Math.log10(Math.max(growth(method(), x, y), 1e-30));
  const n = Array.from({ length: chosen.depth + 1 }, (_, k) => k);
  chart("over-depth", [0, chosen.depth], [
    { x: n, y: n.map((k) => k * x / Math.LN10), colour: css("--flow"), dash: [5, 4] },
    { x: n, y: n.map((k) => k * rate), colour: colourOf(chosen.method) },
  ], { ground: 0, labels: ["step →", "log₁₀ of the mode; the flow dashed"] });
}

function drawAlongAxes() {
  const m = method();
  const most = Math.min(60, 1.25 * Math.max(2.5, ...drawn().map((n) => Math.max(
    methods.get(n).real ?? 8, methods.get(n).imaginary ?? 4))));
  const xs = Array.from({ length: 400 }, (_, n) => -most + n * 2 * most / 399);
  const lines = drawn().map((name) => ({
    x: xs, y: xs.map((x) => growth(methods.get(name), x < 0 ? x : 0, x < 0 ? 0 : x)), colour: colourOf(name),
  }));
  lines.unshift({ x: xs, y: xs.map((x) => (x < 0 ? Math.exp(x) : 1)), colour: css("--flow"), dash: [5, 4] });
  const mode = chosenMode();
  const marks = [];
  if (mode && (mode.re === 0 || (mode.im === 0 && mode.re < 0))) {
    const x = mode.im === 0 ? mode.eta * mode.re : Math.abs(mode.eta * mode.im);
    if (Math.abs(x) <= most) marks.push([x, Math.min(2, growth(m, mode.im === 0 ? x : 0, mode.im === 0 ? 0 : x)), css("--ink")]);
  }
  chart("axes", [-most, most], lines, { bottom: 0, top: 2, marks, labels: ["← real · imaginary →", "|R|; |e^z| dashed"] });
}

function drawPath() {
  const field = FIELDS[chosen.field];
  const mode = chosenMode();
  if (!field.f && !mode) {
    sized(at("path"));
    return say("fate", "Choose an eigenvalue, or another field.");
  }
  const eta = mode ? mode.eta : chosen.scale * (data.blocks[0] ? data.blocks[0].step : 1);
  const m = method();
  const steps = field.f ? 600 : 60;
  const path = field.f ? pathOf(m, field.f, chosen.start.slice(0, field.start.length), eta, steps)
    : linearPath(m, mode.re, mode.im, chosen.start, eta, steps);
  const fate = field.f ? fateOf(path) : linearFate(m, mode.re, mode.im, eta);
  const dimension = path[0].length;
  at("second").hidden = dimension < 2;
  const seen = path.slice(0, dimension < 2 ? 41 : 81);
  const flow = flowOf(field, mode, dimension, eta * (seen.length - 1));
  if (dimension < 2) drawSeries(seen, flow, eta, field);
  else drawPlanar(seen, flow, field);
  at("fate").dataset.fate = fate;
  return say("fate", `${chosen.method}, η = ${short(eta)}: ${fate}.`, fate === "diverges" ? "bad" : "");
}

// The exact flow, or one of 2,000 small steps.
function flowOf(field, mode, dimension, time) {
  const count = 2000;
  const h = time / count;
  if (field.f) return pathOf(methods.get("rk4"), field.f, chosen.start.slice(0, dimension), h, count);
  return Array.from({ length: count + 1 }, (_, n) => {
    const [size, angle] = [Math.exp(mode.re * n * h), mode.im * n * h];
    const [x, y = 0] = chosen.start;
    if (dimension < 2) return [size * x];
    return [size * (x * Math.cos(angle) - y * Math.sin(angle)), size * (x * Math.sin(angle) + y * Math.cos(angle))];
  });
}

function drawSeries(seen, flow, eta, field) {
  const end = eta * (seen.length - 1);
  const start = Math.abs(seen[0][0]) || 1e-9;
  const edge = 1.3 * Math.max(start, Math.min(4 * start, Math.max(...flow.map(([v]) => Math.abs(v)))));
  const [low, high] = field.reach || [-edge, edge];
  chart("path", [0, end || 1], [
    { x: flow.map((_, n) => n * end / (flow.length - 1)), y: flow.map(([v]) => v), colour: css("--flow"), dash: [5, 4] },
    { x: seen.map((_, n) => n * eta), y: seen.map(([v]) => Math.max(-1e4, Math.min(1e4, v))), colour: colourOf(chosen.method), dots: true, width: 1 },
  ], { bottom: low, top: high, labels: ["t →", "x; the flow dashed"] });
}

function drawPlanar(seen, flow, field) {
  const start = Math.max(...seen[0].map(Math.abs)) || 1e-9;
  const edge = 1.15 * Math.max(start, Math.min(6 * start, Math.max(...flow.flat().map(Math.abs))));
  const [low, high] = field.reach || [-edge, edge];
  const { clientWidth: w, clientHeight: h } = at("path");
  const wide = (high - low) / 2 * (w / h);
  const line = (path, rest) => ({ x: path.map(([x]) => x), y: path.map(([, y]) => Math.max(-1e4, Math.min(1e4, y))), ...rest });
  chart("path", [-wide, wide], [
    line(flow, { colour: css("--flow"), dash: [5, 4] }),
    line(seen, { colour: colourOf(chosen.method), dots: true, width: 1 }),
  ], { bottom: low, top: high, labels: ["x →", "y; the flow dashed"] });
}

function drawMethod() {
  const m = method();
  say("about", `${m.name}: order ${m.order}, ${m.stages} stage${m.stages > 1 ? "s" : ""}, ${m.explicit ? "explicit" : "implicit"}.`
    + (m.real === undefined ? "" : ` Stable on the real axis down to −${short(m.real ?? Infinity)}, on the imaginary one up to ${short(m.imaginary ?? Infinity)}.`));
  const body = at("tableau").tBodies[0];
  if (!m.aText || m.stages > 8) {
    body.replaceChildren(rowOf([m.rows ? "Its stages follow a recurrence; R is evaluated by it." : `A has ${m.stages} rows.`]));
  } else {
    const rows = m.aText.map((row, i) => rowOf([short(m.a[i].reduce((s, v) => s + v, 0)), ...row.map(told)]));
    const last = rowOf(["", ...m.bText.map(told)]);
    last.className = "weights";
    [...rows, last].forEach((row) => (row.cells[0].className = "time"));
    body.replaceChildren(...rows, last);
  }
  const part = (texts) => texts.map((c, k) => (fraction(c) === 0 ? "" : `${told(c)}${["", " z"][k] ?? ` z^${k}`}`)).filter(Boolean).join(" + ");
  say("function", m.pText ? `R(z) = ${m.qText.length > 1 ? `(${part(m.pText)}) / (${part(m.qText)})` : part(m.pText)}` : "");
}

const told = (text) => (String(text).length > 12 ? short(fraction(text), 6) : String(text));

// --- drawing ---------------------------------------------------------------------------------------------------

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

// --- controls --------------------------------------------------------------------------------------------------

const fingers = new Map();
let drag = null;

function pressed(event) {
  const plane = at("plane");
  plane.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
  if (fingers.size === 2) {
    const [a, b] = [...fingers.values()];
    drag = { pinch: Math.hypot(a[0] - b[0], a[1] - b[1]) };
    return;
  }
  const mode = nearest(event.offsetX, event.offsetY, event.pointerType === "touch" ? 24 : 12);
  if (mode) chosen.mode = mode;
  drag = mode ? { mode: true } : { from: [event.offsetX, event.offsetY] };
  redraw();
}

function moved(event) {
  if (!fingers.has(event.pointerId) || !drag) return;
  fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
  const { clientWidth: w, clientHeight: h } = at("plane");
  if (drag.pinch) {
    const [a, b] = [...fingers.values()];
    if (!b) return;
    const apart = Math.hypot(a[0] - b[0], a[1] - b[1]);
    zoom(apart / drag.pinch, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
    drag.pinch = apart;
  } else if (drag.mode) {
    const { re, im, block } = chosenMode();
    const [x, y] = toPlane(event.offsetX, event.offsetY, w, h);
    setScale((x * re + y * im) / (re * re + im * im) / block.step); // the nearest place on the eigenvalue's ray
  } else {
    camera.x -= (event.offsetX - drag.from[0]) / camera.unit;
    camera.y += (event.offsetY - drag.from[1]) / camera.unit;
    drag.from = [event.offsetX, event.offsetY];
    region = null;
    redraw();
  }
}

function released(event) {
  fingers.delete(event.pointerId);
  drag = null;
}

function keyed(event) {
  const pan = 30 / camera.unit;
  const moves = { ArrowLeft: [-pan, 0], ArrowRight: [pan, 0], ArrowUp: [0, pan], ArrowDown: [0, -pan] };
  const acts = {
    ArrowLeft: () => walk(-1), ArrowRight: () => walk(1),
    ArrowUp: () => setScale(chosen.scale * 1.02), ArrowDown: () => setScale(chosen.scale / 1.02),
    "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: fit,
  };
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in acts)) return;
  event.preventDefault();
  if (event.shiftKey && moves[event.key]) {
    camera.x += moves[event.key][0];
    camera.y += moves[event.key][1];
    region = null;
    redraw();
  } else acts[event.key]();
}

function option(value, text) {
  const item = document.createElement("option");
  item.value = value;
  item.textContent = text;
  return item;
}

function listMethods() {
  at("method").replaceChildren(...[...methods.keys()].map((name) => option(name, name)));
  at("method").value = chosen.method;
  const boxes = [...methods.keys()].map((name) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = chosen.compared.has(name);
    box.addEventListener("change", () => {
      chosen.compared[box.checked ? "add" : "delete"](name);
      changeMethod();
    });
    label.append(box, name);
    return label;
  });
  at("compare").replaceChildren(at("compare").firstElementChild, ...boxes);
}

function listBlocks() {
  const names = data.blocks.map((block, n) => option(String(n), `${block.name} (${block.re.length})`));
  at("block").replaceChildren(option("-1", data.blocks.length === 1 ? "all" : `all ${data.blocks.length}`), ...names);
  at("block").value = String(chosen.block);
}

function ownMethod() {
  const a = at("own-a").value.trim().split("\n").map((row) => row.trim().split(/[\s,]+/).map(fraction));
  const b = at("own-b").value.trim().split(/[\s,]+/).map(fraction);
  const sum = b.reduce((s, v) => s + v, 0);
  if (![...a.flat(), ...b].every(Number.isFinite)) return say("own-error", "Numbers and fractions such as 1/6 only.");
  if (a.length !== b.length || a.some((row) => row.length !== b.length)) {
    return say("own-error", `A must have ${b.length} rows of ${b.length} numbers, as b has.`);
  }
  if (b.length > 16) return say("own-error", "At most 16 stages.");
  if (Math.abs(sum - 1) > 1e-12) return say("own-error", `b must sum to 1, and sums to ${short(sum)}.`);
  const found = coefficientsOf(a, b);
  methods.set("own", {
    name: "own", order: orderOf(found), stages: b.length, explicit: a.every((row, i) => row.slice(i).every((v) => v === 0)),
    a, b, aText: a, bText: b, ...found, pText: found.p, qText: found.q,
  });
  limits = new Map([...limits].filter(([key]) => !key.startsWith("own\n")));
  say("own-error", "");
  chosen.method = "own";
  listMethods();
  return changeMethod();
}

// Up to which power R is e^z.
function orderOf({ p, q }) {
  let order = 0;
  for (let k = 0, factorial = [1]; k <= 12; k++, factorial.push(factorial[k - 1] * k)) {
    const wanted = q.slice(0, k + 1).reduce((sum, c, j) => sum + c / factorial[k - j], 0);
    if (Math.abs(wanted - (p[k] || 0)) > 1e-10) break;
    order = k;
  }
  return order;
}

function typedModes() {
  const plain = at("typed").value.replaceAll("−", "-").split(/[\s,;]+(?![+-]?\s*\d*\.?\d*i\b)/).map((t) => t.replaceAll(" ", "")).filter(Boolean);
  const number = "(?:\\d+\\.?\\d*|\\.\\d+)(?:e[+-]?\\d+)?";
  const pattern = new RegExp(`^([+-]?${number}(?![\\d.]*i))?(?:([+-]?)(${number})?i)?$`);
  const found = [];
  for (const text of plain) {
    const parts = pattern.exec(text);
    if (!parts) return say("typed-error", `“${text}” is no number such as −0.5+3i.`);
    const imaginary = text.endsWith("i") ? Number(`${parts[2]}${parts[3] ?? 1}`) : 0;
    found.push([Number(parts[1] ?? 0), imaginary]);
  }
  if (!found.length) return say("typed-error", "Type at least one.");
  say("typed-error", "");
  const block = { name: "typed", step: 1, re: found.map(([x]) => x), im: found.map(([, y]) => y) };
  const place = data.blocks.findIndex((b) => b.typed);
  block.typed = true;
  if (place < 0) data.blocks.push(block);
  else data.blocks[place] = block;
  limits = new Map();
  listBlocks();
  tableOfLimits();
  return choose("block", String(data.blocks.indexOf(block)));
}

function setField(name) {
  chosen.field = name;
  chosen.start = FIELDS[name].start.slice();
  at("start").value = chosen.start[0];
  at("start-y").value = chosen.start[1] ?? "";
  redraw();
}

function theme(name) {
  const dark = name ? name === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (name) document.documentElement.dataset.theme = name;
  document.documentElement.dataset.dark = dark ? "1" : "0";
  redraw();
}

function connect() {
  const plane = at("plane");
  plane.addEventListener("pointerdown", pressed);
  plane.addEventListener("pointermove", moved);
  plane.addEventListener("pointerup", released);
  plane.addEventListener("pointercancel", released);
  plane.addEventListener("keydown", keyed);
  plane.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
  }, { passive: false });
  for (const what of ["method", "block", "view"]) at(what).addEventListener("change", () => choose(what, at(what).value));
  at("eta").addEventListener("input", () => setScale(10 ** Number(at("eta").value)));
  at("eta-value").addEventListener("input", () => setScale(Number(at("eta-value").value) / (oneStep() && data.blocks.length ? data.blocks[0].step : 1)));
  at("to-limit").addEventListener("click", () => {
    const least = Math.min(...shownBlocks().map((b) => limitsOf(chosen.method, data.blocks.indexOf(b)).decaying / b.step));
    setScale(least);
  });
  at("closer").addEventListener("click", () => zoom(1.25));
  at("further").addEventListener("click", () => zoom(0.8));
  at("fit").addEventListener("click", fit);
  at("previous").addEventListener("click", () => walk(-1));
  at("next").addEventListener("click", () => walk(1));
  at("field").addEventListener("change", () => setField(at("field").value));
  at("start").addEventListener("input", () => { chosen.start[0] = Number(at("start").value); redraw(); });
  at("start-y").addEventListener("input", () => { chosen.start[1] = Number(at("start-y").value); redraw(); });
  at("depth").addEventListener("input", () => {
    chosen.depth = Math.min(1000, Math.max(1, Math.round(Number(at("depth").value) || 1)));
    redraw();
  });
  at("own-use").addEventListener("click", ownMethod);
  at("typed-use").addEventListener("click", typedModes);
  at("theme").addEventListener("click", () => theme(document.documentElement.dataset.dark === "1" ? "light" : "dark"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(document.documentElement.dataset.theme));
  new ResizeObserver(() => { region = null; redraw(); }).observe(plane);
}

function begin() {
  at("title").textContent = data.title;
  at("source").textContent = data.source;
  at("depth").value = chosen.depth;
  at("field").replaceChildren(...Object.entries(FIELDS).map(([name, { label }]) => option(name, label)));
  listMethods();
  listBlocks();
  setField("linear");
  if (data.blocks.length) {
    const tightest = data.blocks.map((_, n) => limitsOf(chosen.method, n).decaying / data.blocks[n].step);
    const block = tightest.indexOf(Math.min(...tightest));
    chosen.mode = { block, index: Math.max(0, limitsOf(chosen.method, block).worst) };
  }
  connect();
  changeMethod();
  fit();
  theme(new URLSearchParams(location.hash.slice(1)).get("theme"));
}

begin();
