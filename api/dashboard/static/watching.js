// Follow something on the server that the page shows; its stream tells of the database's trouble too.

import { follow } from "./client.js";
import { changed } from "./ui.js";

const TROUBLE = "PostgreSQL does not answer. What is shown may be old.";

// `page.state` says how the connection is; a function that ends it is returned. seen: told of every event but trouble.
export function watch(page, path, { seen, trouble = TROUBLE, until = ["done"] }) {
  return follow(
    path,
    (type, data) => {
      if (type === "trouble") page.state = new Error(trouble);
      else {
        page.state = "open";
        seen(type, data);
      }
      changed();
    },
    (state) => {
      // Why nothing comes is worth more than that nothing comes, until the next event.
      if (!(page.state instanceof Error && (state === "lost" || state === "open"))) page.state = state;
      changed();
    },
    until,
  );
}
