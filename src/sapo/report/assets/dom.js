"use strict";
// Helpers. Text from models and data is inserted through textContent only: no function here accepts markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

function numberText(value, unit = "") {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (unit === "share") return `${(100 * value).toFixed(Math.abs(value) < 0.1 && value !== 0 ? 1 : 0)}%`;
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return Number(value.toPrecision(3)).toExponential().replace("e+", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

const wholeText = (value) => Math.round(value).toLocaleString("en");

function niceTicks(low, high, count, whole = false) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const sizes = (whole ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10]).map((factor) => factor * (whole ? Math.max(1, power) : power));
  let place = sizes.findIndex((size) => size >= rough);
  if (place < 0) place = sizes.length - 1;
  // Of whole numbers there are few sizes: rather a tick too many than one alone.
  if (whole && place > 0 && span / sizes[place] < 2) place -= 1;
  const step = sizes[place];
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) {
    ticks.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
  }
  return ticks;
}

// The value at `wanted` on the line through (from[i], to[i]), ascending; beyond its end the slope of the whole.
function between(from, to, wanted) {
  const end = from.length - 1;
  if (end < 1) return wanted;
  if (wanted >= from[end]) return to[end] + (wanted - from[end]) * ((to[end] - to[0]) / (from[end] - from[0] || 1));
  let place = 1;
  while (place < end && from[place] < wanted) place++;
  const span = from[place] - from[place - 1];
  return to[place - 1] + (span > 0 ? (wanted - from[place - 1]) / span : 0) * (to[place] - to[place - 1]);
}

function save(name, blob) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Index of the value nearest to `wanted` in an ascending list.
function nearest(list, wanted) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] <= wanted) low = middle; else high = middle;
  }
  return Math.abs(list[low] - wanted) <= Math.abs(list[high] - wanted) ? low : high;
}
