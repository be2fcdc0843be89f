"use strict";
const steps = data.steps, spine = document.getElementById("spine");
const NARROW = 640, TOP = 26, BARS = 150, GAP = 34, NORMS = 110;
let chosen = data.first, mark = null;
/* drawn for the width that there is, so that text keeps its size on a phone; see layout */
let W = 1120, LEFT = 64, RIGHT = 64, NAMES = 96, column = 1, longest = 0;

const x = (i) => LEFT + (i + 0.5) * column;

function layout() {
  W = Math.max(300, Math.min(1120, Math.round(spine.clientWidth) || 1120));
  LEFT = RIGHT = W < NARROW ? 40 : 64;
  column = (W - LEFT - RIGHT) / Math.max(steps.length, 1);
  longest = Math.max(0, ...steps.map((s) => Math.min(s.name.length, 17)));
  NAMES = named() ? (level() ? 28 : 24 + 4.4 * longest) : 34;
}

/* whether the names fit side by side without being turned */
function level() { return 7.5 * longest < column; }

/* whether there is room for the names of the steps */
function named() { return steps.length <= 24 && column >= 18; }

function axis(svg, low, high, y, side, title, format) {
  for (const t of ticks(low, high, 4)) {
    draw("line", { x1: LEFT, x2: W - RIGHT, y1: y(t), y2: y(t), class: "axis", "stroke-width": side === "left" ? 1 : 0 }, svg);
    draw("text", { x: side === "left" ? LEFT - 6 : W - RIGHT + 6, y: y(t) + 4, "text-anchor": side === "left" ? "end" : "start", class: "tick" }, svg, format(t));
  }
  draw("text", { x: side === "left" ? Math.max(0, LEFT - 52) : W - 8, y: Math.min(y(low), y(high)) - 9, "text-anchor": side === "left" ? "start" : "end", class: "tick" }, svg, title);
}

function drawSpine() {
  layout();
  spine.replaceChildren();
  const top_ = W < NARROW ? TOP + 34 : TOP; /* the legend has lines of its own where it is narrow */
  const height = top_ + BARS + GAP + NORMS + NAMES;
  const svg = draw("svg", { viewBox: `0 0 ${W} ${height}`, "aria-hidden": "true" }, spine);
  mark = draw("rect", { class: "chosen", y: top_ - 4, height: BARS + GAP + NORMS + 8, width: column, rx: 3 }, svg);
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
  const y = (v) => top_ + (BARS * (high - v)) / (high - low), yT = (v) => top_ + (BARS * (highT - v)) / (highT - lowT);
  axis(svg, low, high, y, "left", W < NARROW ? "a step (nats)" : "growth of a step (nats)", plain);
  axis(svg, lowT, highT, yT, "right", W < NARROW ? "sum (nats)" : "sum from the output (nats)", plain);
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
  const base = top_ + BARS + GAP, log = (v) => (finite(v) && v > 0 ? Math.log10(v) : null);
  const ends = [...steps.map((s) => s.norms), data.end], series = (key) => ends.map((n) => (n && n[key] ? n[key].map(log) : [null, null, null]));
  const gradient = series("gradient"), state = series("state"), all = [...gradient, ...state].flat().filter((v) => v !== null);
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
    const edge = (i) => LEFT + i * column;
    for (let i = 0; i + 1 < values.length; i++) {
      /* the interval over samples, as a band between one state and the next */
      const [, l0, h0] = values[i], [, l1, h1] = values[i + 1];
      if ([l0, h0, l1, h1].includes(null)) continue;
      draw("path", { d: `M${edge(i)},${yN(l0)}L${edge(i)},${yN(h0)}L${edge(i + 1)},${yN(h1)}L${edge(i + 1)},${yN(l1)}Z`, fill: color, "fill-opacity": 0.18 }, svg);
    }
    let path = "", pen = "M";
    values.forEach(([v], i) => { if (v === null) pen = "M"; else { path += `${pen}${edge(i)},${yN(v)}`; pen = "L"; } });
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
  const narrow = W < NARROW;
  let at = narrow ? 0 : LEFT + 190, row = 5;
  for (const name of used) {
    const wide = 30 + 7 * name.length;
    if (narrow && at + wide > W) { at = 0; row += 17; }
    draw("rect", { x: at, y: row, width: 12, height: 12, fill: PARTS[name] || "#999999" }, svg);
    draw("text", { x: at + 17, y: row + 10, class: "tick" }, svg, name.replace(/_/g, "-"));
    at += wide;
  }
}

function names(svg, y) {
  if (named()) {
    steps.forEach((s, i) => {
      const turned = { "text-anchor": "end", transform: `rotate(-40 ${x(i)} ${y + 16})` };
      const node = draw("text", { x: x(i), y: y + 16, ...(level() ? { "text-anchor": "middle" } : turned) }, svg, shorten(s.name, 17));
      draw("title", {}, node, s.name);
    });
    return;
  }
  for (const t of ticks(1, steps.length, Math.min(10, W / 60))) if (t >= 1 && Number.isInteger(t)) draw("text", { x: x(t - 1), y: y + 18, "text-anchor": "middle", class: "tick" }, svg, String(t));
}

/* limits of two axes so that zero is at one height */
function shareZero(low, high, lowT, highT) {
  const a = high - low || 1, b = highT - lowT || 1;
  let below = Math.max(-low / a, -lowT / b), above = Math.max(high / a, highT / b);
  if (below + above === 0) { below = 0.5; above = 0.5; }
  below += 0.04; above += 0.04;
  return [-below * a, above * a, -below * b, above * b];
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
  const article = document.getElementById(`step-${chosen}`), region = article.querySelector("[data-region]"), bars = article.querySelector("[data-parts]"), place = article.querySelector("[data-place]");
  if (!region.firstChild) drawRegion(region, s); // drawn when first shown: 48 steps at once would be slow
  if (bars && !bars.firstChild) drawParts(bars, s);
  if (!place.firstChild) drawPlace(place, s);
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
addEventListener("resize", () => {
  if (!steps.length || Math.abs(Math.round(spine.clientWidth) - W) < 2 || (W === 1120 && spine.clientWidth > 1120)) return;
  drawSpine();
  choose(chosen);
});
