"""The built-in demo: three small tasks with checkable answers, a tiny Llama, and its character tokenizer.

Everything is made by this package: `tasks` generates the rows, `build` trains the checkpoint in `model/` from
nothing, `score` counts right answers. Nothing is downloaded.
"""
