"""lm-eval with vdiff's own log-likelihood: `--model vdiff`, a thin layer over lm-eval's
`local-completions`.

Generation and the tokenizer are lm-eval's own code against `/v1/completions` and `/tokenize`.
Scores go to `/v1/loglikelihood` instead of an echo: it is told where the answer begins, so that it
computes the answer's tokens only, and it has LLaDA's Monte Carlo estimate.

    python examples/lm_eval/vdiff_lm.py run --model vdiff --tasks sums_choice --include_path
    examples/lm_eval \
        --model_args
        model=vdiff-tiny,base_url=http://127.0.0.1:8000/v1/completions,method=monte_carlo,mc_num=128
"""

from __future__ import annotations

from typing import Any

import requests
from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tqdm import tqdm

PAIRS = 32  # in one request; the server takes up to 128


@register_model("vdiff")
class VDiffLM(LocalCompletionsAPI):
    """Args: method, mc_num, cfg_scale: as `/v1/loglikelihood` has them; all else is
    local-completions'.
    """

    def __init__(
        self,
        method: str | None = None,
        mc_num: int | None = None,
        cfg_scale: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"tokenizer_backend": "remote", **kwargs})
        fields = {"method": method, "mc_num": mc_num, "cfg_scale": cfg_scale or None}
        self._how = {k: v for k, v in fields.items() if v is not None}
        if method != "chain_rule":  # which draws nothing
            self._how["seed"] = self._seed
        self._scores = self.base_url.replace("/v1/completions", "/v1/loglikelihood")

    def _loglikelihood_tokens(self, requests_: list[Any], **_: Any) -> list[tuple[float, bool]]:
        made = []
        with tqdm(desc="Log-likelihoods", total=len(requests_)) as bar:
            for start in range(0, len(requests_), PAIRS):
                some = requests_[start : start + PAIRS]
                pairs = [
                    {"context": context, "continuation": answer} for _, context, answer in some
                ]
                body = {"model": self.model, "pairs": pairs, **self._how}
                answer = requests.post(
                    self._scores, json=body, headers=self.header, timeout=self.timeout
                )
                if not answer.ok:
                    raise RuntimeError(f"{self._scores}: {answer.text}")
                for (key, _, _), one in zip(some, answer.json()["data"], strict=True):
                    # Monte Carlo draws say nothing of which token is the likeliest.
                    made.append((one["loglikelihood"], bool(one["is_greedy"])))
                    if key is not None:  # of loglikelihood_rolling, which caches the whole
                        self.cache_hook.add_partial("loglikelihood", key, made[-1])
                bar.update(len(some))
        return made


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
