"use strict";
// Controls: pointers, keys, lists, what is typed; and the start of the page.

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
  const texts = at("typed").value.replaceAll("−", "-").split(/[,;\n]+/).map((t) => t.replaceAll(/\s/g, "")).filter(Boolean);
  const number = "(?:\\d+\\.?\\d*|\\.\\d+)(?:e[+-]?\\d+)?";
  const pattern = new RegExp(`^([+-]?${number}(?![\\d.]*i))?(?:([+-]?)(${number})?i)?$`);
  const found = [];
  for (const text of texts) {
    const parts = pattern.exec(text);
    if (!parts) return say("typed-error", `“${text}” is no number such as −0.5+3i; commas between them.`);
    const imaginary = text.endsWith("i") ? Number(`${parts[2] ?? ""}${parts[3] ?? 1}`) : 0;
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
