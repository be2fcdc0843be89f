"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";

function draw(tag, attributes, parent, text) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}
const finite = (x) => typeof x === "number" && Number.isFinite(x);
function shorten(text, width) { return text.length <= width ? text : "…" + text.slice(text.length - width + 1); }
function signed(x) { return finite(x) ? (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2) : "not finite"; }

/* round numbers between low and high, about `count` of them */
function ticks(low, high, count) {
  const span = high - low || 1, raw = span / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * span; k++) found.push(+(k * step).toPrecision(12));
  return found;
}
const plain = (x) => (Math.abs(x) >= 1e4 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(0) : String(x)).replace("-", "−");

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme || (dark ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});

for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const head = button.parentElement, down = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((th) => th.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        if (!("value" in cell.dataset)) return cell.textContent.trim();
        const text = cell.dataset.value.replace("inf", "Infinity");
        return text === "None" || text === "nan" ? NaN : Number(text);
      };
      const rows = [...table.tBodies[0].rows].map((row, i) => [key(row), i, row]);
      rows.sort(([a, i], [b, j]) => {
        if (typeof a === "string") return (a.localeCompare(b, undefined, { numeric: true }) || i - j) * (down ? 1 : -1);
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b) || i - j; // what was not measured stays last
        return (a - b || i - j) * (down ? 1 : -1);
      });
      for (const [, , row] of rows) table.tBodies[0].appendChild(row);
    });
  });
}
