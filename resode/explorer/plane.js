"use strict";
// The complex plane: regions, their edges, and the eigenvalues times the step.

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
