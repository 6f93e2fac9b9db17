"""What a run has learnt, in pictures: python -m ddpm_jax.plots runs/digits --report

records.py reads the run's files, strips.py makes images on their way to noise and back, figures.py draws arrays, each
function a matplotlib Figure, album.py gathers all there is to draw, report.py puts it on one page.
"""
