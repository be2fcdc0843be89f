"use strict";
/* what is shown of the chosen block: its region, the parts of its growth, its place in the graph */
const PARTS = { spectral: "var(--blue)", non_normal: "var(--orange)", alignment: "#cc79a7", transition: "#999999", masks: "#e69f00", norms: "#009e73" };
const FIELDS = ["var(--blue)", "var(--green)", "#cc79a7", "#e69f00"];
const FAR = 8; /* radii that the plane shows around the region: more, and the region would be a dot */

/* the plane of one step: its region, its eigenvalues, its numerical range */
function drawRegion(holder, s) {
  if (s.z === null) {
    const why = s.kind === "transition" ? "A change of space has singular values but no eigenvalues." : "No eigenvalues of this step were computed.";
    holder.appendChild(Object.assign(document.createElement("p"), { className: "empty", textContent: why }));
    return;
  }
  const size = 380, pad = 40, svg = draw("svg", { viewBox: `0 0 ${size} ${size}`, role: "img" }, holder);
  const a = finite(s.skip) ? s.skip : 0, curves = s.region === null ? null : data.regions[s.region];
  const inequality = curves ? `|R(z)| ≤ 1, ${s.method}` : a ? `|${plain(+a.toPrecision(3))} + z| ≤ 1` : "|z| ≤ 1";
  const points = s.z.filter(([re, im]) => finite(re) && finite(im)), around = s.range || [];
  draw("title", {}, svg, `Eigenvalues of ${s.name}: ${s.count}, against the region ${inequality}`);
  const corners = curves ? curves.flatMap((c) => c.points).filter(([re, im]) => Math.hypot(re, im) < FAR) : [[-a - 1, -1], [1 - a, 1]];
  const reals = corners.map(([re]) => re), center = corners.length ? (Math.min(...reals) + Math.max(...reals)) / 2 : 0;
  const span = (list) => list.map(([re, im]) => Math.max(Math.abs(re - center), Math.abs(im)));
  const reach = span(points).sort((p, q) => p - q), far = reach.length ? reach[Math.floor(0.99 * (reach.length - 1))] : 1;
  const half = Math.min(1.12 * Math.max(1.1, ...span(corners), far, ...span(around)), Math.max(FAR, 1.12 * Math.max(1, ...span(corners))));
  const u = (re) => pad + ((re - center + half) * (size - 2 * pad)) / (2 * half), v = (im) => pad + ((half - im) * (size - 2 * pad)) / (2 * half);
  const clip = `clip-${s.index}`, inside = draw("clipPath", { id: clip }, draw("defs", {}, svg));
  draw("rect", { x: pad, y: pad, width: size - 2 * pad, height: size - 2 * pad }, inside);
  const plane = draw("g", { "clip-path": `url(#${clip})` }, svg);
  const line = (list) => list.map(([re, im], i) => `${i ? "L" : "M"}${u(re).toFixed(1)},${v(im).toFixed(1)}`).join("");
  if (curves) for (const c of curves) draw("path", { d: line(c.points) + (c.closed ? "Z" : ""), fill: c.closed ? "var(--disc)" : "none", stroke: "var(--ink)" }, plane);
  else draw("circle", { cx: u(-a), cy: v(0), r: u(1 - a) - u(-a), fill: "var(--disc)", stroke: "var(--ink)" }, plane);
  for (const t of ticks(center - half, center + half, 5)) draw("text", { x: u(t), y: size - pad + 16, "text-anchor": "middle", class: "tick" }, svg, plain(t));
  for (const t of ticks(-half, half, 5)) draw("text", { x: pad - 6, y: v(t) + 4, "text-anchor": "end", class: "tick" }, svg, plain(t));
  draw("rect", { x: pad, y: pad, width: size - 2 * pad, height: size - 2 * pad, fill: "none", class: "axis" }, svg);
  draw("line", { x1: u(center - half), x2: u(center + half), y1: v(0), y2: v(0), class: "axis" }, plane);
  draw("line", { x1: u(0), x2: u(0), y1: v(half), y2: v(-half), class: "axis" }, plane);
  if (around.length) draw("path", { d: line(around) + "Z", fill: "none", stroke: "var(--quiet)", "stroke-dasharray": "4 3" }, plane);
  const r = points.length > 300 ? 2 : points.length > 60 ? 2.6 : 3.4;
  let beyond = 0;
  points.forEach(([re, im], i) => {
    beyond += Math.abs(re - center) > half || Math.abs(im) > half;
    const cx = Math.min(Math.max(u(re), pad), size - pad), cy = Math.min(Math.max(v(im), pad), size - pad);
    const outside = s.grows ? s.grows[i] : (re + a) ** 2 + im ** 2 > 1.0001;
    draw("circle", { cx, cy, r, fill: outside ? "var(--orange)" : "var(--blue)", "fill-opacity": 0.8 }, svg);
  });
  const words = [`${s.partial ? "the largest " : ""}${s.count} eigenvalue${s.count === 1 ? "" : "s"}`];
  if (s.count > points.length) words.push(`${points.length} drawn`);
  if (beyond) words.push(`${beyond} beyond the frame`);
  if (around.length) words.push("dashed: numerical range");
  draw("text", { x: pad, y: pad - 22, "font-weight": 600 }, svg, inequality);
  draw("text", { x: pad, y: pad - 7, class: "tick" }, svg, words.join(", "));
  draw("text", { x: size - pad, y: size - 6, "text-anchor": "end", class: "tick" }, svg, "Re z");
  draw("text", { x: 4, y: pad - 7, class: "tick" }, svg, "Im z");
}

