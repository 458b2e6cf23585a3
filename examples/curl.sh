#!/bin/sh
# A job with nothing but curl: submit, wait, read the text. Needs a server (`make up`).
set -eu
base=${VDIFF_BASE_URL:-http://localhost:8000}

# The same Idempotency-Key gives the same job, so that sending it again after a lost answer pays nothing twice.
key=example-$(date +%s)-$$
job=$(curl -sf "$base/v1/jobs" -H 'content-type: application/json' -H "idempotency-key: $key" -d '{
  "endpoint": "/v1/chat/completions",
  "body": {"model": "vdiff-tiny", "messages": [{"role": "user", "content": "What is 17 + 25?"}],
           "diffusion": {"algorithm": "threshold", "threshold": 0.9}}
}' | sed -n 's/.*"id": *"\(job_[^"]*\)".*/\1/p')
echo "submitted $job"

# The answer comes when the job is over, or after 30 seconds.
curl -sf "$base/v1/jobs/$job?wait=30" >/dev/null
curl -sf "$base/v1/jobs/$job/result" | sed -n 's/.*"content": *"\([^"]*\)".*/\1/p'
