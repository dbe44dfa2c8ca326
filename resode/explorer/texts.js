"use strict";
// What the page says in words and tables.

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
