"""Runs to look at: history, conditions, diagnosis, curves, credit maps, and the page that shows them.

Everything comes from run folders. A new curve is a row of `CHARTS` in `curves.py`. Knows nothing of how a
run is made. No torch.
"""
