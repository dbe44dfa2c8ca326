"use strict";
// R(z) of a method, the step at which an eigenvalue leaves the region, and what several of them allow.
// A method holds p and q, R = p/q with the lowest degree first, or `rows`: the recurrence of a method of many
// stages, whose polynomial would cancel.

const EPS = 2 ** -52;
const NEAR = 0.5; // |z| below which |R|² − 1 comes from its series: values would cancel there
const TERMS = 10; // of that series, for a recurrence
const STABLE = 1 + 1e-12; // |R| up to which a mode counts as not growing

function horner(coefficients, x, y) {
  let re = 0;
  let im = 0;
  for (let k = coefficients.length - 1; k >= 0; k--) {
    const t = re * x - im * y + coefficients[k];
    im = re * y + im * x;
    re = t;
  }
  return [re, im];
}

function recurrence(method, x, y) {
  let before = [0, 0];
  let d = [0, 0];
  let re = 1;
  let im = 0;
  for (let j = 0; j < method.rows.length; j++) {
    const [mu, nu, slope, start] = method.rows[j];
    const a = slope * (1 + d[0]) + start;
    const b = slope * d[1];
    const next = [mu * d[0] + nu * before[0] + x * a - y * b, mu * d[1] + nu * before[1] + x * b + y * a];
    before = d;
    d = next;
    re += method.weights[j] * d[0];
    im += method.weights[j] * d[1];
  }
  return [re, im];
}

// R(x + iy) as [re, im].
function factor(method, x, y) {
  if (method.rows) return recurrence(method, x, y);
  const [a, b] = horner(method.p, x, y);
  if (method.q.length === 1) return [a, b];
  const [c, d] = horner(method.q, x, y);
  const size = c * c + d * d;
  return [(a * c + b * d) / size, (b * c - a * d) / size];
}

function growth(method, x, y) {
  const [re, im] = factor(method, x, y);
  const size = Math.hypot(re, im);
  return Number.isNaN(size) ? Infinity : size; // overflow, or a pole
}

// (|R|² − 1)|q|², less what rounding explains: positive where a step amplifies.
function excess(method, x, y) {
  const slack = 16 * (method.stages + 4) * EPS;
  if (method.rows || method.q.length === 1) return growth(method, x, y) ** 2 - 1 - slack;
  const [a, b] = horner(method.p, x, y);
  const [c, d] = horner(method.q, x, y);
  const size = c * c + d * d;
  return (a * a + b * b - size - slack * size) / Math.max(size, 1e-300);
}

// Coefficients of r in |p|² − |q|² along the ray r·u, |u| = 1: Σ p_i p_j Re u^(i−j) for i + j = k. What cancels
// to rounding is 0, and its sign decides nothing.
function raySeries(p, q, ux, uy) {
  const degree = Math.max(p.length, q.length) - 1;
  const cosines = [1];
  let power = [1, 0];
  for (let m = 1; m <= degree; m++) {
    power = [power[0] * ux - power[1] * uy, power[0] * uy + power[1] * ux];
    cosines.push(power[0]);
  }
  const series = [];
  for (let k = 0; k <= 2 * degree; k++) {
    let sum = 0;
    let mass = 0;
    for (let i = Math.max(0, k - degree); i <= Math.min(k, degree); i++) {
      const c = cosines[Math.abs(2 * i - k)];
      const first = (p[i] || 0) * (p[k - i] || 0) * c;
      const second = (q[i] || 0) * (q[k - i] || 0) * c;
      sum += first - second;
      mass += Math.abs(first) + Math.abs(second);
    }
    series.push(Math.abs(sum) <= 8 * EPS * mass ? 0 : sum);
  }
  return series;
}

