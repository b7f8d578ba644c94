"""Helps everything else: errors a person can fix, text, secrets, files, the Hub, progress.

Knows nothing of settings, models or runs, and imports nothing else of Twig. No torch.
"""
