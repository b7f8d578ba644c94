"""The text of each token: laid end to end they are the decoded text, whatever the tokenizer does."""

import pytest
from saved import build_tokenizer
from transformers import AutoTokenizer

from twig.runs.completions import token_texts


def test_a_character_tokenizer_gives_its_characters_and_its_end_token():
    tokenizer = build_tokenizer()
    ids = tokenizer("12+3=").input_ids + [tokenizer.eos_token_id]
    assert token_texts(ids[:2], ids[2:], tokenizer.decode) == ["+", "3", "=", "<eos>"]


def test_a_decoder_that_drops_the_first_space_loses_none():
    """As SentencePiece does: a word begins with a space, which the first word of a text is without."""
    words = [" a", " b", " c"]

    def decode(ids):
        return "".join(words[i] for i in ids).removeprefix(" ")

    assert token_texts([0], [1, 2], decode) == [" b", " c"]


@pytest.mark.parametrize("text", ["Janet has 3 apples.\n\n", "日本語 è 👩‍🔬 <b>&amp;", "\x00\u200b �", ""])
def test_real_tokens_laid_end_to_end_are_the_text(test_data, text):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "qwen2_tokenizer")
    before, ids = tokenizer("Question:").input_ids, tokenizer(text).input_ids
    found = token_texts(before, ids, tokenizer.decode)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids) == text


def test_a_token_that_ends_inside_a_character_adds_nothing_and_the_next_one_adds_it_whole(test_data):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "qwen2_tokenizer")
    ids = tokenizer("x龘").input_ids
    assert len(ids) == 3, "the letter, and two tokens for the other character"
    assert token_texts([ids[0]], ids, tokenizer.decode) == ["x", "", "龘"]
    # cut off inside it, the text ends as the decoder writes that
    assert token_texts([ids[0]], ids[:2], tokenizer.decode) == ["x", "\ufffd"]
