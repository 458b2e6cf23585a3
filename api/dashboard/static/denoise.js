// The denoise view: an answer as a grid of tokens that fill in as steps commit them, with a scrubber over the steps.

import { changed, html, nothing, number } from "./ui.js";

const SHADES = 9;

// What the events said, per answer; pure data, so that a job of thousands of tokens stays cheap to follow.
export class Trace {
  constructor() {
    this.answers = [];
    this.attempt = 0;
  }

  answer(index) {
    return (this.answers[index] ??= { total: 0, said: 0, end: null, step: 0, cells: [], provisional: new Map() });
  }

  // Whether every token that counts is there: a stream is bounded, and Redis forgets.
  get complete() {
    return this.answers.length > 0 && this.answers.every((a) => a && Array.from({ length: a.end ?? a.total }).every((_, i) => a.cells[i]));
  }

  // What the server kept of a job that is over; what was heard live stays when it is no less, as it has the proposed tokens too.
  recall(kept) {
    const heard = this.answers.reduce((sum, a) => sum + a.cells.reduce((n, commits) => n + commits.length, 0), 0);
    const stored = kept.answers.reduce((sum, a) => sum + a.steps.reduce((n, s) => n + s.positions.length, 0), 0);
    if (heard >= stored) return;
    this.answers = [];
    this.attempt = kept.attempt;
    for (const { index, canvas, tokens_total, steps } of kept.answers) {
      const common = { attempt: kept.attempt, index };
      this.event("progress", { ...common, step: 0, tokens_total: canvas });
      for (const step of steps) this.event("denoise", { ...common, ...step });
      this.event("progress", { ...common, step: steps.at(-1)?.step ?? 0, tokens_total });
    }
  }

  event(type, data) {
    if (type !== "progress" && type !== "denoise") return;
    if (data.attempt > this.attempt) {
      this.attempt = data.attempt; // it runs again: what an earlier attempt showed is void
      this.answers = [];
    }
    if (data.attempt < this.attempt) return;
    const answer = this.answer(data.index);
    answer.step = Math.max(answer.step, data.step);
    if (type === "progress") {
      answer.total = Math.max(answer.total, data.tokens_total);
      answer.said = data.tokens_total;
      if (data.tokens_total < answer.total) answer.end = data.tokens_total; // an end token: what follows does not count
      return;
    }
    data.positions.forEach((position, i) => {
      const commits = (answer.cells[position] ??= []);
      if (commits.some((c) => c.step === data.step)) return; // sent again
      commits.push({ step: data.step, token: data.tokens[i], text: data.texts?.[i] ?? `#${data.tokens[i]}`, confidence: data.confidence[i] });
      commits.sort((a, b) => a.step - b.step);
      answer.total = Math.max(answer.total, position + 1);
    });
    if (answer.said && answer.total > answer.said) answer.end = answer.said;
    if (data.provisional) answer.provisional.set(data.step, data.provisional);
  }
}

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

export class DenoiseView {
  constructor(trace) {
    this.trace = trace;
    this.at = null; // a step that is looked at, or null: the newest
    this.index = 0;
    this.colour = "step";
    this.cursor = null;
    this.playing = null;
  }

  stop() {
    clearInterval(this.playing);
    this.playing = null;
  }

  play(answer) {
    if (this.playing) {
      this.stop();
    } else {
      if (this.at === null || this.at >= answer.step) this.at = 0;
      const pace = Math.max(40, Math.min(250, 6000 / Math.max(1, answer.step)));
      this.playing = setInterval(() => {
        this.at += 1;
        if (this.at >= answer.step) {
          this.at = null;
          this.stop();
        }
        changed();
      }, pace);
    }
    changed();
  }

  key(event, answer) {
    const columns = Math.max(1, getComputedStyle(event.currentTarget).gridTemplateColumns.split(" ").length);
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    if (!(event.key in moves) && event.key !== "Home" && event.key !== "End") return;
    event.preventDefault();
    const last = answer.total - 1;
    const from = this.cursor ?? -1;
    this.cursor = event.key === "Home" ? 0 : event.key === "End" ? last : Math.max(0, Math.min(last, from + moves[event.key]));
    changed();
  }

