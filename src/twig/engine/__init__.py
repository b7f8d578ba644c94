"""Everything that runs the model: loading, adapters, packs, the decoder and its masks, sampling, the update.

From a Hugging Face model and tries with credit to completions and gradients. What a family of models needs is
in `decoder.py`. Tokens are sampled in `sampler.py`, on a CUDA device in `decode_graph.py`, and drawn from
their probabilities in `inverse_cdf.py`. Knows nothing of tasks, runs or files of a run.
"""
