// Webhook endpoints: the list, a new one, and one with its deliveries.

import { call } from "./client.js";
import { Deliveries } from "./deliveries.js";
import { ago, changed, facts, failure, html, moment, nothing, number, secret, status } from "./ui.js";

const STATUSES = ["failed", "discarded", "delivered"];
const state = (e) => (e.enabled ? status("enabled") : html`${status("disabled")}${e.disabled_reason ? html` <small>${e.disabled_reason}</small>` : nothing}`);

export class Webhooks {
  title = "Webhooks";

  constructor() {
    this.list = null;
    this.types = [];
    this.error = null;
    this.refused = null;
    this.fresh = null;
  }

  start() {
    this.timer = setInterval(changed, 5000);
    return this.load();
  }

  stop() {
    clearInterval(this.timer);
    this.fresh = null; // a secret does not stay on a page that was left
  }

  async load() {
    try {
      this.list = (await call("GET", "v1/webhook_endpoints?limit=100")).data; // a tenant has no more
      this.types = (await call("GET", "v1/webhook_event_types")).data.filter((t) => t.type !== "webhook.test");
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  async create(event) {
    event.preventDefault();
    const form = event.target;
    const given = new FormData(form);
    const body = { url: given.get("url").trim(), events: given.getAll("events"), inline_result: given.has("inline_result") };
    if (given.get("description")) body.description = given.get("description");
    const [name, ...rest] = given.get("filter").split("=");
    if (name.trim()) body.metadata_filter = { [name.trim()]: rest.join("=").trim() };
    try {
      this.fresh = await call("POST", "v1/webhook_endpoints", body);
      this.refused = null;
      form.reset();
    } catch (error) {
      this.refused = error;
    }
    await this.load();
  }

  render() {
    return html`${failure(this.error)}
      ${this.fresh ? html`${secret(`The secret that signs what goes to ${this.fresh.url}.`, this.fresh.secret, () => { this.fresh = null; changed(); })}` : nothing}
      <details class="card" ?open=${this.list?.length === 0}><summary>New endpoint</summary>
        <form @submit=${(e) => this.create(e)}>
          <label class="block">URL <input name="url" required type="url" placeholder="https://example.com/hook"></label>
          <fieldset class="checks"><legend>Events</legend>${this.types.map((t) => html`<label><input type="checkbox" name="events" value=${t.type} ?checked=${t.default}> ${t.type} <small>${t.description}</small></label>`)}</fieldset>
          <div class="bar"><label>Description <input name="description" maxlength="500"></label>
            <label>Only jobs with metadata <input name="filter" placeholder="name=value"></label>
            <label><input type="checkbox" name="inline_result"> Put small results into the event</label>
            <button class="primary">Create</button></div></form>${failure(this.refused)}</details>
      ${this.list ? this.table() : this.error ? nothing : html`<p role="status">Loading…</p>`}`;
  }

  table() {
    if (!this.list.length) return html`<p>No endpoint yet. Jobs can also name a receiver of their own.</p>`;
    return html`<div class="scroll" tabindex="0" role="region" aria-label="Endpoints"><table class="cards">
      <thead><tr><th scope="col">Endpoint</th><th scope="col">State</th><th scope="col">Events</th><th scope="col">Last success</th><th scope="col">Created</th></tr></thead>
      <tbody>${this.list.map(
        (e) => html`<tr><td data-name="Endpoint"><span><a href="#/webhooks/${e.id}">${e.url}</a>${e.description ? html`<br><small>${e.description}</small>` : nothing}</span></td>
          <td data-name="State"><span>${state(e)}</span></td>
          <td data-name="Events"><span>${e.events.map((t) => html`<span class="chip">${t}</span> `)}</span></td>
          <td data-name="Last success">${ago(e.last_success_at)}</td><td data-name="Created">${ago(e.created_at)}</td></tr>`,
      )}</tbody></table></div>`;
  }
}

export class Webhook {
  constructor(id) {
    this.id = id;
    this.title = `Webhook ${id}`;
    this.endpoint = null;
    this.error = null;
    this.fresh = "";
    this.said = "";
    this.sure = false;
    this.deliveries = new Deliveries({ endpoint_id: id }, () => this.refresh()); // a receiver that fails for long is disabled
  }

  get path() {
    return `v1/webhook_endpoints/${encodeURIComponent(this.id)}`;
  }

  async start() {
    this.timer = setInterval(changed, 5000);
    await this.ask("GET", "", undefined, "");
    if (this.endpoint) this.deliveries.start();
  }

  async refresh() {
    this.endpoint = await call("GET", this.path).catch(() => this.endpoint);
    changed();
  }

  stop() {
    clearInterval(this.timer);
    this.fresh = "";
    this.deliveries.stop();
  }

  // `words`: what is said when it worked, made from the answer
  async ask(method, name, body, words) {
    this.said = "";
    try {
      const answer = await call(method, this.path + name, body);
      if (answer.object === "webhook_endpoint") {
        this.fresh = answer.secret ?? "";
        this.endpoint = answer;
      }
      this.said = typeof words === "function" ? words(answer) : words;
      this.error = null;
      if (method === "DELETE") location.hash = "#/webhooks";
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  again(event) {
    event.preventDefault();
    const given = new FormData(event.target);
    const moment_ = (name) => new Date(given.get(name)).getTime() / 1000;
    const body = { since: moment_("since"), statuses: given.getAll("statuses") };
    if (given.get("until")) body.until = moment_("until");
    this.ask("POST", "/redeliver", body, (a) => `Sent again: ${number(a.count)}.`);
  }

  render() {
    const e = this.endpoint;
    if (!e) return html`<h1>Webhook</h1>${failure(this.error)}${this.error ? nothing : html`<p role="status">Loading…</p>`}`;
    return html`<p class="path"><a href="#/webhooks">Webhooks</a> / <code>${e.id}</code></p>
      ${failure(this.error)}
      ${secret("The new secret. Until tomorrow both sign.", this.fresh, () => { this.fresh = ""; changed(); })}
      <div class="bar"><span role="status">${state(e)} ${this.said}</span>
        <button @click=${() => this.ask("POST", "/test", undefined, "A test event is on its way.")} ?disabled=${!e.enabled}>Send a test</button>
        <button @click=${() => this.ask("POST", "/rotate_secret", undefined, "")}>Rotate secret</button>
        <button @click=${() => this.ask("POST", "", { enabled: !e.enabled }, "")}>${e.enabled ? "Disable" : "Enable"}</button>
        ${this.sure
          ? html`<button class="danger" @click=${() => this.ask("DELETE", "", undefined, "")}>Delete it and its deliveries</button><button @click=${() => { this.sure = false; changed(); }}>Keep</button>`
          : html`<button @click=${() => { this.sure = true; changed(); }}>Delete</button>`}
      </div>
      <section><h2>Facts</h2>${facts([
        ["URL", html`<code>${e.url}</code>`],
        e.description && ["Description", e.description],
        ["Events", e.events.join(", ")],
        Object.keys(e.metadata_filter).length && ["Only jobs with", Object.entries(e.metadata_filter).map(([k, v]) => `${k}=${v}`).join(", ")],
        ["Results in the event", e.inline_result ? "small ones" : "no"],
        ["Last success", e.last_success_at ? moment(e.last_success_at) : "none yet"],
        ["Created", moment(e.created_at)],
      ])}</section>
      <section><h2>Deliveries</h2>${this.deliveries.render()}
        <details class="card"><summary>Send a span of time again</summary><form @submit=${(event) => this.again(event)}><div class="bar">
          <label>Since <input type="datetime-local" name="since" required></label><label>Until <input type="datetime-local" name="until"></label>
          ${STATUSES.map((s) => html`<label><input type="checkbox" name="statuses" value=${s} ?checked=${s !== "delivered"}> ${s}</label>`)}
          <button>Redeliver them</button></div></form></details></section>`;
  }
}
