"""The method itself: a group as a prefix trie, credit on its nodes, the objective, random numbers by name.

A new algorithm is one file in `algorithms/`. Pure functions on small arrays. Knows nothing of models,
tokenizers, files or the command line. No torch but in `objective.py`.
"""
