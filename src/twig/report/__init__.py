"""Shows runs: history, conditions, diagnosis, curves, credit maps, and the page with them all.

Everything comes from run folders. A new curve is a row of `CHARTS` in `curves.py`. Knows nothing of how a
run is made. No torch.
"""
