// API keys of the tenant, for a key of scope admin: make, rotate, revoke.

import { call } from "./client.js";
import { ago, changed, facts, failure, html, moment, nothing, number, pages, secret, status } from "./ui.js";

const SCOPES = [["jobs", "jobs, and OpenAI's endpoints"], ["batches", "files and batches"], ["webhooks", "webhook endpoints and deliveries"], ["admin", "everything, keys and metrics too"]];
const LIMITS = [["requests_per_minute", "Requests per minute"], ["max_queued_jobs", "Queued jobs"], ["max_queued_tokens", "Queued tokens"]];
const PAGE = 50;

export class Keys {
  title = "API keys";

  constructor() {
    this.self = null;
    this.cursors = [""];
    this.page = null;
    this.error = null;
    this.refused = null;
    this.fresh = null;
    this.sure = ""; // what is about to be revoked or rotated, and how
  }

  start() {
    this.timer = setInterval(changed, 5000);
    return this.load();
  }

  stop() {
    clearInterval(this.timer);
    this.fresh = null; // a key does not stay on a page that was left
  }

  async load() {
    try {
      this.self = await call("GET", "v1/keys/self");
      const cursor = this.cursors.at(-1);
      if (this.self.scopes.includes("admin")) this.page = await call("GET", `v1/keys?limit=${PAGE}${cursor ? `&cursor=${cursor}` : ""}`);
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
    const body = { name: given.get("name").trim(), scopes: given.getAll("scopes") };
    for (const name of [...LIMITS.map(([n]) => n), "weight"]) if (given.get(name)) body[name] = Number(given.get(name));
    if (given.get("tenant").trim()) body.tenant = given.get("tenant").trim();
    if (given.get("expires_at")) body.expires_at = new Date(given.get("expires_at")).getTime() / 1000;
    try {
      this.fresh = await call("POST", "v1/keys", body);
      this.refused = null;
      form.reset();
      form.closest("details").open = false;
    } catch (error) {
      this.refused = error;
    }
    await this.load();
  }

  async act(key, name) {
    this.sure = "";
    try {
      const answer = await call("POST", `v1/keys/${key.id}/${name}`);
      if (answer.key) this.fresh = answer;
      this.error = null;
    } catch (error) {
      this.error = error;
      changed();
      return;
    }
    await this.load();
  }

  render() {
    const me = this.self;
    if (!me) return html`${failure(this.error)}${this.error ? nothing : html`<p role="status">Loading…</p>`}`;
    return html`${failure(this.error)}
      ${this.fresh ? secret(`The key ${this.fresh.name}.`, this.fresh.key, () => { this.fresh = null; changed(); }) : nothing}
      <section><h2>This caller</h2>${facts([
        ["Tenant", me.tenant],
        ["May use", me.scopes.join(", ")],
        ["Key", me.key ? html`${me.key.name} <small><code>${me.key.id}</code></small>` : "none, or the operator's own"],
        me.key?.expires_at && ["Expires", moment(me.key.expires_at)],
        ...LIMITS.map(([name, words]) => [words, me[name] === null ? "no limit" : number(me[name])]),
      ])}</section>
      ${me.scopes.includes("admin") ? html`${this.form()}${this.page ? this.table() : nothing}` : html`<p class="notice">To see and make keys takes a key of scope <code>admin</code>.</p>`}`;
  }

  form() {
    return html`<details class="card"><summary>New key</summary>
      <form @submit=${(e) => this.create(e)}>
        <div class="bar"><label>Name <input name="name" required maxlength="100"></label>
          <label>Tenant <input name="tenant" maxlength="100" placeholder=${this.self.tenant}></label>
          <label>Expires <input type="datetime-local" name="expires_at"></label></div>
        <fieldset class="checks"><legend>Scopes</legend>${SCOPES.map(([name, words]) => html`<label><input type="checkbox" name="scopes" value=${name} ?checked=${name !== "admin"}> ${name} <small>${words}</small></label>`)}</fieldset>
        <div class="bar">${LIMITS.map(([name, words]) => html`<label>${words} <input type="number" min="1" name=${name} placeholder="default"></label>`)}
          <label>Weight <input type="number" min="1" max="1000" name="weight" placeholder="1"></label>
          <button class="primary">Create</button></div></form>${failure(this.refused)}</details>`;
  }

  table() {
    const page = this.page;
    if (!page.data.length) return html`<p>This tenant has no key yet.</p>`;
    return html`<div class="scroll" tabindex="0" role="region" aria-label="Keys"><table class="cards">
        <thead><tr><th scope="col">Key</th><th scope="col">State</th><th scope="col">Tenant</th><th scope="col">Scopes</th><th scope="col">Limits</th><th scope="col">Last used</th><th scope="col"><span class="hidden">Actions</span></th></tr></thead>
        <tbody>${page.data.map((k) => html`<tr>
            <td data-name="Key"><span>${k.name}<br><small><code>${k.id}</code></small></span></td>
            <td data-name="State"><span>${status(k.state)}${k.state === "good" && k.expires_at ? html`<br><small>until ${moment(k.expires_at)}</small>` : nothing}</span></td>
            <td data-name="Tenant"><span class="clip">${k.tenant}</span></td>
            <td data-name="Scopes"><span>${k.scopes.map((s) => html`<span class="chip">${s}</span> `)}</span></td>
            <td data-name="Limits"><span>${this.limits(k)}</span></td>
            <td data-name="Last used">${k.last_used_at ? ago(k.last_used_at) : "never"}</td>
            <td data-name="">${k.state === "revoked" ? nothing : this.actions(k)}</td></tr>`)}</tbody></table></div>
      ${pages(this.cursors.length, page.has_more, () => { this.cursors.pop(); this.load(); }, () => { this.cursors.push(page.next_cursor); this.load(); })}`;
  }

  limits(k) {
    const given = LIMITS.filter(([name]) => k[name] !== null).map(([name, words]) => `${words.toLowerCase()} ${number(k[name])}`);
    if (k.weight !== 1) given.push(`weight ${k.weight}`);
    return given.join(", ") || "the server's";
  }

  actions(k) {
    const ask = (name) => () => { this.sure = name + k.id; changed(); };
    const button = (name, words, sure) =>
      this.sure === name + k.id
        ? html`<button class="danger" @click=${() => this.act(k, name)}>${sure}</button> <button @click=${ask("")}>No</button>`
        : html`<button aria-label="${words} ${k.name}" @click=${ask(name)}>${words}</button> `;
    return html`<span class="buttons">${button("rotate", "Rotate", "Make another; the old one ends in a day")}${button("revoke", "Revoke", k.id === this.self.key?.id ? "End the key of this tab" : "End it for good")}</span>`;
  }
}
