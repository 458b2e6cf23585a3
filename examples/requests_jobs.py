"""The job API with `requests`: submit many, follow one step by step, collect all. Needs a server
(`make up`).
"""

import json
import os

import requests

BASE = os.environ.get("VDIFF_BASE_URL", "http://localhost:8000")
session = requests.Session()


def submit(question: str) -> dict:
    body = {
        "model": "vdiff-tiny",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 32,
        "temperature": 0,
    }
    answer = session.post(
        f"{BASE}/v1/jobs", json={"endpoint": "/v1/chat/completions", "body": body}, timeout=30
    )
    if not answer.ok:
        raise SystemExit(answer.json()["detail"])  # says which field is wrong
    return answer.json()


jobs = [submit(f"What is {number} + 25?") for number in (17, 30, 58)]

# The first one as it comes out of the noise: each step's tokens, with the place where they belong.
with session.get(BASE + jobs[0]["urls"]["events"], stream=True, timeout=60) as events:
    kind = ""
    for line in events.iter_lines(decode_unicode=True):
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: ") and kind == "denoise":
            step = json.loads(line.removeprefix("data: "))
            shown = [
                f"{place}:{text!r}"
                for place, text in zip(step["positions"], step["texts"], strict=True)
            ]
            print("step", step["step"], " ".join(shown))

for job in jobs:
    done = session.get(BASE + job["urls"]["self"], params={"wait": 60}, timeout=90).json()
    print(done["status"], done["result"]["choices"][0]["message"]["content"])