// The first coefficients of R of a recurrence, those up to the order as the order demands them.
function recurrenceSeries(method) {
  let before = new Array(TERMS + 1).fill(0);
  let d = before;
  const total = before.slice();
  for (let j = 0; j < method.rows.length; j++) {
    const [mu, nu, slope, start] = method.rows[j];
    const last = [d, before];
    const next = last[0].map((c, k) => mu * c + nu * last[1][k] + (k ? slope * last[0][k - 1] : 0));
    next[1] += slope + start;
    before = d;
    d = next;
    next.forEach((c, k) => (total[k] += method.weights[j] * c));
  }
  let known = 1;
  for (let k = 0; k <= Math.min(method.order, TERMS); k++) {
    total[k] = known;
    known /= k + 1;
  }
  return total;
}

// A radius beyond which |R| > 1 for good on every ray of an explicit method; for an implicit one, beyond which
// |p|² − |q|² keeps its sign (1000 where its degree is not full: nothing is sought further out).
function reachOf(method) {
  const explicit = method.q.length === 1;
  const sizes = explicit ? method.p.map(Math.abs) : bounds(method);
  const top = sizes.length - 1;
  if (!(sizes[top] > 0) || top === 0) return 1000;
  const outside = (r) => {
    let rest = explicit ? r ** -top : 0;
    for (let k = 0; k < top; k++) rest += sizes[k] * r ** (k - top);
    return rest <= sizes[top];
  };
  let r = 1;
  while (!outside(r) && r < 1e8) r *= 1.25;
  return r;
}

// For an implicit method: bounds of the coefficients of |p|² − |q|², the last one that of |p_n² − q_n²|.
function bounds(method) {
  const { p, q } = method;
  const degree = Math.max(p.length, q.length) - 1;
  const sizes = new Array(2 * degree + 1).fill(0);
  for (let i = 0; i <= degree; i++) {
    for (let j = 0; j <= degree; j++) {
      sizes[i + j] += Math.abs((p[i] || 0) * (p[j] || 0)) + Math.abs((q[i] || 0) * (q[j] || 0));
    }
  }
  sizes[2 * degree] = Math.abs((p[degree] || 0) ** 2 - (q[degree] || 0) ** 2);
  return sizes;
}

function prepared(method) {
  if (!method.reach) method.reach = reachOf(method);
  if (!method.series) method.series = method.rows ? recurrenceSeries(method) : method.p;
  return method;
}

// sup{h : |R(sλ)| ≤ 1 for all 0 ≤ s ≤ h}, λ = x + iy; or `most` where it is no less than that.
function firstExit(method, x, y, most = Infinity) {
  const size = Math.hypot(x, y);
  if (size === 0 || (x <= 0 && method.aStable)) return most;
  if (x > 0) return 0; // R = 1 + z + …: it grows at every small step
  const m = prepared(method);
  const ux = x / size;
  const uy = Math.abs(y) / size;
  const series = raySeries(m.series, m.rows ? [1] : m.q, ux, uy);
  const value = (r) => {
    if (r >= NEAR / (m.rows ? 10 : 1)) return excess(m, r * ux, r * uy);
    let sum = 0;
    for (let k = Math.min(series.length - 1, m.rows ? TERMS : Infinity); k >= 1; k--) sum = (sum + series[k]) * r;
    return sum;
  };
  const leading = series.findIndex((c, k) => k > 0 && c !== 0);
  if (leading > 0 && series[leading] > 0) return 0;
  const end = Math.min(m.reach, most * size);
  const exit = crossing(value, radii(m, end));
  return exit === null ? most : Math.min(most, exit / size);
}

// Where to look along a ray: in ratio near 0, then evenly.
function radii(method, end) {
  const places = [];
  const near = Math.min(NEAR, end);
  for (let e = -17; e < 0; e += 0.25) places.push(near * 10 ** e);
  const step = method.reach / (20 * method.stages);
  for (let r = near; r < end; r += step) places.push(r);
  places.push(end);
  return places;
}

