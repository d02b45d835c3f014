"""`sapo evaluate`: local measures, task files, lm-evaluation-harness and judged chat benchmarks."""
