"""Answer an evaluation set with a bundled autoregressive model, greedily, with transformers; score
with the usual scorer.

python scripts/evaluate_ar.py vdiff/bundled/vdiff-tiny-ar vdiff/bundled/vdiff-tiny/eval.jsonl >
answers.jsonl python -m vdiff.bundled.evaluate vdiff/bundled/vdiff-tiny/eval.jsonl answers.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("questions", type=Path, help="JSONL with custom_id, messages, max_tokens")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    with torch.inference_mode():
        for line in args.questions.read_text(encoding="utf-8").splitlines():
            question = json.loads(line)
            ids = tokenizer.apply_chat_template(
                question["messages"],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=False,
            )
            made = model.generate(ids, max_new_tokens=question["max_tokens"], do_sample=False)[
                0, ids.shape[1] :
            ]
            text = tokenizer.decode(made, skip_special_tokens=True)
            print(json.dumps({"custom_id": question["custom_id"], "text": text}), flush=True)


if __name__ == "__main__":
    main()
