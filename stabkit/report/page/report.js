"use strict";
const steps = data.steps, spine = document.getElementById("spine");
const PARTS = { spectral: "var(--blue)", non_normal: "var(--orange)", alignment: "#cc79a7", transition: "#999999", masks: "#e69f00", norms: "#009e73" };
const W = 1120, LEFT = 64, RIGHT = 64, TOP = 26, BARS = 150, GAP = 34, NORMS = 110, NAMES = steps.length <= 24 ? 96 : 34;
let chosen = data.first, mark = null;

const x = (i) => LEFT + ((i + 0.5) * (W - LEFT - RIGHT)) / Math.max(steps.length, 1);
const column = (W - LEFT - RIGHT) / Math.max(steps.length, 1);

function axis(svg, low, high, y, side, title, format) {
  for (const t of ticks(low, high, 4)) {
    draw("line", { x1: LEFT, x2: W - RIGHT, y1: y(t), y2: y(t), class: "axis", "stroke-width": side === "left" ? 1 : 0 }, svg);
    draw("text", { x: side === "left" ? LEFT - 6 : W - RIGHT + 6, y: y(t) + 4, "text-anchor": side === "left" ? "end" : "start", class: "tick" }, svg, format(t));
  }
  draw("text", { x: side === "left" ? LEFT - 52 : W - 8, y: Math.min(y(low), y(high)) - 9, "text-anchor": side === "left" ? "start" : "end", class: "tick" }, svg, title);
}

function drawSpine() {
  const height = TOP + BARS + GAP + NORMS + NAMES;
  const svg = draw("svg", { viewBox: `0 0 ${W} ${height}`, "aria-hidden": "true" }, spine);
  mark = draw("rect", { class: "chosen", y: TOP - 4, height: BARS + GAP + NORMS + 8, width: column, rx: 3 }, svg);
  /* growth of each step: bars, and the sum from the output back as a line on an axis of its own */
  const stacks = steps.map((s) => parts(s));
  const ups = stacks.map((p) => p.filter(([, v]) => v > 0).reduce((a, [, v]) => a + v, 0));
  const downs = stacks.map((p) => p.filter(([, v]) => v < 0).reduce((a, [, v]) => a + v, 0));
  let high = Math.max(...ups, 0), low = Math.min(...downs, 0);
  const total = [];
  let sum = 0, broken = false;
  for (let i = steps.length - 1; i >= 0; i--) { broken = broken || !finite(steps[i].growth); sum += finite(steps[i].growth) ? steps[i].growth : 0; total[i] = broken ? null : sum; }
  const known = total.filter((t) => t !== null);
  let highT = Math.max(...known, 0), lowT = Math.min(...known, 0);
  [low, high, lowT, highT] = shareZero(low, high, lowT, highT);
  const y = (v) => TOP + (BARS * (high - v)) / (high - low), yT = (v) => TOP + (BARS * (highT - v)) / (highT - lowT);
  axis(svg, low, high, y, "left", "growth of a step (nats)", plain);
  axis(svg, lowT, highT, yT, "right", "sum from the output (nats)", plain);
  steps.forEach((s, i) => {
    let up = 0, down = 0;
    for (const [name, v] of stacks[i]) {
      const base = v > 0 ? up : down;
      draw("rect", { x: x(i) - column * 0.36, width: column * 0.72, y: y(Math.max(base, base + v)), height: Math.abs(y(base) - y(base + v)), fill: PARTS[name] || (name === "growth" ? (v > 0 ? "var(--orange)" : "var(--blue)") : "#999999"), opacity: s.kind === "transition" ? 0.45 : 1 }, svg);
      if (v > 0) up += v; else down += v;
    }
    if (!finite(s.growth)) draw("text", { x: x(i), y: y(0) + 5, "text-anchor": "middle" }, svg, "×");
    else if (stacks[i].length > 1) draw("line", { x1: x(i) - column * 0.42, x2: x(i) + column * 0.42, y1: y(s.growth), y2: y(s.growth), stroke: "var(--ink)", "stroke-width": 2 }, svg);
    else if (finite(s.low) && finite(s.high)) draw("line", { x1: x(i), x2: x(i), y1: y(Math.min(s.high, high)), y2: y(Math.max(s.low, low)), stroke: "var(--ink)", opacity: 0.6 }, svg);
  });
  draw("line", { x1: LEFT, x2: W - RIGHT, y1: y(0), y2: y(0), stroke: "var(--ink)" }, svg);
  const line = total.map((t, i) => (t === null ? null : `${x(i) - column / 2},${yT(t)}`)).filter(Boolean);
  if (line.length) draw("polyline", { points: [...line, `${W - RIGHT},${yT(0)}`].join(" "), fill: "none", stroke: "var(--ink)", "stroke-width": 1.5, "stroke-dasharray": "5 3" }, svg);
  legend(svg, stacks);
  /* norms, on a log scale */
  const base = TOP + BARS + GAP, logs = (key) => steps.map((s) => (finite(s[key]) && s[key] > 0 ? Math.log10(s[key]) : null));
  const gradient = logs("gradient"), state = logs("state"), all = [...gradient, ...state].filter((v) => v !== null);
  let bottom = Math.min(...all), top = Math.max(...all);
  if (!all.length) { bottom = -1; top = 1; }
  if (top - bottom < 1) { const middle = (top + bottom) / 2; bottom = middle - 0.5; top = middle + 0.5; }
  const yN = (v) => base + (NORMS * (top - v)) / (top - bottom);
  const whole = ticks(bottom, top, 3).filter(Number.isInteger);
  for (const t of whole.length ? whole : [Math.round((top + bottom) / 2)].filter((t) => t >= bottom && t <= top)) {
    draw("line", { x1: LEFT, x2: W - RIGHT, y1: yN(t), y2: yN(t), class: "axis" }, svg);
    const label = draw("text", { x: LEFT - 6, y: yN(t) + 4, "text-anchor": "end", class: "tick" }, svg, "10");
    draw("tspan", { dy: -5, "font-size": 9 }, label, plain(t));
  }
  for (const [values, color, dash, title, at] of [[gradient, "var(--blue)", "", "gradient norm", LEFT + 4], [state, "var(--orange)", "2 3", "state norm", LEFT + 124]]) {
    let path = "", pen = "M";
    values.forEach((v, i) => { if (v === null) pen = "M"; else { path += `${pen}${x(i) - column / 2},${yN(v)}`; pen = "L"; } });
    if (path) draw("path", { d: path, fill: "none", stroke: color, "stroke-width": 2, "stroke-dasharray": dash }, svg);
    draw("line", { x1: at, x2: at + 22, y1: base - 10, y2: base - 10, stroke: color, "stroke-width": 2, "stroke-dasharray": dash }, svg);
    draw("text", { x: at + 28, y: base - 6, class: "tick" }, svg, title);
  }
  names(svg, base + NORMS);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    choose(Math.floor((((event.clientX - box.left) / box.width) * W - LEFT) / column));
  });
}

