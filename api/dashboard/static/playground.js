// The playground: one prompt, two configurations side by side, with forwards and time.

import { call, follow } from "./client.js";
import { DenoiseView, Trace } from "./denoise.js";
import { answersOf } from "./job.js";
import { changed, connection, duration, failure, html, nothing, number, status } from "./ui.js";

const GENERAL = [
  { name: "max_tokens", kind: "integer", value: "64", help: "Length of the canvas; the answer may end earlier." },
  { name: "temperature", kind: "number", value: "0", help: "0 takes the likeliest token; higher is more varied." },
  { name: "seed", kind: "integer", value: "", help: "The same seed and parameters give the same answer." },
];

class Side {
  constructor(name, rule) {
    this.name = name;
    this.rule = rule;
    this.values = Object.fromEntries(GENERAL.map((g) => [g.name, g.value]));
    this.clear();
  }

  clear() {
    this.end?.();
    this.view?.stop();
    this.job = null;
    this.error = null;
    this.state = "";
    this.trace = new Trace();
    this.view = new DenoiseView(this.trace);
  }

  body(model, prompt, parameters) {
    const body = { model, messages: [{ role: "user", content: prompt }], diffusion: { algorithm: this.rule } };
    for (const p of [...GENERAL, ...parameters]) {
      const given = (this.values[p.name] ?? "").trim();
      if (!given) continue;
      const value = p.kind === "integer" || p.kind === "number" ? Number(given) : given;
      if (Number.isNaN(value)) throw Object.assign(new Error("must be a number"), { param: p.name });
      if (GENERAL.includes(p)) body[p.name] = value;
      else body.diffusion[p.name] = value;
    }
    return body;
  }

  async run(model, prompt, parameters) {
    this.clear();
    changed();
    try {
      const body = this.body(model, prompt, parameters);
      this.job = await call("POST", "v1/jobs", { endpoint: "/v1/chat/completions", body, priority: "interactive", metadata: { from: "playground" } });
    } catch (error) {
      this.error = error;
      changed();
      return;
    }
    this.end = follow(
      `v1/jobs/${this.job.id}/events`,
      (type, data) => {
        this.trace.event(type, data);
        if (type === "started") this.job = { ...this.job, status: "running" };
        if (type === "done") this.job = data;
        changed();
      },
      (state) => {
        this.state = state;
        changed();
      },
      ["done"],
    );
  }
}

export class Playground {
  title = "Playground";

  constructor(models) {
    this.models = models;
    this.prompt = "What is 17 + 25?";
    this.model = "";
    this.rules = [];
    this.error = null;
    this.sides = [new Side("A", "low_confidence"), new Side("B", "threshold")];
  }

