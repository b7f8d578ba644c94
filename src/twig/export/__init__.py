"""A finished run as a folder to share: the adapter or a merged model, its card, and the upload.

Knows nothing of training.
"""