function parts(s) {
  if (!finite(s.growth)) return [];
  if (!s.attribution) return [["growth", s.growth]];
  return Object.entries(s.attribution).filter(([, v]) => finite(v) && v !== 0);
}

function legend(svg, stacks) {
  const used = [...new Set(stacks.flat().map(([name]) => name))].filter((name) => name !== "growth");
  let at = LEFT + 190;
  for (const name of used) {
    draw("rect", { x: at, y: 5, width: 12, height: 12, fill: PARTS[name] || "#999999" }, svg);
    draw("text", { x: at + 17, y: 15, class: "tick" }, svg, name.replace(/_/g, "-"));
    at += 30 + 7 * name.length;
  }
}

function names(svg, y) {
  if (steps.length <= 24) {
    steps.forEach((s, i) => {
      const node = draw("text", { x: x(i), y: y + 16, "text-anchor": "end", transform: `rotate(-40 ${x(i)} ${y + 16})` }, svg, shorten(s.name, 17));
      draw("title", {}, node, s.name);
    });
    return;
  }
  for (const t of ticks(1, steps.length, 10)) if (t >= 1) draw("text", { x: x(t - 1), y: y + 18, "text-anchor": "middle", class: "tick" }, svg, String(t));
}

/* limits of two axes so that zero is at one height */
function shareZero(low, high, lowT, highT) {
  const a = high - low || 1, b = highT - lowT || 1;
  let below = Math.max(-low / a, -lowT / b), above = Math.max(high / a, highT / b);
  if (below + above === 0) { below = 0.5; above = 0.5; }
  below += 0.04; above += 0.04;
  return [-below * a, above * a, -below * b, above * b];
}

