// One job: what it is, where its time went, its attempts and events, and how its answer came about.

import { svg } from "./vendor/lit-html.js";
import { call, follow } from "./client.js";
import { Deliveries } from "./deliveries.js";
import { DenoiseView, Trace } from "./denoise.js";
import { changed, connection, duration, facts, failure, html, moment, nothing, number, status } from "./ui.js";

const EVENTS_SHOWN = 200;
const TURNS_SHOWN = 200;
const INPUT_SHOWN = 100_000; // characters of a text

export const answersOf = (result) =>
  result?.output
    ? result.output.flatMap((item) => item.content.map((part) => part.text))
    : (result?.choices ?? []).map((c) => c.message?.content ?? c.text ?? "");

const textOf = (content) =>
  typeof content === "string" ? content : Array.isArray(content) ? content.map((part) => part?.text ?? JSON.stringify(part)).join("\n") : JSON.stringify(content);

// What was asked, as pairs of who says it and what; of a body that has no such thing, nothing.
function asked(body) {
  const turns = body.messages ?? body.input;
  if (typeof turns === "string") return [["user", turns]];
  if (Array.isArray(turns)) return turns.map((turn) => [turn?.role ?? turn?.type ?? "", textOf(turn?.content ?? turn)]);
  const prompts = Array.isArray(body.prompt) && typeof body.prompt[0] === "string" ? body.prompt : body.prompt === undefined ? [] : [body.prompt];
  return prompts.map((prompt, i) => [prompts.length > 1 ? `prompt ${i + 1}` : "prompt", typeof prompt === "string" ? prompt : JSON.stringify(prompt)]);
}

const short = (text) => (text.length > INPUT_SHOWN ? `${text.slice(0, INPUT_SHOWN)}… and ${number(text.length - INPUT_SHOWN)} characters more` : text);

// Made once, as a page is drawn often and a request may be large.
const inputOf = (body) => ({
  turns: asked(body).slice(0, TURNS_SHOWN).map(([who, words]) => [who, short(words)]),
  whole: short(JSON.stringify(body, null, 2)),
});

export class Job {
  constructor(id) {
    this.id = id;
    this.title = `Job ${id}`;
    this.job = null;
    this.attempts = [];
    this.input = null; // what it was asked, as texts
    this.error = null;
    this.said = "";
    this.events = [];
    this.heard = 0;
    this.trace = new Trace();
    this.view = new DenoiseView(this.trace);
    this.state = "";
    this.recalled = false;
    this.idle = false; // no live worker serves its model
    this.deliveries = new Deliveries({ job_id: id });
  }

  get path() {
    return `v1/jobs/${encodeURIComponent(this.id)}`;
  }

  start() {
    this.load();
    this.listen();
  }

  listen() {
    this.end?.();
    this.end = follow(
      `${this.path}/events`,
      (type, data) => {
        this.trace.event(type, data);
        this.heard += 1;
        this.events = [...this.events, { type, data, at: Date.now() }].slice(-EVENTS_SHOWN);
        if (type === "done") {
          this.job = data;
          this.said = "";
          if (!this.trace.complete) this.recall();
          this.deliveries.start(); // one stream after the other: what is told of a job is mostly its end
        }
        if (type === "done" || type === "started") this.load();
        changed();
      },
      (state) => {
        this.state = state;
        changed();
      },
      ["done"],
    );
  }

  stop() {
    this.end?.();
    this.deliveries.stop();
    this.view.stop();
  }

  async load() {
    try {
      this.job = await call("GET", this.path);
      this.attempts = (await call("GET", `${this.path}/attempts`)).data;
      this.input ??= inputOf((await call("GET", `${this.path}/input`)).body);
      this.error = null;
    } catch (error) {
      this.error = error;
    }
    changed();
    if (this.job?.status === "queued") this.ask(this.job.model);
  }

  // Whether anybody is there to take it.
  async ask(model) {
    const found = await call("GET", `v1/models/${model.split("/").map(encodeURIComponent).join("/")}`).catch(() => null);
    this.idle = found?.workers === 0;
    changed();
  }

  async recall() {
    try {
      this.trace.recall(await call("GET", `${this.path}/steps`));
    } catch {
      // Not kept: what the stream still had is shown, or the reason why there is nothing.
    }
    this.recalled = true;
    changed();
  }

  async act(name, words) {
    this.said = "";
    try {
      const job = await call("POST", `${this.path}/${name}`);
      this.error = null;
      this.said = words;
      if (name === "replay") {
        location.hash = `#/jobs/${job.id}`;
        return;
      }
      this.job = job;
      if (!job.done) this.listen();
      this.load();
    } catch (error) {
      this.error = error;
    }
    changed();
  }

