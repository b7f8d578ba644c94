"""The run folder: writing and reading it, completions, checkpoints, resuming, trackers.

Whatever is written is whole or not there. Knows nothing of what the numbers mean or how they are computed.
No torch but in `checkpoint.py` and `resume.py`.
"""
