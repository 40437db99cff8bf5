"""`edgemix lm-eval`: lm-evaluation-harness on bundles."""