  point(event) {
    const cell = event.target.closest("[data-at]");
    if (cell) {
      this.cursor = Number(cell.dataset.at);
      changed();
    }
  }

  static at(answer, position, step) {
    return answer.cells[position]?.findLast((c) => c.step <= step);
  }

  render(label = "Answer") {
    const answers = this.trace.answers;
    const answer = answers[this.index] ?? answers.find((a) => a);
    if (!answer) return html`<p>No step was heard of yet.</p>`;
    const step = Math.min(this.at ?? answer.step, answer.step);
    const provisional = answer.provisional.get(step);
    let committed = 0;
    // Of an ended answer, what was never reached is left out.
    const length = answer.end === null ? answer.total : Math.max(answer.end, answer.cells.length);
    const total = answer.end ?? answer.total;
    const cells = Array.from({ length }, (_, position) => {
      const cell = DenoiseView.at(answer, position, step);
      const after = answer.end !== null && position >= answer.end ? " after" : "";
      const here = position === this.cursor ? " cursor" : "";
      if (cell) {
        if (position < total) committed += 1;
        const share = this.colour === "step" ? cell.step / Math.max(1, answer.step) : cell.confidence;
        const shade = Math.max(0, Math.min(SHADES, Math.round(share * SHADES)));
        const fresh = cell.step === step && this.at !== null ? " fresh" : "";
        return html`<span class="token s${shade}${after}${here}${fresh}" data-at=${position}>${visible(cell.text)}</span>`;
      }
      const at = provisional?.positions.indexOf(position) ?? -1;
      if (at >= 0) return html`<span class="token provisional${here}" data-at=${position}>${visible(provisional.texts?.[at] ?? "?")}</span>`;
      return html`<span class="token mask${after}${here}" data-at=${position}>·</span>`;
    });
    return html`<div class="denoise">
      <div class="bar">
        ${answers.length > 1
          ? html`<label>Answer <select @change=${(e) => { this.index = Number(e.target.value); changed(); }}>${answers.map((_, i) => html`<option value=${i} ?selected=${i === this.index}>${i + 1} of ${answers.length}</option>`)}</select></label>`
          : nothing}
        <label>Colour <select @change=${(e) => { this.colour = e.target.value; changed(); }}>
          <option value="step">by step</option><option value="confidence">by confidence</option></select></label>
        <span class="legend" aria-hidden="true">${this.colour === "step" ? "early" : "unsure"} ${[0, 3, 6, 9].map((s) => html`<i class="s${s}"></i>`)} ${this.colour === "step" ? "late" : "sure"}</span>
      </div>
      <div class="bar">
        <button @click=${() => this.play(answer)}>${this.playing ? "Pause" : "Play"}</button>
        <label class="grow">Step <input type="range" min="0" max=${answer.step} .value=${String(step)}
          aria-valuetext="step ${step} of ${answer.step}" @input=${(e) => { this.stop(); const v = Number(e.target.value); this.at = v >= answer.step ? null : v; changed(); }}></label>
        <output>${step} of ${answer.step}</output>
      </div>
      <div class="grid" tabindex="0" role="group" aria-label="${label}: ${committed} of ${total} tokens committed at step ${step}. Arrow keys read single tokens."
        @keydown=${(e) => this.key(e, answer)} @pointerover=${(e) => this.point(e)} @click=${(e) => this.point(e)}>${cells}</div>
      <p class="detail" aria-live="polite">${this.detail(answer, step, committed, total)}</p>
    </div>`;
  }

  detail(answer, step, committed, total) {
    if (this.cursor === null || this.cursor >= answer.total) return html`${number(committed)} of ${number(total)} tokens committed${answer.end !== null && answer.cells.length > answer.end ? ", then the end; what stands after it does not count" : ""}. Point at one to read about it.`;
    const cell = DenoiseView.at(answer, this.cursor, step);
    if (!cell) return html`Position ${this.cursor}: not committed by step ${step}`;
    return html`Position ${this.cursor}: <code>${JSON.stringify(cell.text)}</code>, token ${cell.token}, committed in step ${cell.step} with confidence ${cell.confidence.toFixed(3)}`;
  }
}
