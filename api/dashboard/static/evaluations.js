// Evaluations: the list, and one with its configurations, plots and answers, those that went wrong first.

import { call, download, key, wholes } from "./client.js";
import { inWords, verdict } from "./graders.js";
import { Listing } from "./listing.js";
import { latencies, scatter, whiskers } from "./plots.js";
import { ago, changed, connection, duration, facts, failure, html, moment, nothing, number, progress, status } from "./ui.js";
import { watch } from "./watching.js";

const PAGE = 20;
const ITEMS = 50;
const keyOf = (item) => `${item.urls.self} ${item.outcome} ${item.latency_ms}`; // of what an answer is now
const OVER = ["completed", "failed", "cancelled"];
const OUTCOMES = ["error", "failed", "passed"];
const share = (value) => (value === null || value === undefined ? "–" : `${number(100 * value, 1)} %`);

// The fields of a configuration, those of `diffusion` under their own names.
const settings = (fields) =>
  Object.entries(fields).flatMap(([k, v]) => (k === "diffusion" ? settings(v) : [[k, typeof v === "object" ? JSON.stringify(v) : String(v)]]));

export class Evaluations extends Listing {
  title = "Evaluations";

  constructor(live, form) {
    super(live, { path: "v1/evaluations", size: PAGE });
    this.form = form;
  }

  stop() {
    super.stop();
    this.form.leave();
  }

  render() {
    return html`${this.trouble()}${this.form.render(this.page?.data.length === 0)}
      ${this.page ? this.table(this.page) : this.error ? nothing : html`<p role="status">Loading…</p>`}`;
  }

  table(page) {
    if (!page.data.length) return html`<p>No evaluation yet.</p>`;
    return html`<div class="scroll" tabindex="0" role="region" aria-label="Evaluations"><table class="cards">
        <thead><tr><th scope="col">Evaluation</th><th scope="col">State</th><th scope="col">Graded</th><th scope="col" class="n">Items</th><th scope="col">Configurations</th><th scope="col">Created</th></tr></thead>
        <tbody>${page.data.map(
          (e) => html`<tr>
            <td data-name="Evaluation"><span><a href="#/evaluations/${e.id}">${e.name || e.id}</a>${e.name ? html`<br><small><code>${e.id}</code></small>` : nothing}</span></td>
            <td data-name="State">${status(e.status)}</td>
            <td data-name="Graded">${progress(e.progress.graded, 0, e.progress.total)}</td>
            <td data-name="Items" class="n">${number(e.items)}</td>
            <td data-name="Configurations"><span>${e.configurations.map((c) => html`<span class="chip">${c.name}</span> `)}</span></td>
            <td data-name="Created">${ago(e.created_at)}</td></tr>`,
        )}</tbody></table></div>
      ${this.pager()}`;
  }
}

export class Evaluation {
  constructor(id) {
    this.id = id;
    this.title = `Evaluation ${id}`;
    this.evaluation = null;
    this.report = null;
    this.items = [];
    this.kept = new Map(); // answers with their texts
    this.cursor = null;
    this.filter = { configuration: "", outcome: "" };
    this.error = null;
    this.said = "";
    this.state = "";
  }

  get path() {
    return `v1/evaluations/${encodeURIComponent(this.id)}`;
  }

  start() {
    this.end = watch(this, `${this.path}/events`, {
      seen: (type, data) => {
        const before = this.evaluation?.progress.graded;
        this.evaluation = data;
        if (OVER.includes(data.status)) this.said = "";
        if (before !== data.progress.graded && this.items.length <= ITEMS) this.load();
        if (type === "done") this.compare();
      },
    });
  }

  stop() {
    this.end?.();
  }

