"""The built-in demo: three small tasks with verifiable answers, a tiny Llama, and its character tokenizer.

Nothing is downloaded: `tasks` generates the rows, `build` trains the checkpoint in `model/` from scratch, and `score`
measures exact match.
"""
