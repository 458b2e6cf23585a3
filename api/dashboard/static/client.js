// Talking to the API: the key (kept for this tab alone), JSON requests, and event streams that come back after a cut.

const KEY = "vdiff-api-key";
const RETRY_MS = [500, 1000, 2000, 5000, 10000];

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  },
};

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? body?.detail ?? `the server answered ${status}`);
    this.status = status;
    this.code = body?.error?.code ?? "";
    this.param = body?.error?.param ?? null;
  }
}

function headers(more = {}) {
  return key.get() ? { ...more, authorization: `Bearer ${key.get()}` } : more;
}

async function refusal(answer) {
  const body = await answer.json().catch(() => null);
  const error = new ApiError(answer.status, body);
  if (answer.status === 401) window.dispatchEvent(new CustomEvent("vdiff-key-needed", { detail: key.get() ? error.message : "" }));
  return error;
}

async function send(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { detail: "the server cannot be reached" });
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

export async function call(method, path, body, { signal } = {}) {
  const form = body === undefined || body instanceof FormData; // a form names its own type
  const answer = await send(path, {
    method,
    signal,
    headers: headers(form ? {} : { "content-type": "application/json" }),
    body: form ? body : JSON.stringify(body),
  });
  return answer.status === 204 ? null : answer.json();
}

// The whole of listed things, as lists leave texts out: asked for once, a few at a time, and kept under `key`.
export async function wholes(kept, things, key) {
  const missing = things.filter((thing) => !kept.has(key(thing)));
  const ask = async () => {
    for (let thing = missing.shift(); thing; thing = missing.shift()) {
      const found = await call("GET", thing.urls.self.slice(1)).catch(() => null);
      if (found) kept.set(key(thing), found);
    }
  };
  await Promise.all(Array.from({ length: 4 }, ask));
}

// How a file begins: so many bytes at most, as text. The rest is not fetched.
export async function head(path, most) {
  const stop = new AbortController();
  const reader = (await send(path, { headers: headers(), signal: stop.signal })).body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (let seen = 0; seen < most; ) {
    const { value, done } = await reader.read();
    if (done) return text;
    seen += value.length;
    text += decoder.decode(value, { stream: true });
  }
  stop.abort();
  return text;
}

// A file through fetch, as a plain link cannot carry a key.
export async function download(path, name) {
  const answer = await send(path, { headers: headers() });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const shown = () =>
  new Promise((resolve) => {
    if (!document.hidden) return resolve();
    document.addEventListener("visibilitychange", function look() {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      resolve();
    });
  });

/* Server-sent events over fetch, because EventSource cannot carry a key. `onEvent(type, data)`; `onState` hears "open", "lost"
   (comes back by itself) or an ApiError that ends it. A type in `until` ends the stream for good. Gives back a function that stops.
   A tab that nobody sees gives its connection back, as a browser has six for all tabs of a server, and goes on where it was. */
export function follow(path, onEvent, onState = () => {}, until = []) {
  const stop = new AbortController();
  let lastId = "";
  let failures = 0;

  async function once() {
    const cut = new AbortController();
    const hide = () => document.hidden && cut.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      return await read(AbortSignal.any([stop.signal, cut.signal]));
    } catch (error) {
      if (cut.signal.aborted && !stop.signal.aborted) return "hidden";
      throw error;
    } finally {
      document.removeEventListener("visibilitychange", hide);
    }
  }

  async function read(signal) {
    const more = { accept: "text/event-stream", ...(lastId ? { "last-event-id": lastId } : {}) };
    const answer = await fetch(path, { headers: headers(more), signal });
    if (!answer.ok) throw await refusal(answer);
    onState("open");
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return "ended";
      failures = 0;
      rest = (rest + value).replaceAll("\r\n", "\n");
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        let type = "message";
        const data = [];
        for (const line of block.split("\n")) {
          const at = line.indexOf(":");
          const name = at < 0 ? line : line.slice(0, at);
          const text = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
          if (name === "event") type = text;
          else if (name === "data") data.push(text);
          else if (name === "id") lastId = text;
        }
        if (data.length) onEvent(type, JSON.parse(data.join("\n")));
        if (until.includes(type)) {
          stop.abort();
          return "done";
        }
      }
    }
  }

  (async () => {
    while (!stop.signal.aborted) {
      await shown();
      if (stop.signal.aborted) return;
      try {
        if ((await once()) === "hidden") continue;
      } catch (error) {
        if (stop.signal.aborted) return;
        // What the server refuses will be refused again; what it cannot do now may work later.
        if (error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 429) {
          onState(error);
          return;
        }
      }
      if (stop.signal.aborted) return;
      onState("lost");
      const wait = RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)];
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  })();
  return () => stop.abort();
}
