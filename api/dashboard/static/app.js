// The frame: navigation by the address's fragment, the API key, one page at a time.

import { BatchForm } from "./batch_form.js";
import { Batch, Batches } from "./batches.js";
import { call, key } from "./client.js";
import { EvaluationForm } from "./evaluation_form.js";
import { Evaluation, Evaluations } from "./evaluations.js";
import { Job } from "./job.js";
import { Jobs } from "./jobs.js";
import { Keys } from "./keys.js";
import { Live, Overview, Workers } from "./overview.js";
import { Playground } from "./playground.js";
import { changed, html, nothing, onDraw } from "./ui.js";
import { render } from "./vendor/lit-html.js";
import { Webhook, Webhooks } from "./webhooks.js";

const root = document.getElementById("app");
const live = new Live();
const models = {
  list: [],
  async load() {
    this.list = (await call("GET", "v1/models")).data;
    changed();
  },
};
const playground = new Playground(models); // kept, so that what was typed survives a look at another page
const evaluationForm = new EvaluationForm(models); // likewise
const batchForm = new BatchForm();
const NAV = [["#/", "Overview"], ["#/jobs", "Jobs"], ["#/batches", "Batches"], ["#/evaluations", "Evaluations"], ["#/playground", "Playground"], ["#/workers", "Workers"], ["#/webhooks", "Webhooks"], ["#/keys", "Keys"]];

class NotFound {
  title = "No such page";
  start() {}
  stop() {}
  render() {
    return html`<p>There is no page at this address. <a href="#/">Overview</a></p>`;
  }
}

function route() {
  const [path, search = ""] = location.hash.replace(/^#/, "").split("?");
  let parts;
  try {
    parts = path.split("/").filter(Boolean).map(decodeURIComponent);
  } catch {
    return new NotFound(); // a broken escape
  }
  const query = new URLSearchParams(search);
  if (!parts.length) return new Overview(live);
  if (parts[0] === "jobs" && parts.length === 1) return new Jobs(live, models, query);
  if (parts[0] === "jobs" && parts.length === 2) return new Job(parts[1]);
  if (parts[0] === "batches" && parts.length === 1) return new Batches(live, batchForm);
  if (parts[0] === "batches" && parts.length === 2) return new Batch(parts[1]);
  if (parts[0] === "evaluations" && parts.length === 1) return new Evaluations(live, evaluationForm);
  if (parts[0] === "evaluations" && parts.length === 2) return new Evaluation(parts[1]);
  if (parts[0] === "webhooks" && parts.length === 1) return new Webhooks();
  if (parts[0] === "webhooks" && parts.length === 2) return new Webhook(parts[1]);
  if (parts[0] === "keys" && parts.length === 1) return new Keys();
  if (parts[0] === "playground" && parts.length === 1) return playground;
  if (parts[0] === "workers" && parts.length === 1) return new Workers(live, models);
  return new NotFound();
}

let page = null;
let asking = false;
let refused = ""; // why the key that is kept was not good enough

async function show() {
  page?.stop();
  page = route();
  if (page.live) live.start();
  else live.stop(); // connections are few, and this page reads nothing of it
  document.title = `${page.title} · vdiff`;
  changed();
  try {
    await page.start();
  } catch {
    // Each page shows its own trouble; a refused key opens the dialogue.
  }
}

function go() {
  show();
  document.querySelector("main")?.focus();
}

function saveKey(event) {
  event.preventDefault();
  key.set(new FormData(event.target).get("key").trim());
  closeKey();
  show();
}

function closeKey() {
  asking = false;
  root.querySelector("dialog")?.close();
  changed();
}

function askKey(event) {
  if (asking) return;
  asking = true;
  refused = event.type === "vdiff-key-needed" ? event.detail : "";
  render(frame(), root);
  root.querySelector("dialog").showModal();
}

function skip(event) {
  event.preventDefault(); // the fragment is the address of the page
  document.querySelector("main").focus();
}

// A page of one thing begins with its path, and says its heading itself until the thing is there.
function heading() {
  if (page && !("id" in page)) return html`<h1>${page.title}</h1>`;
  return page?.job ?? page?.batch ?? page?.evaluation ?? page?.endpoint ? html`<h1 class="hidden">${page.title}</h1>` : nothing;
}

function frame() {
  const here = location.hash.split("?")[0] || "#/";
  const current = (to) => (to === "#/" ? here === "#/" : here.startsWith(to));
  return html`<a class="skip" href="#main" @click=${skip}>To the content</a>
    <header><a class="brand" href="#/"><img src="dashboard/icon.svg" alt="" width="22" height="22"> vdiff</a>
      <nav aria-label="Pages of the dashboard">${NAV.map(([to, name]) => html`<a href=${to} aria-current=${current(to) ? "page" : "false"}>${name}</a>`)}</nav>
      <button class="quiet" @click=${askKey}>API key${key.get() ? " ✓" : ""}</button></header>
    <main id="main" tabindex="-1">${heading()}${page?.render() ?? nothing}</main>
    <footer><a href="docs">API documentation</a></footer>
    <dialog aria-labelledby="key-title" @close=${() => (asking = false)}><form @submit=${saveKey}><h2 id="key-title">API key</h2>
      ${refused ? html`<p class="notice bad" role="alert">${refused}</p>` : nothing}<p>This server wants a key. It is kept in this tab only, until the tab is closed.</p>
      <label class="block">Key <input name="key" type="password" autocomplete="off" .value=${key.get()}></label>
      <div class="bar"><button class="primary">Use it</button><button type="button" @click=${closeKey}>Cancel</button></div></form></dialog>`;
}

onDraw(() => render(frame(), root));
window.addEventListener("hashchange", go);
window.addEventListener("vdiff-key-needed", askKey);
render(frame(), root);
show();
