// Deliveries of webhooks with every attempt: of an endpoint, or of a job. They are told as they change.

import { call, follow } from "./client.js";
import { ago, changed, connection, duration, failure, html, nothing, number, status } from "./ui.js";

export class Deliveries {
  // `query`: {endpoint_id} or {job_id}; `onChange` hears that one of them moved
  constructor(query, onChange = () => {}) {
    this.onChange = onChange;
    this.query = query;
    this.newest = null;
    this.older = [];
    this.cursor = null;
    this.error = null;
    this.said = "";
    this.state = "";
  }

  start() {
    this.stop();
    this.end = follow(
      `v1/deliveries/events?${new URLSearchParams(this.query)}`,
      (type, data) => {
        if (type === "deliveries") {
          this.newest = data.data;
          if (!this.older.length) this.cursor = data.next_cursor;
          this.onChange();
        }
        changed();
      },
      (state) => {
        this.state = state;
        changed();
      },
    );
  }

  stop() {
    this.end?.();
  }

  async more() {
    const { endpoint_id: endpoint, job_id: job } = this.query;
    const path = endpoint ? `v1/webhook_endpoints/${endpoint}/deliveries?` : `v1/deliveries?job_id=${job}&`;
    try {
      const page = await call("GET", `${path}cursor=${this.cursor}`);
      this.older = [...this.older, ...page.data];
      this.cursor = page.next_cursor;
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  async again(delivery) {
    this.said = "";
    try {
      await call("POST", `v1/deliveries/${delivery.id}/redeliver`);
      this.said = `${delivery.type} is sent again.`;
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  render() {
    if (this.state instanceof Error) return failure(this.state);
    if (!this.newest) return html`${connection(this.state)}<p role="status">Loading…</p>`;
    const known = new Set(this.newest.map((d) => d.id));
    const all = [...this.newest, ...this.older.filter((d) => !known.has(d.id))];
    return html`${connection(this.state)}${failure(this.error)}<p role="status">${this.said}</p>
      ${all.length ? this.table(all) : html`<p>Nothing was sent${this.query.job_id ? " about this job" : ""} yet.</p>`}
      ${this.cursor ? html`<button type="button" @click=${() => this.more()}>Show older</button>` : nothing}`;
  }

  table(all) {
    const byJob = Boolean(this.query.job_id);
    return html`<div class="scroll" tabindex="0" role="region" aria-label="Deliveries"><table class="cards">
      <thead><tr><th scope="col">Event</th><th scope="col">State</th><th scope="col">${byJob ? "To" : "Job"}</th><th scope="col">Attempts</th><th scope="col">Created</th><th scope="col"><span class="hidden">Actions</span></th></tr></thead>
      <tbody>${all.map(
        (d) => html`<tr>
          <td data-name="Event"><span>${d.type}<br><small><code>${d.event_id}</code></small></span></td>
          <td data-name="State"><span>${status(d.status)}${d.next_attempt_at && d.attempts.length ? html`<br><small>${d.next_attempt_at > Date.now() / 1000 + 1 ? `again in ${duration(d.next_attempt_at - Date.now() / 1000)}` : "again now"}</small>` : nothing}</span></td>
          <td data-name=${byJob ? "To" : "Job"}>${byJob ? (d.endpoint_id ? html`<a href="#/webhooks/${d.endpoint_id}">${d.endpoint_id}</a>` : html`<span class="clip">${d.url}</span>`) : d.job_id ? html`<a href="#/jobs/${d.job_id}"><code>${d.job_id}</code></a>` : "–"}</td>
          <td data-name="Attempts">${d.attempts.length ? html`<ol class="attempts">${d.attempts.map((a) => html`<li>${a.error ?? `status ${a.status_code}`} <small>${number(a.duration_ms)} ms, ${ago(a.created_at)}</small></li>`)}</ol>` : "none yet"}</td>
          <td data-name="Created">${ago(d.created_at)}</td>
          <td data-name=""><button type="button" aria-label="Redeliver ${d.type}, ${d.event_id}" @click=${() => this.again(d)}>Redeliver</button></td></tr>`,
      )}</tbody></table></div>`;
  }
}
