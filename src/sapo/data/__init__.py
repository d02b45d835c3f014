"""Rows of any supported shape -> prompt and response tokens.

`load_rows` finds the rows, `prepare_dataset` recognises their format and tokenizes them, and `collate_examples` gives
the trainer `Example`s; `load_mixture` and `prepare_mixture` do the same for several datasets.
"""

from sapo.data.encoding import end_token_ids
from sapo.data.examples import DataOptions, DataReport, Example, Turn, collate_examples, dataset_digest, is_prepared
from sapo.data.formats import ACCEPTED
from sapo.data.loading import Rows, load_rows
from sapo.data.mixture import Member, load_mixture, prepare_mixture, split_rows
from sapo.data.prepare import prepare_dataset

__all__ = [
    "ACCEPTED",
    "DataOptions",
    "DataReport",
    "Example",
    "Member",
    "Rows",
    "Turn",
    "collate_examples",
    "dataset_digest",
    "end_token_ids",
    "is_prepared",
    "load_mixture",
    "load_rows",
    "prepare_dataset",
    "prepare_mixture",
    "split_rows",
]