  render() {
    const job = this.job;
    if (!job) return html`<h1>Job</h1>${failure(this.error)}${this.error ? nothing : html`<p role="status">Loading…</p>`}`;
    return html`
      <p class="path"><a href="#/jobs">Jobs</a> / <code>${job.id}</code></p>
      ${this.state === "lost" && !job.done ? connection("lost") : nothing}${failure(this.error)}
      <div class="bar"><span role="status">${status(job.status)} ${this.said}</span>
        ${job.done ? nothing : html`<button @click=${() => this.act("cancel", "A stop was asked for.")} ?disabled=${job.cancel_requested}>Cancel</button>`}
        ${["failed", "cancelled", "expired"].includes(job.status) ? html`<button @click=${() => this.act("retry", "It is queued again.")}>Retry</button>` : nothing}
        ${job.done ? html`<button @click=${() => this.act("replay", "")}>Replay</button>` : nothing}
      </div>
      ${job.error ? html`<p class="notice bad"><code>${job.error.code}</code>: ${job.error.message}</p>` : nothing}
      ${this.input ? this.question(this.input) : nothing}
      <section><h2>How the answer came about</h2>${this.denoise(job)}</section>
      ${answersOf(job.result).map((text, i, all) => html`<section><h2>Answer${all.length > 1 ? ` ${i + 1}` : ""}</h2><pre class="text">${text}</pre></section>`)}
      <section><h2>Time</h2>${this.timing(job)}</section>
      <section><h2>Facts</h2>${facts([
        ["Endpoint", html`<code>${job.endpoint}</code>`],
        ["Model", job.model],
        ["Priority", job.priority],
        job.custom_id && ["Custom id", job.custom_id],
        this.whole(job),
        ["Created", moment(job.created_at)],
        ["Started", moment(job.started_at)],
        ["Finished", moment(job.finished_at)],
        !job.done && job.deadlines.start_by && ["Expires unless started by", moment(job.deadlines.start_by)],
        !job.done && job.deadlines.complete_by && ["Expires unless done by", moment(job.deadlines.complete_by)],
        job.queue_position && ["Place in the queue", number(job.queue_position)],
        job.usage && ["Tokens", `${number(job.usage.prompt_tokens)} in, ${number(job.usage.completion_tokens)} out`],
        ...Object.entries(job.metadata ?? {}).map(([k, v]) => [k, v]),
      ])}</section>
      <section><h2>Parameters</h2>${facts(Object.entries(job.diffusion ?? {}).map(([k, v]) => [k, typeof v === "object" ? JSON.stringify(v) : String(v)]))}</section>
      <section><h2>Attempts</h2>${this.attempts.length
        ? html`<ol class="timeline">${this.attempts.map(
            (a) => html`<li><b>Attempt ${a.attempt}</b> ${status(a.outcome)} <small>by <code>${a.worker_id}</code>, ${moment(a.started_at)}${a.ended_at ? (a.ended_at > a.started_at ? html`, for ${a.ended_at - a.started_at} s` : ", for less than a second") : nothing}</small>${a.error ? html`<br>${a.error.code}: ${a.error.message}` : nothing}</li>`,
          )}</ol>`
        : html`<p>None yet.</p>`}</section>
      ${job.done ? html`<section><h2>Webhooks</h2>${this.deliveries.render()}</section>` : nothing}
      <section><details><summary>Events (${number(this.heard)}${this.heard > EVENTS_SHOWN ? `, the last ${EVENTS_SHOWN} shown` : ""})</summary>
        <ol class="events">${this.events.map((e) => html`<li><b>${e.type}</b> <code>${JSON.stringify(e.type === "done" ? { status: e.data.status } : e.data).slice(0, 300)}</code></li>`)}</ol></details></section>`;
  }

  question({ turns, whole }) {
    return html`<section><h2>Asked</h2>${turns.map(([who, words]) => html`<small>${who}</small><pre class="text tall" tabindex="0">${words}</pre>`)}
      <details><summary>The whole request</summary><pre class="text tall" tabindex="0">${whole}</pre></details></section>`;
  }

  // The batch or the evaluation that it is a part of.
  whole(job) {
    const evaluation = job.batch_id?.startsWith("evalrun_") && job.metadata.evaluation_id;
    if (evaluation) return ["Evaluation", html`<a href="#/evaluations/${evaluation}"><code>${evaluation}</code></a>`];
    return job.batch_id?.startsWith("batch_") && ["Batch", html`<a href="#/batches/${job.batch_id}"><code>${job.batch_id}</code></a>`];
  }

  denoise(job) {
    if (this.trace.answers.length) return this.view.render();
    if (job.done) return this.recalled ? html`<p>The steps of this job were not kept: there were none, or too many (<code>VDIFF_KEEP_STEPS_TOKENS</code>).</p>` : html`<p role="status">Loading…</p>`;
    return html`<p role="status">It has not started.${this.idle && job.status === "queued" ? ` No live worker serves ${job.model}; it waits for one.` : ""}</p>`;
  }

  timing(job) {
    if (!job.timing) return html`<p>Known when it is done.${job.eta_seconds ? ` Expected in about ${duration(job.eta_seconds)}.` : ""}</p>`;
    const t = job.timing;
    const rest = Math.max(0, t.total_ms - t.queued_ms - t.prompt_ms - t.denoise_ms);
    const parts = [["In the queue", t.queued_ms, "a"], ["Before the first step", t.prompt_ms, "b"], ["Denoising", t.denoise_ms, "c"], ["The rest", rest, "d"]];
    let x = 0;
    return html`<svg class="split" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">${parts.map(([, ms, name]) => {
        const width = (100 * ms) / Math.max(t.total_ms, 1e-9);
        x += width;
        return svgRect(x - width, width, name);
      })}</svg>
      <ul class="states">${parts.map(([words, ms, name]) => html`<li><i class="dot ${name}"></i>${words} <b>${duration(ms / 1000)}</b></li>`)}<li>Together <b>${duration(t.total_ms / 1000)}</b></li></ul>`;
  }
}


const svgRect = (x, width, name) => svg`<rect class=${name} x=${x} y="0" width=${width} height="4"></rect>`;
