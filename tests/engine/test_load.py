"""Loading models: what is set for them, and what is read from their own files."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from twig.config.schema import Model
from twig.engine.load import end_ids, load_model


@pytest.mark.parametrize(("expected", "got"), [(2, 2), (None, 1)])
def test_threads_are_set_where_asked_for(expected, got):
    before = torch.get_num_threads()
    assert before == 1, "tests run on one thread"
    try:
        load_model(Model(name="tiny-arithmetic", num_threads=expected))
        assert torch.get_num_threads() == got
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, test_data) -> Path:
    """A tiny model under the real Qwen2 tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        eos_token_id=151643,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(test_data / "qwen2_tokenizer").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("generation", "end_token", "expected"),
    [
        # Qwen2-1.5B
        pytest.param({"eos_token_id": 151643}, "<|endoftext|>", [151643], marks=pytest.mark.slow),
        ({"eos_token_id": [151645, 151643]}, "<|im_end|>", [151645, 151643]),  # Qwen2-1.5B-Instruct
        (None, "<|endoftext|>", [151643]),  # only the config says it
        pytest.param(
            {"eos_token_id": [151645, 151643]}, "<|endoftext|>", [151645, 151643], marks=pytest.mark.slow
        ),
        ({"eos_token_id": 151643}, "<|im_end|>", [151643, 151645]),
    ],
)
def test_end_tokens_are_those_of_the_generation_config(generation, end_token, expected, saved):
    """With a generation config as the Hub has it, or none."""
    (saved / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (saved / "generation_config.json").write_text(json.dumps(generation))
    options = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps(options | {"eos_token": end_token}))
    model, tokenizer = load_model(str(saved))
    assert tokenizer.eos_token == end_token
    assert end_ids(model, tokenizer) == expected
