"use strict";
let W = 1120;

/* an empty chart, and the width that there is for it, so that text keeps its size on a phone */
function cleared(id) {
  const holder = document.getElementById(id);
  holder.replaceChildren();
  W = Math.max(300, Math.min(1120, Math.round(holder.clientWidth) || 1120));
  return holder;
}

function drawTotals() {
  const holder = cleared("over"), H = 260, left = W < 640 ? 40 : 64, bottom = 56, room = Math.max(4, Math.min(16, Math.floor(W / 70))), n = data.total.length, svg = draw("svg", { viewBox: `0 0 ${W} ${H}` }, holder);
  const ends = [...data.interval.flat(), ...data.total].filter(finite);
  const low = Math.min(0, ...ends), high = Math.max(0, ...ends, low + 0.1), pad = 0.06 * (high - low);
  const y = (v) => 12 + ((H - bottom - 12) * (high + pad - v)) / (high - low + 2 * pad), x = (i) => left + ((i + 0.5) * (W - left - 16)) / n;
  for (const t of ticks(low, high, 5)) {
    draw("line", { x1: left, x2: W - 16, y1: y(t), y2: y(t), class: "axis" }, svg);
    draw("text", { x: left - 6, y: y(t) + 4, "text-anchor": "end", class: "tick" }, svg, plain(t));
  }
  draw("line", { x1: left, x2: W - 16, y1: y(0), y2: y(0), stroke: "var(--ink)" }, svg);
  const level = n * 170 <= W;
  let path = "", pen = "M";
  data.total.forEach((t, i) => { if (finite(t)) { path += `${pen}${x(i)},${y(t)}`; pen = "L"; } else pen = "M"; });
  if (path) draw("path", { d: path, fill: "none", stroke: "var(--blue)", "stroke-width": 2 }, svg);
  data.total.forEach((t, i) => {
    const [a, b] = data.interval[i];
    if (finite(a) && finite(b)) draw("line", { x1: x(i), x2: x(i), y1: y(a), y2: y(b), stroke: "var(--ink)" }, svg);
    const dot = finite(t) ? draw("circle", { cx: x(i), cy: y(t), r: 4, fill: "var(--blue)" }, svg) : draw("text", { x: x(i), y: y(0) + 5, "text-anchor": "middle" }, svg, "×");
    draw("title", {}, dot, `${data.reports[i]}: ${signed(t)} nats`);
    if (n <= room || i % Math.ceil(n / room) === 0) draw("text", { x: x(i), y: H - bottom + 20, "text-anchor": level ? "middle" : "end", transform: level ? "" : `rotate(-25 ${x(i)} ${H - bottom + 20})` }, svg, shorten(data.reports[i], level ? 24 : 14));
  });
}

function drawMap() {
  const holder = cleared("map"), widest = W < 640 ? 13 : 26, left = 24 + 7 * Math.min(widest, Math.max(...data.steps.map((name) => name.length))), row = data.steps.length > 40 ? 12 : 20, top = 8, n = data.reports.length, H = top + row * data.steps.length + 62;
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}` }, holder);
  const sizes = data.growth.flat().filter(finite).map(Math.abs).sort((a, b) => a - b), most = Math.max(sizes[Math.floor(0.98 * (sizes.length - 1))] || 0, 1e-3);
  const width = (W - left - 16) / n;
  data.steps.forEach((name, j) => {
    draw("text", { x: left - 8, y: top + row * (j + 0.5) + 4, "text-anchor": "end", class: "tick" }, svg, shorten(name, widest));
    data.growth.forEach((column, i) => {
      const v = column[j];
      if (v === null) return;
      const cell = draw("rect", { x: left + i * width, y: top + j * row, width: width + 0.5, height: row + 0.5, fill: finite(v) ? (v > 0 ? "var(--orange)" : "var(--blue)") : "var(--ink)", "fill-opacity": finite(v) ? Math.min(1, Math.abs(v) / most) : 1 }, svg);
      draw("title", {}, cell, `${name}, ${data.reports[i]}: ${signed(v)} nats`);
    });
  });
  draw("rect", { x: left, y: top, width: W - left - 16, height: row * data.steps.length, fill: "none", class: "axis" }, svg);
  const y = H - 44, apart = W < 640 ? 64 : 84, begin = W < 640 ? 0 : left, wild = data.growth.flat().some((v) => v !== null && !finite(v));
  [-1, -0.5, 0, 0.5, 1].forEach((share, k) => {
    draw("rect", { x: begin + k * apart, y, width: 18, height: 14, fill: share > 0 ? "var(--orange)" : "var(--blue)", "fill-opacity": Math.abs(share), stroke: "var(--line)" }, svg);
    draw("text", { x: begin + k * apart + 22, y: y + 12, class: "tick" }, svg, (share * most).toFixed(2).replace("-", "−"));
  });
  draw("text", { x: begin, y: y + 32, class: "tick" }, svg, "nats a step");
  if (!wild) return;
  draw("rect", { x: begin + 84, y: y + 20, width: 18, height: 14, fill: "var(--ink)" }, svg);
  draw("text", { x: begin + 108, y: y + 32, class: "tick" }, svg, "not finite");
}

function drawAll() {
  drawTotals();
  drawMap();
}
drawAll();
let shown = innerWidth;
addEventListener("resize", () => { if (innerWidth !== shown) { shown = innerWidth; drawAll(); } });
