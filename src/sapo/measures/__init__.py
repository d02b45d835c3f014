"""Measures without network, judge or task: likelihood, samples compared with the data, the self-play gap.

`text` and `intervals` are pure; `measure` runs a model.
"""
