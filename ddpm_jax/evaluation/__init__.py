"""What evaluate.py measures: the likelihood of a run, and the distance of its samples from the data.

likelihood.py and samples.py write the reports, metrics.py computes the metrics, features/ has the feature extractors.
Each metric is a dict {"value", "standard_error", "unit", "settings", ...} with everything that the value depends on.
"""
