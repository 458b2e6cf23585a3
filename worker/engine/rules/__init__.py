"""Unmasking rules: which of the open block's masked positions a step commits. Small, pure, one class each."""

from worker.engine.rules.base import Rule, RuleInput
from worker.engine.rules.quota import LowConfidence, Random
from worker.engine.rules.threshold import Factor, Threshold

RULES: dict[str, Rule] = {rule.name: rule for rule in (LowConfidence(), Random(), Threshold(), Factor())}

__all__ = ["RULES", "Factor", "LowConfidence", "Random", "Rule", "RuleInput", "Threshold"]
