"""Compares runs in a study: which runs, running each in a separate process, and tables of their results.

Knows runs by their folders only, and nothing of how they are trained. No torch.
"""
