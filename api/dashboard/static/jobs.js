// The list of jobs: filters, pages, newest first; it follows what happens while the first page is shown.

import { ApiError, call } from "./client.js";
import { ago, changed, connection, duration, failure, html, nothing, number, pages, status } from "./ui.js";

const STATES = ["queued", "running", "succeeded", "failed", "cancelled", "expired"];
const PAGE = 25;

export class Jobs {
  title = "Jobs";

  constructor(live, models, query) {
    this.live = live;
    this.models = models;
    this.filters = { status: query.get("status") ?? "", model: query.get("model") ?? "", metadata: query.get("metadata") ?? "" };
    this.cursors = [""];
    this.page = null;
    this.error = null;
  }

  start() {
    this.models.load().catch(() => {}); // its names are missing in the filter; the list itself says why
    this.seen = () => this.cursors.length === 1 && this.load();
    this.live.listeners.add(this.seen);
    this.timer = setInterval(changed, 5000);
    this.load();
  }

  stop() {
    this.live.listeners.delete(this.seen);
    clearInterval(this.timer);
    this.request?.abort();
  }

  async load() {
    this.request?.abort();
    const request = (this.request = new AbortController());
    const params = new URLSearchParams({ limit: PAGE });
    if (this.filters.status) params.set("status", this.filters.status);
    if (this.filters.model) params.set("model", this.filters.model);
    const [name, ...rest] = this.filters.metadata.split("=");
    if (name.trim() && rest.length) params.set(`metadata[${name.trim()}]`, rest.join("=").trim());
    if (this.cursors.at(-1)) params.set("cursor", this.cursors.at(-1));
    try {
      this.page = await call("GET", `v1/jobs?${params}`, undefined, { signal: request.signal });
      this.error = null;
    } catch (error) {
      if (!(error instanceof ApiError)) return; // a newer request took its place
      this.error = error;
    }
    changed();
  }

  filter(name, value) {
    this.filters[name] = value;
    this.cursors = [""];
    const query = new URLSearchParams(Object.entries(this.filters).filter(([, v]) => v));
    history.replaceState(null, "", query.size ? `#/jobs?${query}` : "#/jobs");
    this.load();
  }

  open(event) {
    event.preventDefault();
    const id = new FormData(event.target).get("id").trim();
    if (id) location.hash = `#/jobs/${encodeURIComponent(id)}`;
  }

  render() {
    const f = this.filters;
    return html`${connection(this.live.state)}${failure(this.error)}
      <div class="bar">
        <label>State <select @change=${(e) => this.filter("status", e.target.value)}>
          <option value="">all</option>${STATES.map((s) => html`<option value=${s} ?selected=${s === f.status}>${s}</option>`)}</select></label>
        <label>Model <select @change=${(e) => this.filter("model", e.target.value)}>
          <option value="">all</option>${this.models.list.map((m) => html`<option value=${m.id} ?selected=${m.id === f.model}>${m.id}</option>`)}</select></label>
        <label>Metadata <input placeholder="name=value" .value=${f.metadata} @change=${(e) => this.filter("metadata", e.target.value)}></label>
        <form @submit=${(e) => this.open(e)}><label>Job id <input name="id" placeholder="job_…"></label><button>Open</button></form>
      </div>
      ${this.page ? this.table(this.page) : this.error ? nothing : html`<p role="status">Loading…</p>`}`;
  }

  table(page) {
    if (!page.data.length) return html`<p>No job matches.</p>`;
    return html`<div class="scroll" tabindex="0" role="region" aria-label="Jobs"><table class="cards">
        <thead><tr><th scope="col">Job</th><th scope="col">State</th><th scope="col">Model</th><th scope="col">Rule</th><th scope="col" class="n">Tokens</th><th scope="col" class="n">Time</th><th scope="col">Created</th><th scope="col">Metadata</th></tr></thead>
        <tbody>${page.data.map(
          (job) => html`<tr>
            <td data-name="Job"><a href="#/jobs/${job.id}"><code>${job.id}</code></a>${job.custom_id ? html`<br><small>${job.custom_id}</small>` : nothing}</td>
            <td data-name="State">${status(job.status)}</td>
            <td data-name="Model">${job.model}</td>
            <td data-name="Rule">${job.diffusion?.algorithm ?? "–"}</td>
            <td data-name="Tokens" class="n">${number(job.usage?.completion_tokens ?? job.progress?.tokens_committed)}</td>
            <td data-name="Time" class="n">${job.timing ? duration(job.timing.total_ms / 1000) : "–"}</td>
            <td data-name="Created">${ago(job.created_at)}</td>
            <td data-name="Metadata">${Object.entries(job.metadata ?? {}).map(([k, v]) => html`<span class="chip">${k}=${v}</span> `)}</td>
          </tr>`,
        )}</tbody></table></div>
      ${pages(this.cursors.length, page.has_more, () => { this.cursors.pop(); this.load(); }, () => { this.cursors.push(page.next_cursor); this.load(); })}`;
  }
}
