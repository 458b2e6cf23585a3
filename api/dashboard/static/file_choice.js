// Choosing a JSONL file: one that the server has, or one from this machine, which is uploaded once.

import { call, head } from "./client.js";
import { changed, html, nothing, number, size } from "./ui.js";

const HEAD_BYTES = 65_536;
const SHOWN = 100;
const UPLOAD = "upload";

export class FileChoice {
  // seen: is told the first line of a file that was chosen
  constructor(purpose, seen = () => {}) {
    this.purpose = purpose;
    this.seen = seen;
    this.files = [];
    this.more = false;
    this.bundled = []; // {name, items, columns}, beside the files
    this.value = UPLOAD;
    this.file = null;
    this.columns = null;
    this.wrong = ""; // what is seen to be wrong before anything is sent
    this.uploaded = null; // {file, id}
  }

  async load() {
    const page = await call("GET", `v1/files?purpose=${this.purpose}&limit=${SHOWN}`);
    this.files = page.data;
    this.more = page.has_more;
    if (![UPLOAD, ...this.bundled.map((d) => `bundled:${d.name}`), ...this.files.map((f) => f.id)].includes(this.value)) this.choose(UPLOAD);
    changed();
  }

  // The field for a file of this machine goes with the page, and what was chosen in it.
  leave() {
    if (this.file) this.choose(this.value);
  }

  get name() {
    return this.value.startsWith("bundled:") ? this.value.slice(8) : null;
  }

  choose(value, file = null) {
    this.value = value;
    this.file = file;
    this.columns = this.bundled.find((d) => d.name === this.name)?.columns ?? null;
    this.wrong = "";
    if (!this.name && (file || value !== UPLOAD)) this.look(value, file);
    changed();
  }

  // What columns its first line has. Whether the whole file is good, the server says.
  async look(value, file) {
    const text = await (file ? file.slice(0, HEAD_BYTES).text() : head(`v1/files/${value}/content`, HEAD_BYTES)).catch(() => null);
    if (text === null || value !== this.value || file !== this.file) return;
    const lines = text.replace(/^\uFEFF/, "").split("\n");
    const first = lines.find((line) => line.trim());
    try {
      const line = JSON.parse(first);
      if (Array.isArray(line) || typeof line !== "object") throw new TypeError("no object");
      this.columns = Object.keys(line);
      this.seen(line);
    } catch {
      if (lines.length > 1 || text.length < HEAD_BYTES) this.wrong = first === undefined ? "The file is empty." : "Its first line is no JSON object.";
    }
    changed();
  }

  // The id of the file, which is uploaded now unless it was before. told: what goes on.
  async id(told) {
    if (this.value !== UPLOAD) return this.value;
    if (this.uploaded?.file !== this.file) {
      told("Uploading…");
      const form = new FormData();
      form.set("purpose", this.purpose);
      form.set("file", this.file);
      this.uploaded = { file: this.file, id: (await call("POST", "v1/files", form)).id };
    }
    return this.uploaded.id;
  }

  // The two controls; `entry` puts a label and what is said of it around one.
  render(entry, path, words) {
    const option = (value, text) => html`<option value=${value} .selected=${value === this.value}>${text}</option>`;
    const select = (id, said, invalid) => html`<select id=${id} aria-describedby=${said} aria-invalid=${invalid} @change=${(e) => this.choose(e.target.value)}>
      ${this.bundled.length ? html`<optgroup label="Comes with vdiff">${this.bundled.map((d) => option(`bundled:${d.name}`, `${d.name}, ${number(d.items)} lines`))}</optgroup>` : nothing}
      ${option(UPLOAD, "A file of this machine")}
      ${this.files.length ? html`<optgroup label=${this.more ? `The newest ${SHOWN} uploaded files` : "Uploaded files"}>${this.files.map((f) => option(f.id, `${f.filename}, ${size(f.bytes)}, ${new Date(f.created_at * 1000).toLocaleString()}`))}</optgroup>` : nothing}</select>`;
    return html`${entry(path, words, select)}
      ${this.value === UPLOAD
        ? entry(`${path}.file`, "File", (id, said, invalid) => html`<input type="file" id=${id} required accept=".jsonl,.ndjson,.json,.txt" aria-describedby=${said} aria-invalid=${invalid} @change=${(e) => this.choose(UPLOAD, e.target.files[0] ?? null)}>`, this.wrong ? html`<b class="bad">${this.wrong}</b>` : nothing)
        : nothing}`;
  }
}
