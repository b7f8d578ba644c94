"""Loading models: what is set for them, and what is read from their own files."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from twig.config.schema import Model
from twig.engine.load import end_ids, load_model


@pytest.mark.parametrize(("wanted", "got"), [(2, 2), (None, 1)])
def test_threads_are_set_where_asked_for(wanted, got):
    before = torch.get_num_threads()
    assert before == 1, "tests run on one thread"
    try:
        load_model(Model(name="tiny-arithmetic", num_threads=wanted))
        assert torch.get_num_threads() == got
    finally:
        torch.set_num_threads(before)


def saved(folder: Path, data: Path, generation: dict | None, end_token: str | None) -> Path:
    """A tiny model under the real Qwen2 tokenizer, with a generation config as the Hub has it."""
    tokenizer = AutoTokenizer.from_pretrained(data / "qwen2_tokenizer")
    if end_token is not None:
        tokenizer.eos_token = end_token
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
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("generation", "end_token", "wanted"),
    [
        ({"eos_token_id": 151643}, "<|endoftext|>", [151643]),  # Qwen2-1.5B
        ({"eos_token_id": [151645, 151643]}, "<|im_end|>", [151645, 151643]),  # Qwen2-1.5B-Instruct
        (None, "<|endoftext|>", [151643]),  # only the config says it
        ({"eos_token_id": [151645, 151643]}, "<|endoftext|>", [151645, 151643]),
        ({"eos_token_id": 151643}, "<|im_end|>", [151643, 151645]),
    ],
)
def test_end_tokens_are_those_of_the_generation_config(generation, end_token, wanted, tmp_path, test_data):
    model, tokenizer = load_model(str(saved(tmp_path, test_data, generation, end_token)))
    assert end_ids(model, tokenizer) == wanted
