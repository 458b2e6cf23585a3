// The form that begins a batch: a file of requests, for one endpoint, within a window.

import { call } from "./client.js";
import { Fields } from "./fields.js";
import { FileChoice } from "./file_choice.js";
import { changed, failure, html, nothing } from "./ui.js";

const ENDPOINTS = ["/v1/chat/completions", "/v1/completions", "/v1/infill", "/v1/loglikelihood"];
const WINDOWS = ["1h", "24h", "7d", "30d"];

export class BatchForm {
  constructor() {
    this.fields = new Fields("batch");
    this.file = new FileChoice("batch", (line) => this.first(line));
    this.values = { endpoint: ENDPOINTS[0], completion_window: "24h" };
    this.open = null; // whether it is unfolded, once somebody said so
    this.error = null;
    this.sending = "";
  }

  // What the file's first line asks for is what the batch is for.
  first(line) {
    if (ENDPOINTS.includes(line.url)) this.values.endpoint = line.url;
  }

  async unfold(open) {
    this.open = open;
    if (!open) return;
    try {
      await this.file.load();
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  leave() {
    this.file.leave();
  }

  async create(event) {
    event.preventDefault();
    this.fields.clear();
    const told = (words) => { this.sending = words; changed(); };
    try {
      const input_file_id = await this.file.id(told);
      told("Starting…");
      const batch = await call("POST", "v1/batches", { input_file_id, ...this.values });
      this.open = null;
      location.hash = `#/batches/${batch.id}`;
    } catch (error) {
      this.fields.refuse(error, error.param === "file" ? "input_file_id.file" : error.param);
    }
    told("");
  }

  render(empty) {
    const { fields } = this;
    fields.paths.clear();
    const choice = (name, words, choices, help) =>
      fields.entry(name, words, (id, said, wrong) => html`<select id=${id} aria-describedby=${said} aria-invalid=${wrong} @change=${(e) => { this.values[name] = e.target.value; changed(); }}>${choices.map((c) => html`<option value=${c} .selected=${c === this.values[name]}>${c}</option>`)}</select>`, help);
    return html`<details class="card" ?open=${this.open ?? empty} @toggle=${(e) => this.unfold(e.target.open)}><summary>New batch</summary>
      <p>A JSONL file, a request a line: <code>{"custom_id": "a-1", "method": "POST", "url": "/v1/chat/completions", "body": {…}}</code>. Every line is checked before any runs.</p>
      ${failure(this.error)}
      <form @submit=${(e) => this.create(e)}><div class="entries">
        ${this.file.render(fields.entry, "input_file_id", "Requests")}
        ${choice("endpoint", "Endpoint", ENDPOINTS, "The same for all lines.")}
        ${choice("completion_window", "Done within", WINDOWS, "What is not done by then expires.")}</div>
        <div class="bar"><button class="primary" ?disabled=${Boolean(this.sending)}>Check and start</button><span role="status">${this.sending}</span></div>
        ${fields.rest()}</form></details>`;
  }
}
