// The form that begins an evaluation: a dataset, a prompt, what makes an answer right, and how answers are made.

import { call } from "./client.js";
import { Fields, valueOf } from "./fields.js";
import { FileChoice } from "./file_choice.js";
import { GRADERS } from "./graders.js";
import { changed, failure, html, nothing, number } from "./ui.js";

const ENDPOINTS = ["/v1/chat/completions", "/v1/completions"];
const WINDOWS = ["1h", "24h", "7d", "30d"];
const MOST = { graders: 10, configurations: 50 };
const REFERENCE = "{{reference}}";
const NAME = { name: "name", words: "Name" };
const GENERAL = [
  { name: "max_tokens", kind: "integer", help: "Length of the canvas; the answer may end earlier." },
  { name: "temperature", kind: "number", help: "0 takes the likeliest token; higher is more varied." },
];
const ANSWERS = [
  { name: "repeats", words: "Repeats", kind: "integer", unset: "1", help: "How often each item is answered, with seeds from 0 on." },
  { name: "seeds", words: "Seeds", kind: "integers", unset: "0", help: "Instead of repeats: one answer for each of them, as 1, 2, 3." },
];

const grader = (type) => ({ type, values: { reference: REFERENCE } });

export class EvaluationForm {
  constructor(models) {
    this.models = models;
    this.rules = [];
    this.types = [];
    this.fields = new Fields("evaluation");
    this.dataset = new FileChoice("evals");
    this.open = null; // whether it is unfolded, once somebody said so
    this.error = null;
    this.sending = "";
    this.said = nothing;
    this.general = {};
    this.prompt = { template: "{{input}}" };
    this.endpoint = ENDPOINTS[0];
    this.window = "24h";
    this.graders = [grader("exact")];
    this.configurations = [{ model: "", rule: "", values: { max_tokens: "64" } }];
  }

  // Once it is seen.
  async unfold(open) {
    this.open = open;
    if (open) await this.load();
  }

  leave() {
    this.dataset.leave();
    this.said = nothing;
  }

