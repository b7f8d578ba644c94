"""Defines tasks: problems, prompts, data, answers, reward functions, and the tasks that ship.

A task is one file with a function `load`, listed in `load.py`; `rewards.py` turns rewards into numbers and
metrics. Knows nothing about models or training. No torch.
"""