  async load(more = false) {
    const params = new URLSearchParams({ limit: ITEMS });
    for (const [name, value] of Object.entries(this.filter)) if (value) params.set(name, value);
    if (more) params.set("cursor", this.cursor);
    try {
      const page = await call("GET", `${this.path}/items?${params}`);
      this.items = more ? [...this.items, ...page.data] : page.data;
      this.cursor = page.next_cursor;
      changed();
      await wholes(this.kept, page.data, keyOf);
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  async compare() {
    try {
      this.report = await call("GET", `${this.path}/report?format=json`);
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  async cancel() {
    try {
      this.evaluation = await call("POST", `${this.path}/cancel`);
      this.said = "A stop was asked for.";
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  async save() {
    try {
      await download(`${this.path}/report?format=html`, `${this.id}.html`);
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  render() {
    const e = this.evaluation;
    if (!e) return html`<h1>Evaluation</h1>${connection(this.state)}${failure(this.error)}${this.state instanceof Error ? nothing : html`<p role="status">Loading…</p>`}`;
    return html`<p class="path"><a href="#/evaluations">Evaluations</a> / <code>${e.id}</code></p>
      ${OVER.includes(e.status) ? nothing : connection(this.state)}${failure(this.error)}
      <div class="bar"><span role="status">${status(e.status)} <b>${e.name}</b> ${this.said}</span>
        ${e.status === "in_progress" ? html`<button @click=${() => this.cancel()}>Cancel</button>` : nothing}
        <button @click=${() => this.save()}>Save the report</button>
        ${key.get() ? nothing : html`<a href="${this.path}/report?format=html" target="_blank" rel="noopener">Report as a page</a>`}</div>
      <section><h2>Graded</h2><div class="wide">${progress(e.progress.graded, 0, e.progress.total)}</div></section>
      <section><h2>Configurations</h2>${this.configurations(e)}</section>
      ${this.plots(e)}${this.comparisons()}
      <section><h2>Facts</h2>${facts([
        ["Items", number(e.items)],
        ["Endpoint", html`<code>${e.endpoint}</code>`],
        ["Created", moment(e.created_at)],
        ["Finished", moment(e.finished_at)],
        ...Object.entries(e.metadata ?? {}),
      ])}
        <h3>An answer passes when</h3>${inWords(e.graders)}<details><summary>Template</summary><pre class="text">${typeof e.template === "string" ? e.template : JSON.stringify(e.template, null, 2)}</pre></details></section>
      <section><h2>Answers</h2>${this.answers(e)}</section>`;
  }

  configurations(e) {
    const cells = (c) => {
      const r = c.results;
      const a = r?.accuracy;
      return html`<td data-name="Accuracy" class="n">${a ? html`<span>${share(a.mean)}<br><small>${share(a.low)} to ${share(a.high)}</small></span>` : "–"}</td>
        <td data-name="Passed, failed, errors" class="n">${number(c.progress.passed)}, ${number(c.progress.failed)}, ${number(c.progress.error)}</td>
        <td data-name="Tokens per forward" class="n">${number(r?.tokens_per_forward, 2)}</td>
        <td data-name="Latency p50, p95" class="n">${r?.latency_ms.p50 ? `${duration(r.latency_ms.p50 / 1000)}, ${duration(r.latency_ms.p95 / 1000)}` : "–"}</td>`;
    };
    return html`<div class="scroll" tabindex="0" role="region" aria-label="Configurations"><table class="cards">
      <thead><tr><th scope="col">Configuration</th><th scope="col">State</th><th scope="col" class="n">Accuracy, 95 %</th><th scope="col" class="n">Passed, failed, errors</th><th scope="col" class="n">Tokens per forward</th><th scope="col" class="n">Latency p50, p95</th></tr></thead>
      <tbody>${e.configurations.map(
        (c) => html`<tr><td data-name="Configuration"><span>${c.name}<br><small>${c.model} ${settings(c.fields).map(([k, v]) => html`<span class="chip">${k}=${v}</span> `)}</small></span></td>
          <td data-name="State"><span>${status(c.status)}${c.error ? html`<br><small class="bad">${c.error.code}: ${c.error.message}</small>` : nothing}${c.waiting_for ? html`<br><small>no live worker serves ${c.model}; its jobs wait until ${moment(c.expires_at)}</small>` : nothing}
            ${c.top_errors.map((t) => html`<br><small class="bad">${number(t.count)} × ${t.code}</small>`)}</span></td>${cells(c)}</tr>`,
      )}</tbody></table></div>`;
  }

  plots(e) {
    const known = e.configurations.filter((c) => c.results?.accuracy);
    if (!known.length) return nothing;
    return html`<section><h2>Plots</h2><div class="sides">
      ${whiskers(known.map((c) => ({ name: c.name, ...c.results.accuracy })))}
      ${scatter(known.filter((c) => c.results.tokens_per_forward).map((c) => ({ name: c.name, x: c.results.tokens_per_forward, ...c.results.accuracy })))}
      ${this.report ? latencies(Object.entries(this.report.latency_curves).filter(([, points]) => points.length)) : nothing}</div></section>`;
  }

  comparisons() {
    if (!this.report?.comparisons.length) return nothing;
    return html`<section><h2>Compared on the same questions</h2><div class="scroll" tabindex="0" role="region" aria-label="Comparisons"><table class="cards">
      <thead><tr><th scope="col">Which</th><th scope="col" class="n">Difference, 95 %</th><th scope="col" class="n">p (McNemar)</th><th scope="col" class="n">Smallest difference that would show</th></tr></thead>
      <tbody>${this.report.comparisons.map(
        (c) => html`<tr><td data-name="Which">${c.second_name} against ${c.first_name}</td>
          <td data-name="Difference" class="n"><span>${share(c.difference)}<br><small>${share(c.low)} to ${share(c.high)}</small></span></td>
          <td data-name="p (McNemar)" class="n">${number(c.mcnemar.p_value, 3)}</td>
          <td data-name="Smallest difference" class="n">${share(c.minimum_detectable_effect)}</td></tr>`,
      )}</tbody></table></div></section>`;
  }

  answers(e) {
    const choose = (name) => (event) => { this.filter[name] = event.target.value; this.load(); };
    return html`<div class="bar">
        <label>Configuration <select @change=${choose("configuration")}><option value="">all</option>${e.configurations.map((c) => html`<option value=${c.name} ?selected=${c.name === this.filter.configuration}>${c.name}</option>`)}</select></label>
        <label>Outcome <select @change=${choose("outcome")}><option value="">all, failures first</option>${OUTCOMES.map((o) => html`<option value=${o} ?selected=${o === this.filter.outcome}>${o}</option>`)}</select></label></div>
      ${this.items.length
        ? html`<div class="scroll" tabindex="0" role="region" aria-label="Answers"><table class="cards">
          <thead><tr><th scope="col" class="n">Line</th><th scope="col">Outcome</th><th scope="col">Configuration</th><th scope="col">Item</th><th scope="col">Answer</th><th scope="col">Graders</th></tr></thead>
          <tbody>${this.items.map((item) => ({ ...item, ...this.kept.get(keyOf(item)) })).map(
            (i) => html`<tr><td data-name="Line" class="n">${i.job_id ? html`<a href="#/jobs/${i.job_id}">${i.line}</a>` : i.line}</td>
              <td data-name="Outcome">${status(i.outcome)}</td><td data-name="Configuration">${i.configuration}</td>
              <td data-name="Item"><span class="clip">${Object.entries(i.data ?? {}).map(([k, v]) => html`<b>${k}</b> ${typeof v === "string" ? v : JSON.stringify(v)} `)}</span></td>
              <td data-name="Answer"><span class="clip">${i.error ? html`<span class="bad">${i.error.code}: ${i.error.message}</span>` : i.output}</span></td>
              <td data-name="Graders"><span class="clip"><small>${(i.graders ?? []).map((v, n) => html`${n ? "; " : nothing}${verdict(v)}`)}</small></span></td></tr>`,
          )}</tbody></table></div>`
        : html`<p>None.</p>`}
      ${this.cursor ? html`<button @click=${() => this.load(true)}>Show more</button>` : nothing}`;
  }
}
