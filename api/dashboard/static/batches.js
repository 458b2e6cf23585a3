// Batches: the list, and one batch with its lines, those that failed first.

import { call, download, wholes } from "./client.js";
import { Listing } from "./listing.js";
import { ago, changed, chips, connection, duration, facts, failure, html, moment, nothing, number, progress, size, status } from "./ui.js";
import { watch } from "./watching.js";

const PAGE = 20;
const LINES = 50;
const OVER = ["failed", "completed", "expired", "cancelled"];
const FAILURES_FIRST = ["failed", "expired", "cancelled", "running", "queued", "succeeded"];
const keyOf = (item) => `${item.line} ${item.status} ${item.attempts}`; // of what a line is now

const counts = (batch) => progress(batch.request_counts.completed, batch.request_counts.failed, batch.request_counts.total);

export class Batches extends Listing {
  title = "Batches";

  constructor(live, form) {
    super(live, { path: "v1/batches", size: PAGE });
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
    if (!page.data.length) return html`<p>No batch yet.</p>`;
    return html`<div class="scroll" tabindex="0" role="region" aria-label="Batches"><table class="cards">
        <thead><tr><th scope="col">Batch</th><th scope="col">State</th><th scope="col">Lines</th><th scope="col">Model</th><th scope="col">Endpoint</th><th scope="col">Created</th><th scope="col">Metadata</th></tr></thead>
        <tbody>${page.data.map(
          (b) => html`<tr>
            <td data-name="Batch"><a href="#/batches/${b.id}"><code>${b.id}</code></a></td>
            <td data-name="State"><span>${status(b.status)}${b.outcome && b.outcome !== "all_succeeded" ? html`<br><small>${b.outcome.replaceAll("_", " ")}</small>` : nothing}</span></td>
            <td data-name="Lines">${b.request_counts.total ? counts(b) : "–"}</td>
            <td data-name="Model">${b.model ?? "–"}</td>
            <td data-name="Endpoint"><code>${b.endpoint}</code></td>
            <td data-name="Created">${ago(b.created_at)}</td>
            <td data-name="Metadata">${chips(b.metadata)}</td>
          </tr>`,
        )}</tbody></table></div>
      ${this.pager()}`;
  }
}

export class Batch {
  constructor(id) {
    this.id = id;
    this.title = `Batch ${id}`;
    this.batch = null;
    this.files = {};
    this.kept = new Map(); // lines with their responses
    this.items = [];
    this.more = false;
    this.wanted = LINES;
    this.filter = "";
    this.error = null;
    this.said = "";
    this.state = "";
  }

  get path() {
    return `v1/batches/${encodeURIComponent(this.id)}`;
  }

  start() {
    this.timer = setInterval(changed, 5000);
    this.listen();
  }

  stop() {
    this.end?.();
    clearInterval(this.timer);
  }

  listen() {
    this.end?.();
    this.end = watch(this, `${this.path}/events`, {
      seen: (type, data) => {
        this.batch = data;
        if (OVER.includes(data.status)) this.said = "";
        this.load();
      },
    });
  }

