"""What evaluate.py measures: the likelihood of a run, and how far its samples are from the data.

likelihood.py and samples.py make the reports, metrics.py has the arithmetic, features/ the networks whose features are
compared. Each number of evaluate.py is a dict
{"value", "standard_error", "unit", "settings", ...} that rests on nothing but what is in it.
"""
