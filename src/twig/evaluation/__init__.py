"""Accuracy: greedy and sampled answers, their intervals and tests, and an evaluation on disk.

Knows nothing of training.
"""
