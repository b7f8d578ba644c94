"""Turns a finished run into a folder to share: the adapter or a merged model, its card, and the upload.

Knows nothing of training.
"""
