"""The algorithms, one file each: `base.py` has the protocol, `registry.py` finds them by name."""
