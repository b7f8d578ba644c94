"""A study: which runs are compared, running them in processes of their own, and the tables of what came out.

Knows runs by their folders only, and nothing of how they are trained. No torch.
"""
