"""The algorithms: each is one file with one rule, from a trie to weights on its nodes.

Start reading at `base.py`, then `t_spmo.py`; `assign.py` has them by name, `citations.py` says what each does
and which paper it is from. Numpy only; knows nothing of models.
"""