  async start() {
    try {
      await this.models.load();
      this.rules = (await call("GET", "v1/rules")).data;
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    this.model ||= (this.models.list.find((m) => m.workers) ?? this.models.list[0])?.id ?? "";
    changed();
  }

  stop() {
    this.sides.forEach((s) => s.view.stop());
  }

  run(event) {
    event.preventDefault();
    for (const side of this.sides) side.run(this.model, this.prompt, this.parameters(side));
  }

  parameters(side) {
    const caches = this.models.list.find((m) => m.id === this.model)?.capabilities.caches;
    return (this.rules.find((r) => r.name === side.rule)?.parameters ?? []).map((p) => (p.name === "cache" ? { ...p, choices: caches ?? p.choices } : p));
  }

  render() {
    const model = this.models.list.find((m) => m.id === this.model);
    const served = model?.capabilities.algorithms ?? this.rules.map((r) => r.name);
    return html`${failure(this.error)}
      ${this.models.list.length ? nothing : html`<p class="notice">No worker has registered a model yet; start one with <code>vdiff worker</code>.</p>`}
      <form @submit=${(e) => this.run(e)}>
        <label class="block">Prompt <textarea rows="3" required .value=${this.prompt} @input=${(e) => (this.prompt = e.target.value)}></textarea></label>
        <div class="bar">
          <label>Model <select @change=${(e) => { this.model = e.target.value; changed(); }}>${this.models.list.map((m) => html`<option value=${m.id} ?selected=${m.id === this.model}>${m.id}</option>`)}</select></label>
          <button class="primary" ?disabled=${!this.model}>Run both</button>
          ${model && !model.workers ? html`<span>No live worker serves it; what is run waits for one.</span>` : nothing}
        </div>
        <div class="sides">${this.sides.map((side) => this.side(side, this.rules.filter((r) => served.includes(r.name))))}</div>
      </form>
      ${this.verdict()}
      <div class="sides">${this.sides.map((side) => this.outcome(side))}</div>`;
  }

  side(side, rules) {
    const rule = rules.find((r) => r.name === side.rule);
    const id = (name) => `${side.name}-${name}`;
    return html`<fieldset><legend>${side.name}</legend>
      <div class="field"><label for=${id("rule")}>Rule</label>
        <select id=${id("rule")} aria-describedby=${id("rule-help")} @change=${(e) => { side.rule = e.target.value; changed(); }}>${rules.map((r) => html`<option value=${r.name} ?selected=${r.name === side.rule}>${r.name}</option>`)}</select>
        <small id=${id("rule-help")}>${rule?.help ?? ""}</small></div>
      ${[...GENERAL, ...this.parameters(side)].map(
        (p) => html`<div class="field"><label for=${id(p.name)}>${p.name}</label>
          ${p.choices
            ? html`<select id=${id(p.name)} aria-describedby=${id(`${p.name}-help`)} @change=${(e) => (side.values[p.name] = e.target.value)}><option value="">default</option>${p.choices.map((c) => html`<option ?selected=${side.values[p.name] === c}>${c}</option>`)}</select>`
            : html`<input id=${id(p.name)} aria-describedby=${id(`${p.name}-help`)} inputmode=${p.kind === "integer" ? "numeric" : p.kind === "number" ? "decimal" : "text"} placeholder="default" .value=${side.values[p.name] ?? ""} @input=${(e) => (side.values[p.name] = e.target.value)}>`}
          <small id=${id(`${p.name}-help`)}>${p.help}</small></div>`,
      )}
    </fieldset>`;
  }

  outcome(side) {
    if (!side.job && !side.error) return html`<div></div>`;
    const job = side.job;
    return html`<section aria-label="Configuration ${side.name}"><h2>${side.name}: ${side.rule} ${job ? status(job.status) : nothing}</h2>
      ${failure(side.error)}${job?.done ? nothing : connection(side.state)}
      ${job?.error ? html`<p class="notice bad">${job.error.message}</p>` : nothing}
      ${job?.done && job.timing
        ? html`<dl class="facts tight"><div><dt>Forwards</dt><dd>${number(job.diffusion?.forwards)}</dd></div><div><dt>Tokens per forward</dt><dd>${number(job.diffusion?.tokens_per_forward, 2)}</dd></div><div><dt>Denoising</dt><dd>${duration(job.timing.denoise_ms / 1000)}</dd></div><div><dt>Together</dt><dd>${duration(job.timing.total_ms / 1000)}</dd></div></dl>`
        : nothing}
      ${answersOf(job?.result).map((text) => html`<pre class="text">${text}</pre>`)}
      ${side.trace.answers.length ? side.view.render(`Answer ${side.name}`) : nothing}
      ${job ? html`<p><a href="#/jobs/${job.id}">Job ${job.id}</a></p>` : nothing}</section>`;
  }

  verdict() {
    const [a, b] = this.sides.map((s) => s.job);
    if (!a?.timing || !b?.timing) return nothing;
    const same = answersOf(a.result).join() === answersOf(b.result).join();
    const ratio = a.timing.denoise_ms / Math.max(b.timing.denoise_ms, 1e-9);
    const words = ratio >= 1 ? `B took ${number(ratio, 1)} times less time than A` : `A took ${number(1 / ratio, 1)} times less time than B`;
    return html`<p class="notice" role="status">${words}, with ${a.diffusion.forwards} and ${b.diffusion.forwards} forwards; the answers are ${same ? "the same" : "different"}.</p>`;
  }
}