/* the parts of one step's growth as bars from a common zero */
function drawParts(holder, s) {
  const entries = Object.entries(s.attribution).filter(([, v]) => finite(v)), row = 22, width = Math.max(280, Math.min(460, holder.clientWidth || 460)), label = 92;
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

/* the step between its neighbours, with the stages inside and the skips around; a click chooses a neighbour */
function drawPlace(holder, s) {
  const width = 660, height = 118, box = 160, gap = 66, y = 44, tall = 52;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" }, holder);
  const first = (width - 3 * box - 2 * gap) / 2, ends = ["input", "output"];
  const said = [-1, 0, 1].map((d) => (steps[s.index + d] ? steps[s.index + d].name : ends[(d + 1) / 2]));
  draw("title", {}, svg, `${said[0]}, then ${s.name}${s.skip ? ` with a skip of ${plain(+s.skip.toPrecision(3))}` : ""}, then ${said[2]}`);
  [-1, 0, 1].forEach((d) => {
    const step = steps[s.index + d], left = first + (d + 1) * (box + gap), middle = left + box / 2;
    if (d < 1) arrow(svg, left + box, left + box + gap, y + tall / 2);
    if (!step) { draw("text", { x: middle, y: y + tall / 2 + 4, "text-anchor": "middle", class: "tick" }, svg, ends[(d + 1) / 2]); return; }
    const group = draw("g", d ? { style: "cursor: pointer" } : {}, svg);
    draw("rect", { x: left, y, width: box, height: tall, rx: 8, fill: d ? "var(--soft)" : "var(--mark)", stroke: step.kind === "transition" ? "var(--quiet)" : "var(--blue)" }, group);
    draw("text", { x: middle, y: y + 17, "text-anchor": "middle", "font-weight": d ? 400 : 600 }, group, shorten(step.name, 22));
    draw("text", { x: middle, y: y + 31, "text-anchor": "middle", class: "tick", style: "font-size: 10px" }, group, step.method.length > 28 ? step.method.slice(0, 27) + "…" : step.method);
    drawStages(group, middle, y + 42, step.stages);
    const after = step.after.length ? `, then ${step.after[0].replace(/Backward0$/, "")}` : "";
    draw("text", { x: middle, y: y + tall + 15, "text-anchor": "middle", class: "tick" }, group, signed(step.growth) + " nats" + after);
    if (step.skip) {
      draw("path", { d: `M${left - 18},${y + tall / 2}V${y - 12}H${left + box + 18}V${y + tall / 2 - 6}`, fill: "none", stroke: "var(--orange)", "stroke-width": 1.5 }, svg);
      draw("path", { d: `M${left + box + 14},${y + tall / 2 - 8}h8l-4,7z`, fill: "var(--orange)" }, svg);
      draw("text", { x: middle, y: y - 17, "text-anchor": "middle", style: "fill: var(--orange)" }, svg, plain(+step.skip.toPrecision(3)));
    }
    if (d) group.addEventListener("click", () => choose(step.index));
  });
}

function arrow(svg, from, to, y) {
  draw("line", { x1: from, x2: to - 6, y1: y, y2: y, stroke: "var(--ink)" }, svg);
  draw("path", { d: `M${to - 8},${y - 4}l8,4l-8,4z`, fill: "var(--ink)" }, svg);
}

/* one circle a stage, hollow when implicit, joined to those that it is computed from */
function drawStages(group, middle, y, stages) {
  const n = stages.fields.length, apart = Math.min(22, 150 / n), at = (i) => middle + apart * (i - (n - 1) / 2);
  if (n > 12) { draw("text", { x: middle, y: y + 4, "text-anchor": "middle", class: "tick", style: "font-size: 10px" }, group, `${n} stages`); return; }
  for (const [j, i] of stages.links) {
    const bend = i === j + 1 ? 0 : 6;
    draw("path", { d: `M${at(j)},${y}Q${(at(i) + at(j)) / 2},${y - bend} ${at(i)},${y}`, fill: "none", stroke: "var(--quiet)" }, group);
  }
  stages.fields.forEach((field, i) => {
    const color = FIELDS[field % FIELDS.length];
    draw("circle", { cx: at(i), cy: y, r: 3.5, stroke: color, fill: stages.implicit.includes(i) ? "var(--paper)" : color }, group);
  });
}