  // The lines of one state after the other, until there are enough: those that failed come first.
  async load() {
    if (this.loading) {
      this.again = true;
      return;
    }
    this.loading = true;
    const by = this.batch.vdiff.jobs;
    const states = this.filter ? [this.filter] : FAILURES_FIRST.filter((s) => (by ? by[s] : OVER.includes(this.batch.status)));
    const found = [];
    let more = false;
    try {
      for (const state of states) {
        let cursor = "";
        do {
          const params = new URLSearchParams({ status: state, limit: Math.min(1000, this.wanted + 1 - found.length), ...(cursor ? { cursor } : {}) });
          const page = await call("GET", `${this.path}/items?${params}`);
          found.push(...page.data);
          cursor = page.next_cursor;
        } while (cursor && found.length <= this.wanted);
        more = found.length > this.wanted;
        if (more) break;
      }
      this.items = found.slice(0, this.wanted);
      this.more = more;
      changed();
      await wholes(this.kept, this.items.filter((item) => item.status === "succeeded" && !item.purged), keyOf);
      await this.names();
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    this.loading = false;
    changed();
    if (this.again) {
      this.again = false;
      this.load();
    }
  }

  async names() {
    for (const id of [this.batch.input_file_id, this.batch.output_file_id, this.batch.error_file_id])
      if (id && !(id in this.files)) this.files[id] = await call("GET", `v1/files/${id}`).catch(() => null); // deleted meanwhile
  }

  async act(name, words) {
    this.said = "";
    try {
      const answer = await call("POST", `${this.path}/${name}`);
      this.said = words(answer);
      this.batch = answer;
      this.error = null;
      this.listen();
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  async save(file) {
    try {
      await download(`v1/files/${file.id}/content`, file.filename);
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  render() {
    const b = this.batch;
    if (!b) return html`<h1>Batch</h1>${connection(this.state)}${failure(this.error)}${this.state instanceof Error ? nothing : html`<p role="status">Loading…</p>`}`;
    const over = OVER.includes(b.status);
    const file = (words, id) => {
      const found = this.files[id];
      return found ? html`<button @click=${() => this.save(found)}>${words} <small>${size(found.bytes)}</small></button>` : nothing;
    };
    return html`<p class="path"><a href="#/batches">Batches</a> / <code>${b.id}</code></p>
      ${over ? nothing : connection(this.state)}${failure(this.error)}
      <div class="bar"><span role="status">${status(b.status)} ${this.said}</span>
        ${["validating", "in_progress"].includes(b.status) ? html`<button @click=${() => this.act("cancel", () => "A stop was asked for.")}>Cancel</button>` : nothing}
        ${b.request_counts.failed && (over || b.status === "in_progress") ? html`<button @click=${() => this.act("retry_failed", (a) => `Lines that run again: ${number(a.retried)}.`)}>Retry failed</button>` : nothing}
        ${file("Output file", b.output_file_id)}${file("Error file", b.error_file_id)}${file("Input file", b.input_file_id)}
      </div>
      ${this.problems(b)}
      <section><h2>Lines</h2>${b.request_counts.total ? html`<div class="wide">${counts(b)}</div>` : html`<p role="status">${over ? "No line became a job." : "The lines are being checked."}</p>`}
        ${b.vdiff.jobs ? html`<ul class="states">${Object.entries(b.vdiff.jobs).map(([name, n]) => html`<li>${status(name)} <b>${number(n)}</b></li>`)}</ul>` : nothing}
        ${b.top_errors?.length ? html`<h3>Most frequent errors</h3><ul>${b.top_errors.map((e) => html`<li>${number(e.count)} × <code>${e.code}</code>: ${e.message}</li>`)}</ul>` : nothing}</section>
      <section><h2>Facts</h2>${facts([
        ["Endpoint", html`<code>${b.endpoint}</code>`],
        ["Model", b.model ?? "–"],
        ["Window", b.completion_window],
        ["Created", moment(b.created_at)],
        ["Started", moment(b.in_progress_at)],
        over ? ["Ended", moment(b.completed_at ?? b.failed_at ?? b.expired_at ?? b.cancelled_at)] : ["Ends by", moment(b.expires_at)],
        b.outcome && ["Outcome", b.outcome.replaceAll("_", " ")],
        b.usage && ["Tokens", `${number(b.usage.input_tokens)} in, ${number(b.usage.output_tokens)} out`],
        ...Object.entries(b.metadata ?? {}),
      ])}</section>
      <section><h2>Items</h2>
        <div class="bar"><label>Show <select @change=${(e) => { this.filter = e.target.value; this.wanted = LINES; this.load(); }}>
          <option value="">all, failures first</option>${FAILURES_FIRST.map((s) => html`<option value=${s} ?selected=${s === this.filter}>${s}</option>`)}</select></label></div>
        ${this.items.length ? this.table() : html`<p>None.</p>`}
        ${this.more ? html`<button @click=${() => { this.wanted += LINES; this.load(); }}>Show more</button>` : nothing}</section>`;
  }

  problems(b) {
    if (!b.errors?.data.length) return nothing;
    return html`<section><h2>Why it failed</h2><p>No line ran.</p><div class="scroll" tabindex="0" role="region" aria-label="Errors"><table class="cards">
      <thead><tr><th scope="col" class="n">Line</th><th scope="col">Field</th><th scope="col">Code</th><th scope="col">What</th></tr></thead>
      <tbody>${b.errors.data.map((e) => html`<tr><td data-name="Line" class="n">${e.line ?? "–"}</td><td data-name="Field">${e.param ?? "–"}</td><td data-name="Code"><code>${e.code}</code></td><td data-name="What">${e.message}</td></tr>`)}</tbody></table></div></section>`;
  }

  table() {
    const end = (item) => item.error?.message ?? null;
    return html`<div class="scroll" tabindex="0" role="region" aria-label="Items"><table class="cards">
      <thead><tr><th scope="col" class="n">Line</th><th scope="col">Custom id</th><th scope="col">State</th><th scope="col" class="n">Tokens</th><th scope="col" class="n">Time</th><th scope="col" class="n">Attempts</th><th scope="col">Answer or error</th></tr></thead>
      <tbody>${this.items.map((item) => {
        const choice = this.kept.get(keyOf(item))?.response?.body?.choices?.[0];
        const words = end(item) ?? choice?.message?.content ?? choice?.text ?? (item.purged ? "purged" : "");
        return html`<tr><td data-name="Line" class="n">${item.line}</td>
          <td data-name="Custom id"><a href="#/jobs/${item.job_id}">${item.custom_id}</a></td>
          <td data-name="State">${status(item.status)}</td>
          <td data-name="Tokens" class="n">${number(item.usage?.completion_tokens)}</td>
          <td data-name="Time" class="n">${item.timing ? duration(item.timing.total_ms / 1000) : "–"}</td>
          <td data-name="Attempts" class="n">${item.attempts}</td>
          <td data-name="Answer"><span class="clip ${end(item) ? "bad" : ""}">${words.slice(0, 300)}</span></td></tr>`;
      })}</tbody></table></div>`;
  }
}