function crossing(value, places) {
  let [r0, r1] = [0, 0];
  let [v0, v1] = [-1, -1];
  for (const r of places) {
    const v = value(r);
    if (v > 0) return halved(value, r1, r);
    if (v1 > v0 && v1 > v) { // a maximum between looks: does it touch 1 from below, or cross it?
      const top = peak(value, r0, r);
      if (value(top) > 0) return halved(value, r0, top);
    }
    [r0, v0, r1, v1] = [r1, v1, r, v];
  }
  return null;
}

function peak(value, low, high) {
  for (let n = 0; n < 40; n++) {
    const a = low + 0.382 * (high - low);
    const b = low + 0.618 * (high - low);
    if (value(a) > value(b)) high = b;
    else low = a;
  }
  return (low + high) / 2;
}

function halved(value, low, high) {
  for (let n = 0; n < 60; n++) {
    const middle = (low + high) / 2;
    if (value(middle) > 0) high = middle;
    else low = middle;
  }
  return (low + high) / 2;
}

// Eigenvalues as they count: with τ = 8√n·ε·max|λ|, |λ| ≤ τ is 0 and |Re λ| ≤ τ lies on the imaginary axis.
function counted(spectrum) {
  if (spectrum.counted) return spectrum.counted;
  let most = 0;
  for (let i = 0; i < spectrum.re.length; i++) most = Math.max(most, Math.hypot(spectrum.re[i], spectrum.im[i]));
  const tau = 8 * Math.sqrt(spectrum.re.length) * EPS * most;
  const re = spectrum.re.map((x) => (Math.abs(x) <= tau ? 0 : x));
  const im = spectrum.im.map((y, i) => (Math.hypot(spectrum.re[i], y) <= tau ? 0 : y));
  spectrum.counted = { re, im };
  return spectrum.counted;
}

// What a method allows a spectrum: {step, decaying, growing, worst}, `worst` the eigenvalue that sets the step.
function limitOf(method, spectrum) {
  const { re, im } = counted(spectrum);
  const order = re.map((_, i) => i).sort((i, j) => Math.hypot(re[j], im[j]) - Math.hypot(re[i], im[i]));
  let decaying = Infinity;
  let growing = 0;
  let worst = -1;
  let fastest = -1;
  for (const i of order) {
    if (re[i] > 0) {
      growing += 1;
      if (fastest < 0 || re[i] > re[fastest]) fastest = i;
      continue;
    }
    const exit = firstExit(method, re[i], im[i], decaying);
    if (exit < decaying) {
      decaying = exit;
      worst = i;
    }
  }
  return { step: growing ? 0 : decaying, decaying, growing, worst: growing ? fastest : worst };
}

// p and q of R = 1 + z bᵀ(I − zA)⁻¹1 from a tableau: q = det(I − zA), p = det(I − zA + z 1bᵀ), both by Faddeev
// and Le Verrier's recurrence.
function coefficientsOf(a, b) {
  const q = determinant(a);
  const p = determinant(a.map((row) => row.map((c, j) => c - b[j])));
  return { p: trimmed(p), q: trimmed(q) };
}

function determinant(a) {
  const size = a.length;
  const found = [1];
  let product = a.map((row) => row.map(() => 0));
  for (let k = 1; k <= size; k++) {
    product.forEach((row, i) => (row[i] += found[k - 1]));
    const times = a.map((row) => row.map((_, j) => row.reduce((sum, c, m) => sum + c * product[m][j], 0)));
    const trace = times.reduce((sum, row, i) => sum + row[i], 0);
    found.push(-trace / k);
    product = times;
  }
  return found;
}

function trimmed(polynomial) {
  let last = polynomial.length;
  while (last > 1 && Math.abs(polynomial[last - 1]) < 1e-14) last -= 1;
  return polynomial.slice(0, last);
}

// A number or a fraction, "1/6"; NaN for anything else.
function fraction(text) {
  const parts = String(text).trim().split("/");
  if (parts.length > 2 || parts.some((part) => part.trim() === "")) return NaN;
  return parts.length === 2 ? Number(parts[0]) / Number(parts[1]) : Number(parts[0]);
}
