"""Two decoders on the same questions, with error bars. Needs a server (`make up`); `QUESTIONS` says
how many.
"""

import json
import os
import random
import time

import httpx

client = httpx.Client(
    base_url=os.environ.get("VDIFF_BASE_URL", "http://localhost:8000"), timeout=60
)
numbers = random.Random(7)
pairs = [
    (numbers.randrange(10, 60), numbers.randrange(10, 40))
    for _ in range(int(os.environ.get("QUESTIONS", "40")))
]
lines = [json.dumps({"input": f"What is {a} + {b}?", "reference": str(a + b)}) for a, b in pairs]

dataset = client.post(
    "/v1/files", data={"purpose": "evals"}, files={"file": ("sums.jsonl", "\n".join(lines))}
)
evaluation = (
    client.post(
        "/v1/evaluations",
        json={
            "name": "sums",
            "dataset": {"file_id": dataset.raise_for_status().json()["id"]},
            "template": "{{input}}",
            "graders": [{"type": "exact"}],
            "configurations": [
                {"name": "one per step", "model": "vdiff-tiny", "max_tokens": 32, "temperature": 0},
                {
                    "name": "threshold",
                    "model": "vdiff-tiny",
                    "max_tokens": 32,
                    "temperature": 0,
                    "diffusion": {"algorithm": "threshold", "threshold": 0.9},
                },
            ],
        },
    )
    .raise_for_status()
    .json()
)

while evaluation["status"] == "in_progress":
    time.sleep(0.5)
    evaluation = client.get(f"/v1/evaluations/{evaluation['id']}").raise_for_status().json()
for configuration in evaluation["configurations"]:
    results = configuration["results"]
    right = results["accuracy"]
    print(
        f"{configuration['name']}: {right['mean']:.0%} right ({right['low']:.0%} to {right['high']:.0%}),",
        end=" ",
    )
    print(f"{results['tokens_per_forward']:.2f} tokens per forward")