  async load() {
    try {
      const first = !this.types.length;
      const [options, rules] = await Promise.all([call("GET", "v1/evaluations/options"), call("GET", "v1/rules"), this.models.load()]);
      this.dataset.bundled = options.datasets;
      this.types = options.graders;
      this.rules = rules.data;
      await this.dataset.load();
      if (first && this.dataset.bundled.length) this.dataset.choose(`bundled:${this.dataset.bundled[0].name}`);
      const model = (this.models.list.find((m) => m.workers) ?? this.models.list[0])?.id ?? "";
      for (const c of this.configurations) c.model ||= model;
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  model(c) {
    return this.models.list.find((m) => m.id === c.model);
  }

  // The fields of a rule: its own, and those that every rule reads.
  parameters(c) {
    const chosen = c.rule || this.model(c)?.defaults.diffusion?.algorithm;
    const all = this.rules.find((r) => r.name === chosen)?.parameters ?? this.rules[0]?.parameters ?? [];
    const common = all.filter((p) => this.rules.every((r) => r.parameters.some((q) => q.name === p.name)));
    const own = all.filter((p) => !common.includes(p) && (chosen || !this.rules.length));
    const described = (p) => (p.name === "cache" ? { ...p, choices: this.model(c)?.capabilities.caches ?? p.choices } : p);
    return [own.map(described), common.map(described)];
  }

  // What a configuration is called when its name is left empty.
  unnamed(index) {
    const base = (c) => c.rule || "default";
    const before = this.configurations.slice(0, index).filter((c) => base(c) === base(this.configurations[index])).length;
    return `${base(this.configurations[index])}${before ? ` ${before + 1}` : ""}`;
  }

  body(dataset) {
    const text = (field, values, path) => valueOf(field, values[field.name], path);
    const limit = text({ name: "limit", kind: "integer" }, this.general, "dataset.limit");
    const system = this.endpoint === ENDPOINTS[0] ? (this.prompt.system ?? "").trim() : "";
    const messages = [{ role: "system", content: this.prompt.system }, { role: "user", content: this.prompt.template }];
    return {
      ...((this.general.name ?? "").trim() ? { name: this.general.name } : {}),
      dataset: { ...dataset, ...(limit === undefined ? {} : { limit }) },
      endpoint: this.endpoint,
      template: system ? messages : this.prompt.template,
      graders: this.graders.map((g, i) => this.graderBody(g, `graders[${i}]`)),
      configurations: this.configurations.map((c, i) => this.configurationBody(c, i, `configurations[${i}]`)),
      completion_window: this.window,
    };
  }

  graderBody(g, at) {
    const { fields, alone } = GRADERS[g.type];
    const reference = g.values.reference ?? "";
    const body = { type: g.type, reference: alone && !reference.trim() ? null : reference };
    for (const field of [NAME, ...fields]) {
      const value = valueOf(field, g.values[field.name], `${at}.${field.name}`);
      if (value !== undefined) body[field.name] = value;
    }
    return body;
  }

  configurationBody(c, index, at) {
    const body = { name: (c.values.name ?? "").trim() || this.unnamed(index), model: c.model };
    const diffusion = c.rule ? { algorithm: c.rule } : {};
    const put = (into, prefix) => (field) => {
      const value = valueOf(field, c.values[field.name], `${prefix}.${field.name}`);
      if (value !== undefined) into[field.name] = value;
    };
    [...GENERAL, ...ANSWERS].forEach(put(body, at));
    this.parameters(c).flat().forEach(put(diffusion, `${at}.diffusion`));
    return Object.keys(diffusion).length ? { ...body, diffusion } : body;
  }

  // Which field here an error of the server is about.
  place(param) {
    if (param === "file") return "dataset.file";
    if (/^(messages|prompt)\b/.test(param ?? "")) return "template";
    if (Array.isArray(this.sent?.template)) {
      if (/^template\[0\]/.test(param ?? "")) return "system";
      if (/^template/.test(param ?? "")) return "template";
    }
    return (param ?? "").replace(/^(configurations\[\d+\])$/, "$1.name").replace(/^(graders\[\d+\])$/, "$1.type").replace(".diffusion.algorithm", ".rule");
  }

  async create(event) {
    event.preventDefault();
    this.fields.clear();
    this.said = nothing;
    const told = (words) => { this.sending = words; changed(); };
    try {
      this.sent = this.body({}); // what is no number is told before anything is uploaded
      const dataset = this.dataset.name ? { bundled: this.dataset.name } : { file_id: await this.dataset.id(told) };
      told("Checking…");
      const made = await call("POST", "v1/evaluations", this.body(dataset));
      if (made.reused) this.said = this.reused(made);
      else {
        this.open = null;
        location.hash = `#/evaluations/${made.id}`;
      }
    } catch (error) {
      this.fields.refuse(error, this.place(error.param));
    }
    told("");
  }

  reused(made) {
    const fresh = made.added.reduce((sum, a) => sum + a.new_samples, 0);
    return html`<p class="notice">An evaluation of the same items, prompt and graders is there: <a href="#/evaluations/${made.id}">${made.name}</a>.
      ${fresh ? `It makes ${number(fresh)} answers that it had not.` : "It has all of these answers, so nothing runs."}</p>`;
  }

  more(list, item) {
    this[list] = [...this[list], item];
    changed();
    this.fields.focus(`${list}[${this[list].length - 1}].${list === "graders" ? "type" : "name"}`);
  }

  less(list, index) {
    this[list] = this[list].filter((_, i) => i !== index);
    this.fields.clear(); // the paths behind it have moved
    changed();
    this.fields.focus(`${list}[${Math.max(0, index - 1)}].${list === "graders" ? "type" : "name"}`);
  }

  // How many answers that will be, where the number of items is known.
  total() {
    const items = this.dataset.bundled.find((d) => d.name === this.dataset.name)?.items;
    const limit = Number(this.general.limit) || Infinity;
    const each = this.configurations.map((c) => (c.values.seeds ?? "").split(/[\s,]+/).filter(Boolean).length || Number(c.values.repeats) || 1);
    const count = items && Math.min(items, limit) * each.reduce((a, b) => a + b, 0);
    return count ? html`<span>That makes ${number(count)} answers.</span>` : nothing;
  }

  render(empty) {
    this.fields.paths.clear();
    return html`<details class="card form" ?open=${this.open ?? empty} @toggle=${(e) => e.target === e.currentTarget && this.unfold(e.target.open)}><summary>New evaluation</summary>
      ${failure(this.error)}${this.types.length ? this.form() : this.error ? nothing : html`<p role="status">Loading…</p>`}</details>`;
  }

  form() {
    const { fields } = this;
    const text = (path, field, values) => fields.field(path, field, values);
    const choice = (path, words, name, choices, help) =>
      fields.entry(path, words, (id, said, wrong) => html`<select id=${id} aria-describedby=${said} aria-invalid=${wrong} @change=${(e) => { this[name] = e.target.value; changed(); }}>${choices.map((c) => html`<option value=${c} .selected=${c === this[name]}>${c}</option>`)}</select>`, help);
    const chat = this.endpoint === ENDPOINTS[0];
    return html`<form @submit=${(e) => this.create(e)}>
      <fieldset class="entries"><legend>What is asked</legend>
        ${text("name", { ...NAME, unset: "evaluation" }, this.general)}
        ${this.dataset.render(fields.entry, "dataset", "Dataset")}
        ${text("dataset.limit", { name: "limit", words: "Lines", kind: "integer", unset: "all", help: "The first so many." }, this.general)}
        ${choice("endpoint", "Endpoint", "endpoint", ENDPOINTS)}
        ${choice("completion_window", "Done within", "window", WINDOWS, "What is not done by then expires.")}
        ${chat ? html`<div class="whole">${text("system", { name: "system", words: "System message", kind: "code", rows: 2, help: "May be left empty." }, this.prompt)}</div>` : nothing}
        <div class="whole">${text("template", { name: "template", words: chat ? "User message" : "Prompt", kind: "code", rows: 3, required: true, help: this.columns() }, this.prompt)}</div>
      </fieldset>
      <h2>An answer passes when all of these pass it</h2>
      ${this.graders.map((g, i) => this.grader(g, i))}
      <button type="button" ?disabled=${this.graders.length >= MOST.graders} @click=${() => this.more("graders", grader("contains"))}>Add a grader</button>
      <h2>Answers are made by each of these</h2>
      ${this.configurations.map((c, i) => this.configuration(c, i))}
      <button type="button" ?disabled=${this.configurations.length >= MOST.configurations} @click=${() => this.another()}>Add a configuration</button>
      <div class="bar"><button class="primary" ?disabled=${Boolean(this.sending)}>Check and start</button>${this.total()}<span>${this.sending}</span></div>
      <div role="status">${this.said}</div>
      ${fields.rest()}</form>`;
  }

  columns() {
    const { columns } = this.dataset;
    return html`A column of the dataset in double braces is replaced by what each item has there.${columns ? html` There are ${columns.slice(0, 20).map((c) => html`<code class="chip">{{${c}}}</code> `)}${columns.length > 20 ? "and more" : nothing}` : nothing}`;
  }

  // A copy of the last: two configurations mostly differ in one thing.
  another() {
    const last = this.configurations.at(-1);
    this.more("configurations", { ...last, values: { ...last.values, name: "" } });
  }

  remove(list, index, words) {
    return this[list].length > 1 ? html`<button type="button" class="quiet" @click=${() => this.less(list, index)}>Remove ${words}</button>` : nothing;
  }

  grader(g, index) {
    const at = `graders[${index}]`;
    const { help, fields, alone } = GRADERS[g.type];
    const choose = (e) => { g.type = e.target.value; changed(); };
    const type = (id, said, wrong) => html`<select id=${id} aria-describedby=${said} aria-invalid=${wrong} @change=${choose}>${this.types.filter((t) => t in GRADERS).map((t) => html`<option value=${t} .selected=${t === g.type}>${t}</option>`)}</select>`;
    const draw = (field) => this.fields.field(`${at}.${field.name}`, field, g.values);
    return html`<fieldset class="entries"><legend>Grader ${index + 1}</legend>
      ${this.fields.entry(`${at}.type`, "Type", type, help)}
      ${draw({ name: "reference", words: "Reference", unset: "", help: alone ?? "What is right: a text with columns of the item." })}
      ${fields.filter((f) => f.kind !== "code").map(draw)}
      ${draw({ ...NAME, unset: g.type })}
      ${fields.filter((f) => f.kind === "code").map((f) => html`<div class="whole">${draw(f)}</div>`)}
      ${this.remove("graders", index, `grader ${index + 1}`)}</fieldset>`;
  }

  configuration(c, index) {
    const at = `configurations[${index}]`;
    const model = this.model(c);
    const served = model?.capabilities.algorithms ?? this.rules.map((r) => r.name);
    const [own, common] = this.parameters(c);
    const draw = (prefix) => (field) => this.fields.field(`${prefix}.${field.name}`, field, c.values);
    const pick = (name, values, empty) => (id, said, wrong) =>
      html`<select id=${id} aria-describedby=${said} aria-invalid=${wrong} @change=${(e) => { c[name] = e.target.value; changed(); }}>${empty ? html`<option value="" .selected=${c[name] === ""}>${empty}</option>` : nothing}${values.map((v) => html`<option value=${v} .selected=${v === c[name]}>${v}</option>`)}</select>`;
    const idle = model && !model.workers ? html`<b class="bad">No live worker serves it; its jobs wait.</b>` : nothing;
    return html`<fieldset class="entries"><legend>Configuration ${index + 1}</legend>
      ${draw(at)({ ...NAME, unset: this.unnamed(index) })}
      ${this.fields.entry(`${at}.model`, "Model", pick("model", this.models.list.map((m) => m.id)), this.models.list.length ? idle : "No worker has registered a model yet.")}
      ${this.fields.entry(`${at}.rule`, "Rule", pick("rule", this.rules.map((r) => r.name).filter((r) => served.includes(r)), "the model's own"), this.rules.find((r) => r.name === c.rule)?.help ?? "How tokens are unmasked.")}
      ${GENERAL.map(draw(at))}
      ${own.map(draw(`${at}.diffusion`))}
      ${ANSWERS.map(draw(at))}
      <details class="whole"><summary>More parameters</summary><div class="entries">${common.map(draw(`${at}.diffusion`))}</div></details>
      ${this.remove("configurations", index, `configuration ${index + 1}`)}</fieldset>`;
  }
}
