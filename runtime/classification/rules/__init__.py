"""Rules of human experts as members of a mixture over labels."""

from edgemix.runtime.classification.rules.matcher import FiredRule, RuleMatcher, RuleScore, WordScores

__all__ = ["FiredRule", "RuleMatcher", "RuleScore", "WordScores"]
