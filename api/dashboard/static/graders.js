// Graders: what each type asks for in a form, and what it means, in words.

import { html, nothing, number } from "./ui.js";

const WHICH = { name: "which", words: "Which match", kind: "choice", unset: "last", choices: ["first"] };

// type -> what it looks for, and its fields beside name and reference. Types whose reference may be left out say what that means.
export const GRADERS = {
  exact: { help: "The answer is the reference; spaces at the ends do not count.", fields: [] },
  normalised: { help: "The answer is the reference, whatever its case, punctuation and spaces.", fields: [] },
  contains: { help: "The reference is somewhere in the answer.", fields: [{ name: "ignore_case", words: "Ignore case", kind: "flag" }] },
  regex: {
    help: "A pattern takes a part out of the answer, which is compared with the reference.",
    alone: "Left empty, a match is enough.",
    fields: [
      { name: "pattern", words: "Pattern", kind: "text", required: true, help: "A regular expression of Python, such as answer: (\\d+)" },
      { name: "group", words: "Group", kind: "group", unset: "first group, or all", help: "Number or name of the group that counts." },
      WHICH,
      { name: "compare", words: "Compared as", kind: "choice", unset: "exact", choices: ["normalised", "number"] },
    ],
  },
  number: {
    help: "A number in the answer is that in the reference.",
    fields: [
      { name: "tolerance", words: "Tolerance", kind: "number", unset: "0", help: "How far apart the two may be." },
      { name: "relative", words: "Relative tolerance", kind: "number", unset: "0", help: "The same as a share, from 0 to 1." },
      { ...WHICH, words: "Which number" },
    ],
  },
  json: { help: "The answer, or its first code block, is JSON that equals the reference; the order of keys does not count.", fields: [] },
  choice: {
    help: "The answer chooses the label that the reference names.",
    fields: [{ name: "labels", words: "Labels", kind: "list", unset: "A, B, C, D", help: "Separated by commas." }],
  },
  code: {
    help: "Your own Python decides, in a sandbox of the server.",
    alone: "Left empty, grade gets None.",
    fields: [
      { name: "source", words: "Source", kind: "code", required: true, help: "Defines grade(output, reference, item), which gives true or a number." },
      { name: "pass_at", words: "Passes at", kind: "number", unset: "1", help: "The least number that passes, from 0 to 1." },
      { name: "timeout_seconds", words: "Time limit, seconds", kind: "number", unset: "5" },
      { name: "memory_mb", words: "Memory limit, MB", kind: "integer", unset: "512" },
    ],
  },
};

const code = (text) => html`<code>${text}</code>`;

function tolerance(g) {
  const parts = [g.tolerance ? html`${String(g.tolerance)}` : nothing, g.relative ? html`${number(100 * g.relative, 1)} %` : nothing].filter((p) => p !== nothing);
  return parts.length ? html`, give or take ${parts.length === 2 ? html`${parts[0]} or ${parts[1]}` : parts[0]}` : nothing;
}

const SENTENCES = {
  exact: (g) => html`the answer is ${code(g.reference)}`,
  normalised: (g) => html`the answer is ${code(g.reference)}, whatever its case, punctuation and spaces`,
  contains: (g) => html`the answer contains ${code(g.reference)}${g.ignore_case ? ", whatever its case" : nothing}`,
  regex: (g) =>
    g.reference === null
      ? html`the answer has a match of ${code(g.pattern)}`
      : html`the ${g.which} match of ${code(g.pattern)}${g.group ? html`, group ${String(g.group)},` : nothing} is ${code(g.reference)}${g.compare === "exact" ? nothing : g.compare === "number" ? " as a number" : ", normalised"}`,
  number: (g) => html`the ${g.which} number of the answer is that of ${code(g.reference)}${tolerance(g)}`,
  json: (g) => html`the answer is JSON that equals ${code(g.reference)}`,
  choice: (g) => html`of ${g.labels.join(", ")} the answer chooses ${code(g.reference)}`,
  code: (g) => html`its code gives ${g.pass_at === 1 ? "true" : html`at least ${String(g.pass_at)}`}${g.reference === null ? nothing : html` for ${code(g.reference)}`}`,
};

// What makes an answer right, as a list; an answer passes when all of it holds.
export const inWords = (graders) =>
  html`<ul class="plain">${graders.map(
    (g) => html`<li><b>${g.name}</b>: ${SENTENCES[g.type]?.(g) ?? g.type}${g.source ? html`<details><summary>Source</summary><pre class="text">${g.source}</pre></details>` : nothing}</li>`,
  )}</ul>`;

// What one grader said of one answer.
export function verdict(v) {
  const said = v.passed === null ? html`<b class="bad">could not tell</b>` : v.passed ? "passed" : html`<b class="bad">failed</b>`;
  const read = v.extracted === undefined ? nothing : html`, read “${v.extracted}”`;
  return html`${v.name} ${said}${v.score === undefined ? nothing : html` with ${String(v.score)}`}${read}${v.error ? html`: ${v.error.message}` : nothing}`;
}
