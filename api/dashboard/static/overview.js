// The first page: what waits, what runs, how fast.

import { ago, bytes, changed, connection, duration, facts, html, nothing, number, sparkline, status, tile } from "./ui.js";
import { watch } from "./watching.js";

const KEPT = 120;

// One stream for the whole page: the overview, and "something changed" for the lists.
export class Live {
  constructor() {
    this.data = null;
    this.state = "";
    this.rates = [];
    this.listeners = new Set();
  }

  stop() {
    this.end?.();
    this.end = null;
  }

  start() {
    this.stop();
    this.end = watch(this, "v1/overview/events", {
      trouble: "PostgreSQL does not answer. Jobs cannot be accepted until it does, and what is shown may be old.",
      seen: (type, data) => {
        this.data = data;
        this.rates = [...this.rates, data.pace.tokens_per_second].slice(-KEPT);
        for (const listener of this.listeners) listener(data);
      },
      until: [],
    });
  }
}

const PARTS = { database: "PostgreSQL", redis: "Redis" };

// Servers that take no writes, and the remedy.
export function problems(list = []) {
  return list.map(
    (p) => html`<p class="notice bad" role="alert"><b>${PARTS[p.part] ?? p.part}: ${p.text}.</b> To fix it: ${p.advice}.</p>`,
  );
}

// Workers that are not there, and why: they never registered, so no table of workers has them.
export function failures(list = []) {
  return list.map(
    (f) => html`<p class="notice bad"><b>A worker could not load ${f.model}</b>${f.hostname ? html` on ${f.hostname}` : nothing}:
      ${f.message ? f.message : html`<code>${f.code}</code>`}
      <small>${f.count > 1 ? html`${number(f.count)} times, last` : nothing} ${ago(f.last_at)}</small></p>`,
  );
}

export function workersTable(workers) {
  if (!workers.length)
    return html`<p>No worker was seen in the last day. <code>vdiff worker</code> starts one.</p>`;
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Workers"><table class="cards">
    <thead><tr><th scope="col">Worker</th><th scope="col">State</th><th scope="col">Model</th><th scope="col">Device</th><th scope="col" class="n">Jobs</th><th scope="col" class="n">Tokens/s</th><th scope="col" class="n">Batch</th><th scope="col" class="n">Memory</th><th scope="col">Last heartbeat</th></tr></thead>
    <tbody>${workers.map(
      (w) => html`<tr>
        <td data-name="Worker"><span><code>${w.id}</code>${w.hostname ? html`<br><small>${w.hostname}, pid ${w.pid}</small>` : nothing}</span></td>
        <td data-name="State">${status(w.state)}</td>
        <td data-name="Model">${w.model}</td>
        <td data-name="Device">${w.device}</td>
        <td data-name="Jobs" class="n">${w.jobs_running} of ${w.slots}</td>
        <td data-name="Tokens/s" class="n">${number(w.recent?.tokens_per_second, 1)}</td>
        <td data-name="Batch" class="n">${number(w.recent?.batch, 1)}</td>
        <td data-name="Memory" class="n">${bytes(w.memory_bytes)}</td>
        <td data-name="Last heartbeat">${ago(w.last_beat_at)}</td>
      </tr>`,
    )}</tbody></table></div>`;
}

export class Overview {
  title = "Overview";

  constructor(live) {
    this.live = live;
  }

  start() {
    this.timer = setInterval(changed, 1000); // ages grow
  }

  stop() {
    clearInterval(this.timer);
  }

  render() {
    const { data, state, rates } = this.live;
    if (!data) return html`${connection(state)}${state instanceof Error ? nothing : html`<p role="status">Loading…</p>`}`;
    const queued = data.queues.reduce((sum, q) => sum + q.jobs, 0);
    const oldest = Math.max(0, ...data.queues.map((q) => q.oldest_seconds));
    const alive = data.workers.filter((w) => w.state === "ready");
    return html`${connection(state)}
      ${problems(data.problems)}
      ${alive.length || state instanceof Error ? nothing : html`<p class="notice">No worker is ready. Jobs are accepted and wait; <code>vdiff worker</code> starts one.</p>`}
      ${failures(data.failures)}
      <section aria-label="Now" class="tiles">
        ${tile("Queued", number(queued))}
        ${tile("Oldest waits", queued ? duration(oldest) : "–")}
        ${tile("Running", number(data.jobs.running))}
        ${tile("Tokens per second", number(data.pace.tokens_per_second, 1))}
        ${tile("Tokens per forward", number(data.pace.tokens_per_forward, 2))}
        ${tile("Batch", number(data.pace.batch, 1))}
        ${tile("Step", number(data.pace.step_ms, 1), data.pace.step_ms == null ? "" : "ms")}
        ${tile("Workers ready", number(alive.length))}
      </section>
      ${rates.length > 1 ? html`<figure class="chart">${sparkline(rates)}<figcaption>Tokens per second since this page was opened</figcaption></figure>` : nothing}
      <section><h2>Jobs ${data.scope === "all" ? "of all keys" : "of this tenant"}</h2>
        <ul class="states">${Object.entries(data.jobs).map(
          ([name, count]) => html`<li><a href="#/jobs?status=${name}">${status(name)} <b>${number(count)}</b></a></li>`,
        )}</ul></section>
      ${Object.values(data.batches).some((n) => n)
        ? html`<section><h2>Open batches</h2><ul class="states">${Object.entries(data.batches).filter(([, n]) => n).map(([name, n]) => html`<li><a href="#/batches">${status(name)} <b>${number(n)}</b></a></li>`)}</ul></section>`
        : nothing}
      <section><h2>Queues</h2>
        ${data.queues.length
          ? html`<div class="scroll" tabindex="0" role="region" aria-label="Queues"><table><thead><tr><th scope="col">Model</th><th scope="col">Priority</th><th scope="col" class="n">Jobs</th><th scope="col" class="n">Oldest</th></tr></thead>
              <tbody>${data.queues.map((q) => html`<tr><td>${q.model}</td><td>${q.priority}</td><td class="n">${number(q.jobs)}</td><td class="n">${duration(q.oldest_seconds)}</td></tr>`)}</tbody></table></div>`
          : html`<p>Nothing waits.</p>`}</section>
      <section><h2>Workers</h2>${workersTable(data.workers.filter((w) => w.state !== "stopped"))}</section>`;
  }
}

export class Workers {
  title = "Workers and models";

  constructor(live, models) {
    this.live = live;
    this.models = models;
  }

  async start() {
    this.timer = setInterval(changed, 1000);
    await this.models.load();
  }

  stop() {
    clearInterval(this.timer);
  }

  render() {
    const { data, state } = this.live;
    return html`${connection(state)}
      <section><h2>Workers of the last day</h2>${failures(data?.failures)}${data ? workersTable(data.workers) : html`<p role="status">Loading…</p>`}</section>
      <section><h2>Models</h2>
        ${this.models.list.length ? nothing : html`<p>No worker has registered a model yet.</p>`}
        ${this.models.list.map(
          (m) => html`<article class="card"><h3>${m.id}</h3>${facts([
            ["Family", m.family],
            ["Workers alive", m.workers],
            ["Device", `${m.device}, ${m.dtype}`],
            ["Slots", m.slots],
            ["Context", `${number(m.context_length)} tokens`],
            ["Vocabulary", number(m.vocab_size)],
            ["Revision", html`<code>${m.revision ?? "–"}</code>`],
          ])}<p>Rules: ${(m.capabilities.algorithms ?? []).map((r) => html`<code class="chip">${r}</code> `)}</p></article>`,
        )}</section>`;
  }
}
