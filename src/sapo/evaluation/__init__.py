"""`sapo evaluate`: the same model on local measures, task files, lm-evaluation-harness and judged chat benchmarks."""
