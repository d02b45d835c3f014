"""What can be measured without network, judge or task: likelihood, samples against the data, the self-play gap.

`text` and `intervals` are pure; `measure` runs a model; `during_training` fits it into a run.
"""

from sapo.local_measures.intervals import Estimate, bootstrap_ratio, paired_change
from sapo.local_measures.measure import (
    LocalOptions,
    Measured,
    measure,
    sample_responses,
    score_responses,
    summarize,
    wins,
)
from sapo.local_measures.text import distinct, ends_in_loop, jensen_shannon, seq_rep

__all__ = [
    "Estimate",
    "LocalOptions",
    "Measured",
    "bootstrap_ratio",
    "distinct",
    "ends_in_loop",
    "jensen_shannon",
    "measure",
    "paired_change",
    "sample_responses",
    "score_responses",
    "seq_rep",
    "summarize",
    "wins",
]
