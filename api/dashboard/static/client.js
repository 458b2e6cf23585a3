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
  if (answer.status === 401) window.dispatchEvent(new CustomEvent("vdiff-key-needed"));
  return new ApiError(answer.status, body);
}

export async function call(method, path, body, { signal } = {}) {
  let answer;
  try {
    answer = await fetch(path, {
      method,
      signal,
      headers: headers(body === undefined ? {} : { "content-type": "application/json" }),
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { detail: "the server cannot be reached" });
  }
  if (!answer.ok) throw await refusal(answer);
  return answer.status === 204 ? null : answer.json();
}

/* Server-sent events over fetch, because EventSource cannot carry a key. `onEvent(type, data)`; `onState` hears "open", "lost"
   (comes back by itself) or an ApiError that ends it. A type in `until` ends the stream for good. Gives back a function that stops. */
export function follow(path, onEvent, onState = () => {}, until = []) {
  const stop = new AbortController();
  let lastId = "";
  let failures = 0;

  async function once() {
    const more = { accept: "text/event-stream", ...(lastId ? { "last-event-id": lastId } : {}) };
    const answer = await fetch(path, { headers: headers(more), signal: stop.signal });
    if (!answer.ok) throw await refusal(answer);
    onState("open");
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return false;
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
          return true;
        }
      }
    }
  }

  (async () => {
    while (!stop.signal.aborted) {
      try {
        if (await once()) return;
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
