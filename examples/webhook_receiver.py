"""Webhook receiver: verify the signature, drop duplicates and respond at once.

    WEBHOOK_SECRET=whsec_... uvicorn examples.webhook_receiver:app --port 9000

The secret is in the response to the registration of the endpoint.
"""

import os

from fastapi import FastAPI, HTTPException, Request
from standardwebhooks import Webhook, WebhookVerificationError

app = FastAPI()
webhook = Webhook(os.environ["WEBHOOK_SECRET"])
seen: set[str] = set()  # in production, use a table with a unique key


@app.post("/hook", status_code=204)
async def receive(request: Request) -> None:
    body = (
        await request.body()
    )  # verify the original bytes: a re-encoded body has another signature
    try:
        event = webhook.verify(body, dict(request.headers))
    except WebhookVerificationError as exc:
        raise HTTPException(401, f"not from vdiff, or older than 5 minutes: {exc}") from exc
    if event["id"] in seen:  # an event arrives at least once
        return
    seen.add(event["id"])
    # Put slow work into a queue: after a late response, vdiff sends the event again.
    print(event["type"], event["data"]["id"], event["data"]["status"], flush=True)
