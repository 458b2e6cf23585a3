"""A batch, as for OpenAI: a file of requests becomes a file of answers. Needs a server (`make up`)."""

import io
import json
import os
import time

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("VDIFF_BASE_URL", "http://localhost:8000") + "/v1", api_key="none"
)
questions = {
    "sum": "What is 17 + 25?",
    "order": "Sort the numbers: 5 2 9 1",
    "words": "Reverse the words: apple river stone",
}

lines = [
    {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "vdiff-tiny",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 32,
            "temperature": 0,
        },
    }
    for name, text in questions.items()
]
content = io.BytesIO("\n".join(json.dumps(line) for line in lines).encode())
file = client.files.create(file=("requests.jsonl", content), purpose="batch")
batch = client.batches.create(
    input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
)
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(0.2)
    batch = client.batches.retrieve(batch.id)
print(batch.status, batch.request_counts.completed, "of", batch.request_counts.total)
for line in client.files.content(batch.output_file_id).text.splitlines():
    answer = json.loads(line)
    print(answer["custom_id"], answer["response"]["body"]["choices"][0]["message"]["content"])
