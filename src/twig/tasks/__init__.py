"""Problems and rewards: prompts, data, answers read out of text, reward functions, and the tasks that ship.

A task is one file with a function `load`, listed in `load.py`; rewards become numbers and metrics in
`rewards.py`. Knows nothing of models or training. No torch.
"""
