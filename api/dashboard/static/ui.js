// Small parts that every page uses. Templates of lit-html escape whatever is put into them.

import { html, nothing } from "./vendor/lit-html.js";

export { html, nothing };

let draw = () => {};
let planned = false;

export function onDraw(fn) {
  draw = fn;
}

// Ask for the page to be drawn again, once in a frame however often it is asked.
export function changed() {
  if (planned) return;
  planned = true;
  requestAnimationFrame(() => {
    planned = false;
    draw();
  });
}

export const number = (value, digits = 0) =>
  value === null || value === undefined
    ? "–"
    : value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor((seconds % 86400) / 3600)} h`;
}

const AGES = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

export function ago(unix) {
  if (!unix) return "–";
  const seconds = Math.floor(Date.now() / 1000 - unix);
  const [unit, name] = AGES.find(([size]) => seconds >= size) ?? [];
  return unit ? html`<span class="nowrap" title=${new Date(unix * 1000).toLocaleString()}>${Math.floor(seconds / unit)} ${name} ago</span>` : "now"; // the server's clock may be a little ahead
}

export const chips = (metadata) => Object.entries(metadata ?? {}).map(([k, v]) => html`<span class="chip" title="${k}=${v}">${k}=${v}</span> `);

export const moment = (unix) =>
  unix ? html`<time datetime=${new Date(unix * 1000).toISOString()}>${new Date(unix * 1000).toLocaleString()}</time>` : "–";

export const bytes = (value) => (value ? `${number(value / 2 ** 20)} MiB` : "–");

export const size = (value) =>
  value === null || value === undefined ? "–" : value < 1024 ? `${value} B` : value < 2 ** 20 ? `${number(value / 1024, 1)} KiB` : bytes(value);

export const status = (value) => html`<span class="status" data-status=${value}>${value}</span>`;

export const failure = (error) =>
  error ? html`<p class="notice bad" role="alert">${error.param ? html`<code>${error.param}</code>: ` : nothing}${error.message ?? error}</p>` : nothing;

export const connection = (state) =>
  state === "lost"
    ? html`<p class="notice" role="status">The connection was lost; trying again. What is shown may be old.</p>`
    : state instanceof Error
      ? failure(state)
      : nothing;

export const facts = (pairs) =>
  html`<dl class="facts">${pairs.filter((p) => p).map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;

export const tile = (name, value, unit = "") =>
  html`<div class="tile"><span class="tile-name">${name}</span><span class="tile-value">${value}${unit ? html`<small> ${unit}</small>` : nothing}</span></div>`;

// How far something is: done and failed of a total. The words say the same as the bar.
export function progress(done, failed, total) {
  const share = (n) => (100 * n) / Math.max(total, 1);
  return html`<span class="progress"><svg viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">
      <rect class="c" x="0" y="0" width=${share(done)} height="4"></rect><rect class="lost" x=${share(done)} y="0" width=${share(failed)} height="4"></rect></svg>
    <small>${number(done + failed)} of ${number(total)}${failed ? html`, <b class="bad">${number(failed)} without a result</b>` : nothing}</small></span>`;
}

// A secret that the server shows this once.
export function secret(words, value, done) {
  if (!value) return nothing;
  const copy = async (event) => {
    const field = event.target.closest(".secret").querySelector("input");
    field.select();
    await navigator.clipboard?.writeText(value).catch(() => {}); // without the right to, it is selected at least
  };
  return html`<div class="notice secret" role="status"><p><b>${words}</b> It is shown this once; keep it now.</p>
    <div class="bar"><label class="grow">Secret <input readonly .value=${value} @focus=${(e) => e.target.select()}></label>
      <button type="button" @click=${copy}>Copy</button><button type="button" @click=${done}>I have it</button></div></div>`;
}

export const pages = (number_, older, back, forth) => html`<nav class="bar" aria-label="Pages">
  <button type="button" ?disabled=${number_ === 1} @click=${back}>Newer</button><span>Page ${number_}</span>
  <button type="button" ?disabled=${!older} @click=${forth}>Older</button></nav>`;

// A line over the last values; decoration, the number beside it says the same.
export function sparkline(values) {
  const given = values.filter((v) => v !== null && v !== undefined);
  if (given.length < 2) return nothing;
  const top = Math.max(...given, 1e-9);
  const points = given.map((v, i) => `${((i * 100) / (given.length - 1)).toFixed(1)},${(22 - (20 * v) / top).toFixed(1)}`).join(" ");
  return html`<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true"><polyline points=${points} /></svg>`;
}
