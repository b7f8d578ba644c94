"""One run: `train.py` begins it, `session.py` is one process's work on it, `trainer.py` is a step.

When a run ends is `Session._is_over`. What a step sampled is in `batch.py`, how far a run is in `state.py`.
Knows nothing of studies or the command line.
"""
