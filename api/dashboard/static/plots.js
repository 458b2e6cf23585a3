// Plots of an evaluation, as SVG with words for who does not see them. The table above them has the numbers.

import { svg } from "./vendor/lit-html.js";
import { html, number } from "./ui.js";

const W = 420;
const LEFT = 44;
const RIGHT = W - 20;
const BOTTOM = 34;
const KINDS = 6; // classes p0 to p5 colour the configurations

// The words of ticks, with as many digits as their distance needs.
const words = (values, unit = 1, sign = "") => {
  const digits = Math.max(0, Math.ceil(-Math.log10(unit * (values[1] - values[0] || 1)) - 1e-9));
  return (value) => `${number(unit * value, digits)}${sign}`;
};
const percent = (values) => words(values, 100, " %");
const kind = (i) => `p${i % KINDS}`;

// Round steps that cover a range.
function ticks(low, high, count = 5) {
  const raw = Math.max(high - low, 1e-9) / count;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((s) => s * unit >= raw) * unit;
  const first = Math.floor(low / step) * step;
  return Array.from({ length: Math.ceil((high - first) / step - 1e-9) + 1 }, (_, i) => first + i * step);
}

const scale = (from, to, low, high) => (value) => from + ((value - low) / Math.max(high - low, 1e-9)) * (to - from);

function figure(title, height, content, more = "") {
  return html`<figure class="chart plot"><svg viewBox="0 0 ${W} ${height}" role="img" aria-label=${title}>${content}</svg><figcaption>${title}${more}</figcaption></figure>`;
}

const across = (values, x, top, bottom, said) =>
  values.map((v) => svg`<line class="rule" x1=${x(v)} x2=${x(v)} y1=${top} y2=${bottom}></line><text x=${x(v)} y=${bottom + 15} text-anchor="middle">${said(v)}</text>`);

const up = (values, y, said) =>
  values.map((v) => svg`<line class="rule" x1=${LEFT} x2=${RIGHT} y1=${y(v)} y2=${y(v)}></line><text x=${LEFT - 5} y=${y(v) + 4} text-anchor="end">${said(v)}</text>`);

const legend = (names) => html`<br>${names.map((name, i) => html`<span class="series"><svg viewBox="0 0 10 10" class="key" aria-hidden="true"><circle class=${kind(i)} cx="5" cy="5" r="5"></circle></svg> ${name}</span> `)}`;

// Accuracy of each configuration with its 95 % interval.
export function whiskers(rows) {
  const values = ticks(Math.min(...rows.map((r) => r.low)), Math.min(1, Math.max(...rows.map((r) => r.high))));
  const x = scale(LEFT, RIGHT, values[0], values.at(-1));
  const bottom = rows.length * 26 + 10;
  return figure("Accuracy with its 95 % interval", bottom + BOTTOM - 10, svg`${across(values, x, 4, bottom, percent(values))}
    ${rows.map((r, i) => svg`<g class=${kind(i)}><line x1=${x(r.low)} x2=${x(r.high)} y1=${i * 26 + 18} y2=${i * 26 + 18}></line><circle cx=${x(r.mean)} cy=${i * 26 + 18} r="5"></circle></g>`)}`, legend(rows.map((r) => r.name)));
}

// What speed costs: accuracy against tokens per forward.
export function scatter(rows) {
  if (!rows.length) return html``;
  const height = 230;
  const xs = ticks(0, Math.max(...rows.map((r) => r.x)));
  const ys = ticks(Math.min(...rows.map((r) => r.low)), Math.min(1, Math.max(...rows.map((r) => r.high))));
  const x = scale(LEFT, RIGHT, xs[0], xs.at(-1));
  const y = scale(height - BOTTOM, 12, ys[0], ys.at(-1));
  return figure("Accuracy against tokens per forward", height, svg`${up(ys, y, percent(ys))}${across(xs, x, 12, height - BOTTOM, words(xs))}
    ${rows.map((r, i) => svg`<g class=${kind(i)}><line x1=${x(r.x)} x2=${x(r.x)} y1=${y(r.low)} y2=${y(r.high)}></line><circle cx=${x(r.x)} cy=${y(r.mean)} r="5"></circle></g>`)}`, legend(rows.map((r) => r.name)));
}

const QUARTERS = [0, 0.25, 0.5, 0.75, 1];

// Which share of the answers took no longer.
export function latencies(curves) {
  if (!curves.length) return html``;
  const height = 230;
  const xs = ticks(0, Math.max(...curves.map(([, points]) => points.at(-1)[0])));
  const x = scale(LEFT, RIGHT, xs[0], xs.at(-1));
  const y = scale(height - BOTTOM, 12, 0, 1);
  return figure("Share of answers by latency in milliseconds", height, svg`${up(QUARTERS, y, percent(QUARTERS))}${across(xs, x, 12, height - BOTTOM, words(xs))}
    ${curves.map(([, points], i) => svg`<polyline class=${kind(i)} points=${points.map(([ms, s]) => `${x(ms).toFixed(1)},${y(s).toFixed(1)}`).join(" ")}></polyline>`)}`, legend(curves.map(([name]) => name)));
}
