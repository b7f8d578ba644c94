"""Memory before it is used: a model's shape, what each phase will hold, and sizes that fit a budget.

Works from config.json, settings and a number of bytes; what a family of models has is a row of a table in
`model_shape.py`. Knows nothing of what was used in the end. No torch until a run begins.
"""
