"""The settings: every one of them described once, read from YAML, checked, overridden, printed.

A setting's help text, default and rule are in `schema.py`. Knows nothing of what acts on a setting: not of
models, tasks or runs. No torch.
"""
