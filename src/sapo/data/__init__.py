"""Rows of any supported shape -> prompt and response tokens.

`load_rows` (or `load_mixture`) finds the rows, `prepare_dataset` recognises their format and tokenizes them,
and `collate_examples` gives the trainer `Example`s.
"""

from sapo.data.encoding import end_token_ids
from sapo.data.examples import DataOptions, DataReport, Example, Turn, collate_examples, dataset_digest
from sapo.data.formats import ACCEPTED
from sapo.data.loading import Rows, load_mixture, load_rows
from sapo.data.prepare import prepare_dataset

__all__ = [
    "ACCEPTED",
    "DataOptions",
    "DataReport",
    "Example",
    "Rows",
    "Turn",
    "collate_examples",
    "dataset_digest",
    "end_token_ids",
    "load_mixture",
    "load_rows",
    "prepare_dataset",
]