/* the plane of one step: its disc, its eigenvalues, those of the other steps pale behind them */
function drawRegion(holder, s) {
  if (s.z === null) {
    const why = s.kind === "transition" ? "A change of space has singular values but no eigenvalues." : "No eigenvalues of this step were computed.";
    holder.appendChild(Object.assign(document.createElement("p"), { className: "empty", textContent: why }));
    return;
  }
  const size = 380, pad = 40;
  const svg = draw("svg", { viewBox: `0 0 ${size} ${size}`, role: "img" }, holder);
  const a = finite(s.skip) ? s.skip : 0, points = s.z.filter(([re, im]) => finite(re) && finite(im));
  draw("title", {}, svg, `Eigenvalues of ${s.name}: ${s.count}, against the disc |${a} + z| ≤ 1`);
  const reach = points.map(([re, im]) => Math.max(Math.abs(re + a), Math.abs(im))).sort((p, q) => p - q);
  const far = reach.length ? reach[Math.floor(0.99 * (reach.length - 1))] : 1;
  const half = Math.min(Math.max(1.25, 1.12 * far), 25);
  const u = (re) => pad + ((re + a + half) * (size - 2 * pad)) / (2 * half), v = (im) => pad + ((half - im) * (size - 2 * pad)) / (2 * half);
  draw("circle", { cx: u(-a), cy: v(0), r: u(1 - a) - u(-a), fill: "var(--disc)", stroke: "var(--ink)" }, svg);
  for (const t of ticks(-a - half, -a + half, 5)) draw("text", { x: u(t), y: size - pad + 16, "text-anchor": "middle", class: "tick" }, svg, plain(t));
  for (const t of ticks(-half, half, 5)) draw("text", { x: pad - 6, y: v(t) + 4, "text-anchor": "end", class: "tick" }, svg, plain(t));
  draw("rect", { x: pad, y: pad, width: size - 2 * pad, height: size - 2 * pad, fill: "none", class: "axis" }, svg);
  draw("line", { x1: u(-a - half), x2: u(-a + half), y1: v(0), y2: v(0), class: "axis" }, svg);
  if (Math.abs(a) < half) draw("line", { x1: u(0), x2: u(0), y1: v(half), y2: v(-half), class: "axis" }, svg);
  const r = points.length > 300 ? 2 : points.length > 60 ? 2.6 : 3.4;
  let beyond = 0;
  for (const [re, im] of points) {
    const out = Math.abs(re + a) > half || Math.abs(im) > half;
    beyond += out;
    const cx = Math.min(Math.max(u(re), pad), size - pad), cy = Math.min(Math.max(v(im), pad), size - pad);
    const outside = (re + a) ** 2 + im ** 2 > 1.0001;
    draw("circle", { cx, cy, r, fill: outside ? "var(--orange)" : "var(--blue)", "fill-opacity": 0.8 }, svg);
  }
  draw("text", { x: pad, y: pad - 22, "font-weight": 600 }, svg, a ? `|${plain(+a.toPrecision(3))} + z| ≤ 1` : "|z| ≤ 1");
  draw("text", { x: pad, y: pad - 7, class: "tick" }, svg, `${s.partial ? "the largest " : ""}${s.count} eigenvalue${s.count === 1 ? "" : "s"}${s.count > points.length ? `, ${points.length} drawn` : ""}${beyond ? `, ${beyond} beyond the frame` : ""}`);
  draw("text", { x: size - pad, y: size - 6, "text-anchor": "end", class: "tick" }, svg, "Re z");
  draw("text", { x: 4, y: pad - 7, class: "tick" }, svg, "Im z");
}

/* the parts of one step's growth as bars from a common zero */
function drawParts(holder, s) {
  const entries = Object.entries(s.attribution).filter(([, v]) => finite(v)), row = 22, width = 460, label = 110;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${row * (entries.length + 1) + 8}`, role: "img" }, holder);
  draw("title", {}, svg, "Parts of the growth: " + entries.map(([k, v]) => `${k} ${signed(v)}`).join(", "));
  const values = entries.map(([, v]) => v), low = Math.min(0, ...values), high = Math.max(0, ...values), span = high - low || 1;
  const u = (v) => label + ((v - low) * (width - label - 70)) / span;
  draw("text", { x: 0, y: 14, "font-weight": 600 }, svg, "Where its growth comes from (nats)");
  entries.forEach(([name, v], i) => {
    const y = row * (i + 1) + 4;
    draw("text", { x: 0, y: y + 13, class: "tick" }, svg, name.replace(/_/g, "-"));
    draw("rect", { x: Math.min(u(0), u(v)), width: Math.max(Math.abs(u(v) - u(0)), 1), y: y + 2, height: row - 8, fill: PARTS[name] || "#999999" }, svg);
    draw("text", { x: Math.max(u(v), u(0)) + 6, y: y + 13 }, svg, signed(v));
  });
}

function choose(index, scroll) {
  if (!steps.length) return;
  chosen = Math.min(Math.max(index, 0), steps.length - 1);
  const s = steps[chosen];
  mark.setAttribute("x", x(chosen) - column / 2);
  spine.setAttribute("aria-valuenow", chosen);
  spine.setAttribute("aria-valuetext", `${s.name}, step ${chosen + 1} of ${steps.length}, growth ${signed(s.growth)} nats`);
  for (const article of document.querySelectorAll("article.step")) article.hidden = Number(article.dataset.step) !== chosen;
  for (const row of document.querySelectorAll("#steps tbody tr")) row.classList.toggle("chosen", Number(row.dataset.step) === chosen);
  const article = document.getElementById(`step-${chosen}`), region = article.querySelector("[data-region]"), bars = article.querySelector("[data-parts]");
  if (!region.firstChild) drawRegion(region, s); // drawn when first shown: 48 steps at once would be slow
  if (bars && !bars.firstChild) drawParts(bars, s);
  if (scroll) document.getElementById("depth").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

spine.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: chosen - 1, ArrowDown: chosen - 1, ArrowRight: chosen + 1, ArrowUp: chosen + 1, PageUp: chosen + 10, PageDown: chosen - 10, Home: 0, End: steps.length - 1 }[event.key];
  if (move === undefined) return;
  event.preventDefault();
  choose(move);
});
document.addEventListener("click", (event) => {
  const go = event.target.closest("button.go");
  if (go) choose(Number(go.dataset.step), !go.closest("article"));
});
if (steps.length) { drawSpine(); choose(chosen); }
