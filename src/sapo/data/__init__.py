"""Rows of any supported shape -> prompt and response tokens.

`load_rows` finds the rows, `prepare_dataset` recognises their format and tokenizes them, and `collate_examples` gives
the trainer `Example`s; `load_mixture` and `prepare_mixture` do the same for several datasets.
"""
