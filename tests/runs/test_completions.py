"""The text of each token: laid end to end they are the decoded text, whatever the tokenizer does."""

import pytest
from saved import build_tokenizer
from small_runs import completions_of

from twig.runs.completions import texts_after


def test_a_character_tokenizer_gives_its_characters_and_its_end_token():
    tokenizer = build_tokenizer()
    ids = tokenizer("12+3=").input_ids + [tokenizer.eos_token_id]
    assert texts_after(ids[:2], tokenizer.decode)(ids[2:]) == ["+", "3", "=", "<eos>"]


def test_a_decoder_that_drops_the_first_space_loses_none():
    """As SentencePiece does: a word begins with a space, which the first word of a text is without."""
    pieces = [" a", " b", " c"]

    def decode(ids):
        return "".join(pieces[i] for i in ids).removeprefix(" ")

    assert texts_after([0], decode)([1, 2]) == [" b", " c"]


@pytest.mark.parametrize("text", ["Janet has 3 apples.\n\n", "日本語 è 👩‍🔬 <b>&amp;", "\x00\u200b �", ""])
def test_real_tokens_laid_end_to_end_are_the_text(qwen2_tokenizer, text):
    tokenizer = qwen2_tokenizer
    before, ids = tokenizer("Question:").input_ids, tokenizer(text).input_ids
    texts = texts_after(before, tokenizer.decode)(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids) == text


def test_a_token_that_ends_inside_a_character_adds_nothing_and_the_next_one_adds_it_whole(qwen2_tokenizer):
    tokenizer = qwen2_tokenizer
    ids = tokenizer("x龘").input_ids
    assert len(ids) == 3, "the letter, and two tokens for the other character"
    assert texts_after([ids[0]], tokenizer.decode)(ids) == ["x", "", "龘"]
    # cut off inside it, the text ends as the decoder writes that
    assert texts_after([ids[0]], tokenizer.decode)(ids[:2]) == ["x", "\ufffd"]


@pytest.mark.parametrize(("value", "expected"), [("7 apples", "7 apples"), (7, "7"), ([7], None)])
def test_the_answer_of_the_data_is_beside_each_completion(run, value, expected):
    """A text or a number; nothing if it is neither."""
    data = [{"prompt": f"1+{n}=", "answer": value} for n in range(3)]
    made = run("a", "train.max_steps=1", "eval.before=false", train_dataset=data)
    assert {row["answer"] for row in completions_of(made.folder, 1)} == {expected}
