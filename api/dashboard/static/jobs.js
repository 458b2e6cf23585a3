// The list of jobs, with its filters.

import { Listing } from "./listing.js";
import { ago, chips, duration, html, nothing, number, status } from "./ui.js";

const STATES = ["queued", "running", "succeeded", "failed", "cancelled", "expired"];
const PAGE = 25;

export class Jobs extends Listing {
  title = "Jobs";

  constructor(live, models, query) {
    super(live, { path: "v1/jobs", size: PAGE, cursor: "cursor" });
    this.models = models;
    this.filters = { status: query.get("status") ?? "", model: query.get("model") ?? "", metadata: query.get("metadata") ?? "" };
  }

  start() {
    this.models.load().catch(() => {}); // its names are missing in the filter; the list itself says why
    super.start();
  }

  query() {
    const { status, model, metadata } = this.filters;
    const [name, ...rest] = metadata.split("=");
    const labels = name.trim() && rest.length ? { [`metadata[${name.trim()}]`]: rest.join("=").trim() } : {};
    return { ...(status ? { status } : {}), ...(model ? { model } : {}), ...labels };
  }

  filter(name, value) {
    this.filters[name] = value;
    const query = new URLSearchParams(Object.entries(this.filters).filter(([, v]) => v));
    history.replaceState(null, "", query.size ? `#/jobs?${query}` : "#/jobs");
    this.restart();
  }

  open(event) {
    event.preventDefault();
    const id = new FormData(event.target).get("id").trim();
    if (id) location.hash = `#/jobs/${encodeURIComponent(id)}`;
  }

  render() {
    const f = this.filters;
    return html`${this.trouble()}
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
            <td data-name="Job"><span><a href="#/jobs/${job.id}"><code>${job.id}</code></a>${job.custom_id ? html`<small class="clip">${job.custom_id}</small>` : nothing}</span></td>
            <td data-name="State">${status(job.status)}</td>
            <td data-name="Model" class="name">${job.model}</td>
            <td data-name="Rule">${job.diffusion?.algorithm ?? "–"}</td>
            <td data-name="Tokens" class="n">${number(job.usage?.completion_tokens ?? job.progress?.tokens_committed)}</td>
            <td data-name="Time" class="n">${job.timing ? duration(job.timing.total_ms / 1000) : "–"}</td>
            <td data-name="Created">${ago(job.created_at)}</td>
            <td data-name="Metadata">${chips(job.metadata)}</td>
          </tr>`,
        )}</tbody></table></div>
      ${this.pager()}`;
  }
}
