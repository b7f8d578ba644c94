"""The machine and the process: devices, memory in use, random states, signals, several processes as one run.

Knows nothing of models, tasks or what is computed. Imports torch only where a call needs it, but for
`rng_state.py`.
"""
