"""What can be measured without network, judge or task: likelihood, samples against the data, the self-play gap.

`text` and `intervals` are pure; `measure` runs a model; `during_training` fits it into a run.
"""
