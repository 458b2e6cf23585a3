"""OpenAI's package as it is: an answer, a stream, and how many model calls a rule saves. Needs a
server (`make up`).
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("VDIFF_BASE_URL", "http://localhost:8000") + "/v1", api_key="none"
)
question = [{"role": "user", "content": "Sort the numbers: 5 2 9 1"}]

for diffusion in ({"algorithm": "low_confidence"}, {"algorithm": "threshold", "threshold": 0.9}):
    answer = client.chat.completions.create(
        model="vdiff-tiny",
        messages=question,
        max_tokens=32,
        temperature=0,
        extra_body={"diffusion": diffusion},
    )
    told = answer.model_extra["vdiff"]
    print(
        f"{diffusion['algorithm']}: {answer.choices[0].message.content!r} in {told['forwards']} model calls"
    )

for chunk in client.chat.completions.create(
    model="vdiff-tiny", messages=question, temperature=0, stream=True
):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="")
print()
