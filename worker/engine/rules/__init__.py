"""Unmasking rules: which of the open block's positions a step commits. Small, pure, one class each."""

from worker.engine.rules import quota, threshold
from worker.engine.rules.base import Rule, RuleInput

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        quota.LowConfidence(),
        quota.LowConfidenceStatic(),
        quota.Random(),
        quota.Sequential(),
        quota.MaskgitPlus(),
        quota.TopkMargin(),
        quota.Entropy(),
        quota.Origin(),
        threshold.Threshold(),
        threshold.Factor(),
        threshold.EntropyBound(),
        threshold.Hierarchical(),
        threshold.Credit(),
        threshold.Klass(),
        threshold.LowConfidenceDynamic(),
        threshold.JointThreshold(),
    )
}

__all__ = ["RULES", "Rule", "RuleInput"]
