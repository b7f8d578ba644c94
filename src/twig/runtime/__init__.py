"""Handles the machine and the process: devices, memory, random states, signals, several processes.

Knows nothing of models, tasks or what is computed. Only `rng_state.py` imports torch when it is imported.
"""
