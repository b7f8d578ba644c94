"""How a layer mixes the tokens of a tree, where a mask is not the way.

A long pack is attended to in chains (`tree_attention.py`). A layer that keeps a state, a short convolution or
a linear recurrence, reads its tokens in order, so a tree is run in parts without forks (`runs.py`). What such
a layer is, and how states are handed over, is in `mixer.py`.
"""
