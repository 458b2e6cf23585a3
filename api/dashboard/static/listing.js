// A list in pages, newest first; it follows what happens while its first page is shown. What a page looks like is its kind's.

import { ApiError, call } from "./client.js";
import { changed, connection, failure, pages } from "./ui.js";

export class Listing {
  // path: of the API, with what the filters ask for. cursor: the parameter that asks for the page behind another.
  constructor(live, { path, size, cursor = "after" }) {
    this.live = live;
    this.path = path;
    this.size = size;
    this.cursor = cursor;
    this.cursors = [""];
    this.page = null;
    this.error = null;
  }

  start() {
    this.seen = () => this.cursors.length === 1 && this.load();
    this.live.listeners.add(this.seen);
    this.timer = setInterval(changed, 5000);
    this.load();
  }

  stop() {
    this.live.listeners.delete(this.seen);
    clearInterval(this.timer);
    this.request?.abort();
  }

  // What the list is narrowed to, name by name.
  query() {
    return {};
  }

  async load() {
    this.request?.abort();
    const request = (this.request = new AbortController());
    const params = new URLSearchParams({ limit: this.size, ...this.query() });
    if (this.cursors.at(-1)) params.set(this.cursor, this.cursors.at(-1));
    try {
      this.page = await call("GET", `${this.path}?${params}`, undefined, { signal: request.signal });
      this.error = null;
    } catch (error) {
      if (!(error instanceof ApiError)) return; // a newer request took its place
      this.error = error;
    }
    changed();
  }

  // To the first page again.
  restart() {
    this.cursors = [""];
    this.load();
  }

  // What keeps it from being true: why it could not be read, or else that it may be old.
  trouble() {
    return this.error ? failure(this.error) : connection(this.live.state);
  }

  pager() {
    const back = () => { this.cursors.pop(); this.load(); };
    const on = () => { this.cursors.push(this.page.next_cursor ?? this.page.last_id); this.load(); };
    return pages(this.cursors.length, this.page.has_more, back, on);
  }
}
