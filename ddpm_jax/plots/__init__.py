"""Plots of a run: python -m ddpm_jax.plots runs/digits --report

records.py reads the run's files, strips.py computes images on the way to noise and back, figures.py turns arrays into
matplotlib Figures, album.py makes all plots of a run, report.py writes the HTML page, card.py the model card.
"""
