"use strict";
// Steps of a method on small fields: by its recurrence, its triangle, or Newton's method for its stages.

const FIELDS = {
  linear: { label: "x′ = λx, λ the chosen eigenvalue", start: [1, 0.3] },
  logistic: { label: "logistic, x′ = x(1 − x)", start: [0.1], f: ([x]) => [x * (1 - x)], reach: [-0.4, 1.8] },
  cubic: { label: "two wells, x′ = x − x³", start: [0.2], f: ([x]) => [x - x ** 3], reach: [-1.8, 1.8] },
  layer: { label: "a layer, x′ = −tanh 3x", start: [1.5], f: ([x]) => [-Math.tanh(3 * x)], reach: [-2, 2] },
  pendulum: {
    label: "damped pendulum (plane)", start: [2, 0],
    f: ([x, v]) => [v, -Math.sin(x) - 0.2 * v], reach: [-3.4, 3.4],
  },
  oscillator: {
    label: "Van der Pol (plane)", start: [0.5, 0],
    f: ([x, v]) => [v, (1 - x * x) * v - x], reach: [-3.4, 3.4],
  },
};

const FAR = 1e6; // |x| from which a path counts as gone

const plus = (x, scale, k) => x.map((value, i) => value + scale * k[i]);

function stepExplicit(method, f, x, eta) {
  const slopes = [];
  for (const row of method.a) {
    slopes.push(f(row.reduce((state, c, j) => (c && slopes[j] ? plus(state, eta * c, slopes[j]) : state), x)));
  }
  return method.b.reduce((state, c, i) => plus(state, eta * c, slopes[i]), x);
}

function stepRecurrence(method, f, x, eta) {
  const zero = x.map(() => 0);
  const start = f(x);
  let before = zero;
  let d = zero;
  let end = x;
  method.rows.forEach(([mu, nu, slope, atStart], j) => {
    const k = f(plus(x, 1, d));
    const next = d.map((v, i) => mu * v + nu * before[i] + eta * (slope * k[i] + atStart * start[i]));
    [before, d] = [d, next];
    end = plus(end, method.weights[j], d);
  });
  return end;
}

function jacobian(f, x) {
  const h = 1e-6;
  const columns = x.map((_, j) => {
    const up = f(x.map((v, i) => (i === j ? v + h : v)));
    const down = f(x.map((v, i) => (i === j ? v - h : v)));
    return up.map((v, i) => (v - down[i]) / (2 * h));
  });
  return x.map((_, i) => columns.map((column) => column[i]));
}

function solved(matrix, right) {
  const n = right.length;
  const rows = matrix.map((row, i) => [...row, right[i]]);
  for (let k = 0; k < n; k++) {
    let best = k;
    for (let i = k + 1; i < n; i++) if (Math.abs(rows[i][k]) > Math.abs(rows[best][k])) best = i;
    [rows[k], rows[best]] = [rows[best], rows[k]];
    for (let i = k + 1; i < n; i++) {
      const share = rows[i][k] / rows[k][k];
      for (let j = k; j <= n; j++) rows[i][j] -= share * rows[k][j];
    }
  }
  const x = new Array(n).fill(0);
  for (let i = n - 1; i >= 0; i--) {
    x[i] = rows[i][n];
    for (let j = i + 1; j < n; j++) x[i] -= rows[i][j] * x[j];
    x[i] /= rows[i][i];
  }
  return x;
}

// Newton's method for all stages k_i = f(x + η Σ a_ij k_j) at once; NaN where it does not converge.
function stepImplicit(method, f, x, eta) {
  const { a, b } = method;
  const d = x.length;
  let k = a.map(() => f(x));
  for (let n = 0; n < 30; n++) {
    const places = a.map((row) => row.reduce((state, c, j) => plus(state, eta * c, k[j]), x));
    const rest = places.flatMap((place, i) => f(place).map((v, m) => v - k[i][m]));
    const local = places.map((place) => jacobian(f, place));
    const matrix = rest.map((_, row) => rest.map((__, column) => {
      const [i, m, j, l] = [Math.floor(row / d), row % d, Math.floor(column / d), column % d];
      return (row === column ? 1 : 0) - eta * a[i][j] * local[i][m][l];
    }));
    const change = solved(matrix, rest);
    k = k.map((slope, i) => slope.map((v, m) => v + change[i * d + m]));
    const size = Math.max(...k.flat().map(Math.abs));
    if (Math.max(...change.map(Math.abs)) <= 1e-12 * (1 + size)) {
      return b.reduce((state, c, i) => plus(state, eta * c, k[i]), x);
    }
  }
  return x.map(() => NaN);
}

function stepped(method, f, x, eta) {
  if (method.rows) return stepRecurrence(method, f, x, eta);
  return method.explicit ? stepExplicit(method, f, x, eta) : stepImplicit(method, f, x, eta);
}

// The states x_0 … x_n of a nonlinear field; it ends early where one is gone.
function pathOf(method, f, start, eta, steps) {
  const path = [start];
  for (let n = 0; n < steps; n++) {
    const x = stepped(method, f, path[n], eta);
    path.push(x);
    if (!x.every((v) => Math.abs(v) < FAR)) break;
  }
  return path;
}

// x_n = R^n x_0 of x′ = λx; in the plane where R or λ is complex.
function linearPath(method, re, im, start, eta, steps) {
  const [a, b] = factor(method, eta * re, eta * im);
  const path = [im === 0 ? [start[0]] : start.slice()];
  for (let n = 0; n < steps; n++) {
    const [x, y = 0] = path[n];
    const next = im === 0 ? [a * x] : [a * x - b * y, a * y + b * x];
    path.push(next);
    if (!next.every((v) => Math.abs(v) < FAR)) break;
  }
  return path;
}

function linearFate(method, re, im, eta) {
  const [a, b] = factor(method, eta * re, eta * im);
  const size = growth(method, eta * re, eta * im);
  if (size > STABLE) return "diverges";
  if (size > 1 - 1e-12) return "stays at its distance";
  return Math.abs(b) < 1e-12 && a < 0 ? "flips, and converges" : "converges";
}

// What a long path does: its end tells.
function fateOf(path) {
  const last = path[path.length - 1];
  if (!last.every((v) => Math.abs(v) < FAR)) return "diverges";
  const moves = path.slice(1).map((x, n) => x.map((v, i) => v - path[n][i]));
  const tail = moves.slice(-60);
  const size = Math.max(...tail.slice(-10).flat().map(Math.abs));
  const flips = (some) => some.slice(1).every((m, n) => m.reduce((sum, v, i) => sum + v * some[n][i], 0) < 0);
  if (size < 1e-6) {
    const seen = moves.filter((m) => Math.max(...m.map(Math.abs)) > 1e-9).slice(-6);
    return seen.length > 3 && flips(seen) ? "flips, and converges" : "converges";
  }
  for (const period of [2, 4, 8]) {
    const [end, earlier] = [path[path.length - 1], path[path.length - 1 - period]];
    if (earlier && end.every((v, i) => Math.abs(v - earlier[i]) < 1e-6 * (1 + Math.abs(v)))) {
      return `cycles, with ${period} steps`;
    }
  }
  return "keeps moving";
}
