"use strict";
// The small pictures: growth over the depth and along the axes, a field stepped, the tableau.

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
