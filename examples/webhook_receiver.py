"""A receiver of webhooks: it verifies, drops what it has seen, and answers at once.

    WEBHOOK_SECRET=whsec_... uvicorn examples.webhook_receiver:app --port 9000

The secret is the one that registering the endpoint answered with.
"""

import os

from fastapi import FastAPI, HTTPException, Request
from standardwebhooks import Webhook, WebhookVerificationError

app = FastAPI()
webhook = Webhook(os.environ["WEBHOOK_SECRET"])
seen: set[str] = set()  # of one process; in yours a table with a unique key


@app.post("/hook", status_code=204)
async def receive(request: Request) -> None:
    body = (
        await request.body()
    )  # the bytes as they came: a body that was parsed and written again has another signature
    try:
        event = webhook.verify(body, dict(request.headers))
    except WebhookVerificationError as exc:
        raise HTTPException(401, f"not from vdiff, or older than 5 minutes: {exc}") from exc
    if event["id"] in seen:  # an event arrives at least once
        return
    seen.add(event["id"])
    # What takes long belongs into a queue of your own: an answer that is late counts as none, and
    # the event comes again.
    print(event["type"], event["data"]["id"], event["data"]["status"], flush=True)
