"""Predicts memory before it is used: a model's shape, the memory of each phase, and sizes that fit a budget.

Works from config.json, the settings and a number of bytes; a family of models is a row of a table in
`model_shape.py`. Knows nothing about the memory used in the end. Imports torch only when a run begins.
"""
