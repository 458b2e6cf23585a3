// Fields of a form whose errors stand where they belong: the server names a field by its full path, as `graders[0].pattern`.

import { changed, failure, html, nothing } from "./ui.js";

export class Fields {
  constructor(prefix) {
    this.prefix = prefix; // of the ids, as two forms may be on a page
    this.refused = null;
    this.at = null; // the path of the field that it is about; null when it is about none
    this.paths = new Set();
    this.entry = this.entry.bind(this);
  }

  id(path) {
    return `${this.prefix}-${path}`;
  }

  // The field that is nearest to what an error names: itself, or what it is a part of.
  nearest(param) {
    const parts = (param ?? "").split(/(?=[.[])/); // graders, [0], .pattern
    for (let n = parts.length; n; n--) if (this.paths.has(parts.slice(0, n).join(""))) return parts.slice(0, n).join("");
    return null;
  }

  clear() {
    this.refused = this.at = null;
  }

  refuse(error, param = error.param) {
    this.refused = error;
    this.at = this.nearest(param);
    changed();
    this.focus(this.at);
  }

  // Once it is drawn. What is folded away is unfolded.
  focus(path) {
    if (path === null) return;
    requestAnimationFrame(() =>
      requestAnimationFrame(() => {
        const control = document.getElementById(this.id(path));
        for (let fold = control?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
        control?.focus();
      }),
    );
  }

  // control: of the id, the id of what describes it, and whether it is wrong ("true" or "false").
  entry(path, words, control, help = nothing) {
    this.paths.add(path);
    const id = this.id(path);
    const wrong = this.refused !== null && this.at === path;
    return html`<div class="entry"><label for=${id}>${words}</label>${control(id, `${id}-said`, String(wrong))}
      <small id="${id}-said">${wrong ? html`<b class="bad">${this.refused.message}</b> ` : nothing}${help}</small></div>`;
  }

  // One of a group of fields that are kept as texts in `values`, by name. A kind is text, code, integer, number, choice, flag, ...
  field(path, field, values) {
    const set = (value) => { values[field.name] = value; changed(); };
    const value = values[field.name] ?? "";
    const mode = { integer: "numeric", number: "decimal" }[field.kind] ?? "text";
    const unset = field.unset ?? (field.required ? "" : "default");
    const control = (id, said, wrong) => {
      if (field.kind === "flag") return html`<input type="checkbox" id=${id} aria-describedby=${said} aria-invalid=${wrong} .checked=${value === true} @change=${(e) => set(e.target.checked)}>`;
      if (field.choices)
        return html`<select id=${id} aria-describedby=${said} aria-invalid=${wrong} @change=${(e) => set(e.target.value)}><option value="" .selected=${value === ""}>${unset}</option>${field.choices.map((c) => html`<option value=${c} .selected=${c === value}>${c}</option>`)}</select>`;
      if (field.kind === "code")
        return html`<textarea class="code" rows=${field.rows ?? 6} id=${id} ?required=${field.required} spellcheck="false" aria-describedby=${said} aria-invalid=${wrong} .value=${value} @input=${(e) => set(e.target.value)}></textarea>`;
      return html`<input id=${id} ?required=${field.required} inputmode=${mode} autocomplete="off" placeholder=${unset} aria-describedby=${said} aria-invalid=${wrong} .value=${value} @input=${(e) => set(e.target.value)}>`;
    };
    return this.entry(path, field.words ?? field.name, control, field.help);
  }

  // What is about no field that is there.
  rest() {
    return this.at === null ? failure(this.refused) : nothing;
  }
}

const wrong = (path, words) => Object.assign(new Error(words), { param: path });

// The value that a text of a field stands for; undefined when it is left empty. Throws with `param`.
export function valueOf({ kind }, text, path) {
  if (kind === "flag") return text === true ? true : undefined;
  const given = (text ?? "").trim();
  if (!given) return undefined;
  if (kind === "integer" || kind === "number") return numeral(given, path);
  if (kind === "integers") return given.split(/[\s,]+/).filter(Boolean).map((part) => numeral(part, path));
  if (kind === "list") return given.split(",").map((part) => part.trim()).filter(Boolean);
  if (kind === "group") return /^\d+$/.test(given) ? Number(given) : given;
  return kind === "code" ? text : given;
}

function numeral(text, path) {
  const value = Number(text);
  if (Number.isNaN(value)) throw wrong(path, `${text} is no number`);
  return value;
}
