"""The embedded base model: its folder, tokenizer, card and build, and that no problem is seen twice.

Nothing here rests on the figures of one build: they are read from its card.
"""

import argparse
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from worked_lines import assert_every_line_is_true

from twig.config.load import Settings, load
from twig.engine.load import end_ids, load_model
from twig.engine.lora import attach
from twig.engine.policy import Policy
from twig.engine.sampler import Request, SamplingParams, sample
from twig.evaluation.evaluate import evaluate_policy
from twig.tasks.load import load_task
from twig.tasks.multiplication import at_once, problems, prompt_text, read_answer, worked
from twig.tasks.prompts import encode_prompt

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "build_tiny_base.py"
FOLDER = ROOT / "src" / "twig" / "assets" / "tiny-arithmetic"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def import_script():
    spec = importlib.util.spec_from_file_location("build_tiny_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = import_script()


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def asked() -> list[tuple[int, int]]:
    return problems("eval", build.DIGITS, 0, 300)


# ---- the folder --------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """The files of a saved model and no others: weights as safetensors only, under 6 MB, no code."""
    assert {path.name for path in folder.iterdir()} == FILES
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_folder_holds_a_small_model_and_no_code():
    check_folder(FOLDER)


def test_it_is_a_plain_qwen2_in_float32(model):
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_twig_loads_it_by_its_name(model):
    settings = load("quickstart", ["model.device=cpu"])
    assert settings.model.name == FOLDER.name
    actual, tokenizer = load_model(settings.model)
    ids = torch.tensor([tokenizer.encode("347*26=")])
    with torch.no_grad():
        torch.testing.assert_close(actual(ids).logits, model(ids).logits)
    assert end_ids(actual, tokenizer) == [tokenizer.eos_token_id]


def test_special_tokens_agree(model, tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<pad>", "<eos>", "<unk>")
    ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(ids)) == 3 and None not in ids
    assert tokenizer.bos_token is None and model.config.bos_token_id is None
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (ids[0], ids[1])
    assert len(tokenizer) == model.config.vocab_size == len(model.get_input_embeddings().weight)
    assert set(tokenizer.get_added_vocab()) == {"<pad>", "<eos>", "<unk>"}


# ---- the tokenizer -----------------------------------------------------------------------------------------


def test_a_token_per_character_and_none_besides(tokenizer, asked):
    texts = [
        text
        for a, b in asked
        for text in (prompt_text(a, b), at_once(a, b), worked(a, b), prompt_text(a, b) + worked(a, b))
    ]
    for text in (*texts, build.CHARACTERS):
        for ids in (tokenizer.encode(text), tokenizer(text)["input_ids"]):
            assert tokenizer.convert_ids_to_tokens(ids) == list(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("") == []


def test_pieces_are_tokens_of_the_whole(tokenizer, asked):
    """Prompt and completion meet at any cut: no token reaches over it."""
    for a, b in asked[:20]:
        text = prompt_text(a, b) + worked(a, b)
        ids = tokenizer.encode(text)
        for cut in range(len(text)):
            assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == ids


def test_a_completion_is_read_without_its_end_token(tokenizer):
    ids = [*tokenizer.encode("#9022"), tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "#9022"
    assert tokenizer.decode(ids) == "#9022<eos><pad>"


def test_unknown_characters_become_no_others(tokenizer):
    """<unk>, or left out: which, is up to the tokenizer class that AutoTokenizer takes for Qwen2."""
    ids = tokenizer.encode("3x4 ü\n")
    assert [token for token in ids if token != tokenizer.unk_token_id] == tokenizer.encode("34")


def test_the_tokenizer_is_the_same_by_whatever_class_and_when_saved_again(tokenizer, asked, tmp_path):
    """NOTE: AutoTokenizer makes a Qwen2Tokenizer of it, whatever class the folder names."""
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(FOLDER / "config.json", tmp_path)
    others = [
        build.build_tokenizer(),
        PreTrainedTokenizerFast.from_pretrained(FOLDER),
        AutoTokenizer.from_pretrained(tmp_path),
    ]
    for a, b in asked[:50]:
        text = prompt_text(a, b) + worked(a, b)
        ids = tokenizer.encode(text)
        for other in others:
            assert other.encode(text) == ids and other.decode(ids) == text
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert {(t.pad_token_id, t.eos_token_id, t.unk_token_id) for t in others} == {special}


def test_a_batch_is_padded_on_the_left(tokenizer):
    ids = tokenizer(["347*26=", "47*6="], padding=True)["input_ids"]
    assert ids[1] == [tokenizer.pad_token_id] * 2 + tokenizer.encode("47*6=")


# ---- what it says ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_answers_in_both_forms_and_ends(model, tokenizer, asked):
    """By transformers' own generate: nearly every text ends and has an answer, some of them right."""
    ids = torch.tensor([tokenizer.encode(prompt_text(a, b)) for a, b in asked])
    answers = model.generate(ids, max_new_tokens=64)[:, ids.shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    ended = (answers == tokenizer.eos_token_id).any(1)
    assert ended.float().mean() > 0.97
    actual = [read_answer(text) for text in texts]
    assert sum(answer is not None for answer in actual) > 0.97 * len(asked)
    forms = [text.startswith("#") for text in texts]
    assert 0.1 < np.mean(forms) < 0.9, "both forms among the most likely answers"
    right = [answer == a * b for answer, (a, b) in zip(actual, asked, strict=True)]
    worked_right = [r for r, at_once in zip(right, forms, strict=True) if not at_once]
    at_once_right = [r for r, at_once in zip(right, forms, strict=True) if at_once]
    assert np.mean(worked_right) > 0.85 > 0.5 > np.mean(at_once_right), "working it out is what helps"


@torch.no_grad()
def test_either_way_is_likely_enough_to_be_sampled(model, tokenizer, asked):
    """The first token decides. With 16 completions a way of 0.15 is missed in 7 groups of 100."""
    ids = torch.tensor([tokenizer.encode(prompt_text(a, b)) for a, b in asked])
    chance = model(ids).logits[:, -1].softmax(-1)[:, tokenizer.convert_tokens_to_ids("#")]
    assert 0.15 < float(chance.min()) and float(chance.max()) < 0.85


# ---- the card ----------------------------------------------------------------------------------------------


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def figures(card: str) -> dict[str, float]:
    """The rows of the table of measurements; percentages as shares."""
    _, _, rest = card.partition("\n## What it does")
    section = rest.partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]*[a-z][^|]*) \| ([0-9.]+)(%?) \|$", section, re.MULTILINE)
    return {label: float(number) / (100 if percent else 1) for label, number, percent in rows}


def test_the_measured_figures_are_shares_that_agree_with_each_other():
    actual = figures(card_of(FOLDER))
    assert len(actual) == len(build.Measured.__dataclass_fields__) == 7
    assert all(0 < share < 1 for share in actual.values())
    greedy, greedy_worked, sampled, sampled_worked, worked_right, at_once_right, least = actual.values()
    assert [label.partition(":")[0] for label in list(actual)[:2]] == ["greedy"] * 2
    # What is right is the mixture of both ways; each figure has its own draws, of 2,000 problems.
    mixture = sampled_worked * worked_right + (1 - sampled_worked) * at_once_right
    assert sampled == pytest.approx(mixture, abs=0.04)
    assert at_once_right < 0.5 < worked_right
    assert greedy_worked * worked_right < greedy + 0.04
    assert least < min(sampled_worked, 1 - sampled_worked) and least <= 0.5


def test_the_card_names_a_build_command_that_the_script_takes(monkeypatch):
    (command,) = re.findall(r"^    python scripts/build_tiny_base\.py (.*)$", card_of(FOLDER), re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command.split()])
    options = build.parse()
    assert options.output == Path("DIR")
    assert options.steps > 100 and options.threads >= 1
    assert f"{options.steps:,} steps of {build.BATCH} texts" in card_of(FOLDER)


def test_the_card_describes_this_model_and_how_it_is_taught_now(model):
    card, config = card_of(FOLDER), model.config
    flat = " ".join(card.split())
    assert f"{model.num_parameters():,} parameters" in flat
    shape = (
        f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads "
        f"({config.num_key_value_heads} for keys and values)"
    )
    assert shape in flat
    assert f"`{build.CHARACTERS}`" in card
    assert f"probability {build.WORKED_SHARE_ABOVE} where the first factor is {build.WORKED_FROM} or" in flat
    assert f"probability {build.WORKED_SHARE_BELOW} below" in flat
    assert re.findall(r"`([^`]+)<eos>`", card) == [at_once(347, 26), worked(347, 26)]
    assert f"`{prompt_text(347, 26)}`" in card and not re.search(r"[{}]", card)


def test_the_script_writes_a_card_like_this_one(model):
    """The same headings and labels, from the script's own template."""
    measured = build.Measured(0.476, 0.319, 0.501, 0.39, 0.955, 0.194, 0.24)
    options = argparse.Namespace(steps=4000, seed=0, threads=1, eval_size=2000, learning_rate=3e-3)
    card = build.card(model, measured, options)
    assert list(figures(card).values()) == pytest.approx([0.476, 0.319, 0.501, 0.39, 0.955, 0.194, 0.24])
    assert list(figures(card)) == list(figures(card_of(FOLDER)))
    assert re.findall("^#.*", card, re.MULTILINE) == re.findall("^#.*", card_of(FOLDER), re.MULTILINE)


# ---- no problem is seen twice ------------------------------------------------------------------------------


def factors(prompt: str) -> tuple[int, int]:
    a, b = map(int, prompt.removesuffix("=").split("*"))
    return min(a, b), max(a, b)


def test_problems_of_pretraining_of_rl_and_of_evaluation_are_disjoint():
    """What the build draws, what the quickstart trains on and what it is measured on."""
    size = len(problems("pretrain", build.DIGITS, 0))
    texts = itertools.islice(build.training_texts(0), size)
    pretrained = {factors(prompt) for prompt, _ in texts}
    assert len(pretrained) == size, "one pass has every problem once"
    task = load_task(load("quickstart"))
    trained, evaluated = ({factors(e.prompt) for e in part} for part in (task.train, task.eval))
    assert len(trained) == len(task.train) > 20_000 and len(evaluated) == len(task.eval) > 10_000
    assert pretrained.isdisjoint(trained)
    assert pretrained.isdisjoint(evaluated)
    assert trained.isdisjoint(evaluated)
    assert len(pretrained) + len(trained) + len(evaluated) == 900 * 90


@pytest.fixture
def few_problems(monkeypatch):
    """The script on 2 x 2 digits, a tenth of the problems."""
    monkeypatch.setattr(build, "DIGITS", (2, 2))
    monkeypatch.setattr(build, "WORKED_FROM", 70)


def test_training_texts_are_true_and_of_pretrain_only(few_problems):
    pool = problems("pretrain", (2, 2), 0)
    texts = list(itertools.islice(build.training_texts(0), 2 * len(pool)))
    allowed, ways = {prompt_text(a, b): (a, b) for a, b in pool}, []
    for prompt, completion in texts:
        a, b = allowed[prompt]
        assert read_answer(completion) == a * b
        ways.append((a >= 70, completion == worked(a, b)))
        if completion == worked(a, b):
            assert_every_line_is_true(completion, a, b)
        else:
            assert completion == at_once(a, b)
    for half in (texts[: len(pool)], texts[len(pool) :]):
        assert {prompt for prompt, _ in half} == set(allowed), "each pass has every problem"
    assert [p for p, _ in texts[: len(pool)]] != [p for p, _ in texts[len(pool) :]], "in a new order"
    for above, share in ((True, build.WORKED_SHARE_ABOVE), (False, build.WORKED_SHARE_BELOW)):
        mine = [is_worked for is_above, is_worked in ways if is_above == above]
        # 4 standard deviations of a share of so many
        assert abs(np.mean(mine) - share) < 4 * (0.21 / len(mine)) ** 0.5


def test_the_way_of_a_problem_is_drawn_anew_each_pass(few_problems):
    size = len(problems("pretrain", (2, 2), 0))
    first, second = (
        dict(itertools.islice(texts, size)) for texts in [build.training_texts(0)] for _ in range(2)
    )
    changed = np.mean([first[prompt] != second[prompt] for prompt in first])
    assert changed == pytest.approx(2 * 0.3 * 0.7, abs=0.05)


def test_training_texts_follow_from_the_seed(few_problems):
    one, again, other = (list(itertools.islice(build.training_texts(seed), 200)) for seed in (0, 0, 1))
    assert one == again != other


def test_the_build_measures_on_eval_only(few_problems, monkeypatch, model, tokenizer):
    seen = []

    def answer(model, tokenizer, asked, sample, first=""):
        seen.extend(asked)
        way = at_once if first == "at once" else worked
        return [way(a, b + (a % 2)) for a, b in asked], torch.linspace(0.3, 0.9, len(asked))

    monkeypatch.setattr(build, "answer", answer)
    measured = build.measure(model, tokenizer, seed=0, size=700)  # asked in two pieces
    assert set(seen) <= set(problems("eval", (2, 2), 0)) and len(set(seen)) == 700
    even = np.mean([a % 2 == 0 for a, _ in set(seen)])  # the others were answered with another product
    assert measured.greedy == measured.sampled == measured.worked_right == pytest.approx(even)
    assert (measured.greedy_worked, measured.sampled_worked) == (1.0, 1.0)
    assert measured.least_way == pytest.approx(0.1)


# ---- what is trained ---------------------------------------------------------------------------------------


def test_only_completions_are_trained_the_end_token_too(tokenizer):
    ids, labels = build.padded([([5, 6], [7, 8, 1]), ([5], [1])], pad=0)
    assert ids.tolist() == [[5, 6, 7, 8, 1], [5, 1, 0, 0, 0]]
    ignored = build.IGNORED
    assert labels.tolist() == [[ignored, ignored, 7, 8, 1], [ignored, 1, ignored, ignored, ignored]]


def test_the_batch_loss_is_that_of_texts_one_by_one(model, tokenizer):
    """The mean over completion tokens and its gradient, whatever is padded with what."""
    texts = [("347*26=", worked(347, 26)), ("12*10=", "#120"), ("900*11=", worked(900, 11))]
    model.zero_grad()
    loss = build.batch_loss(model, tokenizer, texts)
    batched = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    total, count = 0.0, 0
    for prompt, completion in texts:
        ids = torch.tensor([*tokenizer.encode(prompt + completion), tokenizer.eos_token_id])
        start = len(tokenizer.encode(prompt))
        logp = model(ids[None]).logits[0].log_softmax(-1)
        total = total - logp[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum()
        count += len(ids) - start
    (total / count).backward()
    assert loss == pytest.approx(float(total.detach()) / count, rel=1e-5)
    single = model.model.layers[0].mlp.up_proj.weight.grad
    torch.testing.assert_close(batched, single, rtol=1e-3, atol=float(single.abs().max()) * 1e-4)
    model.zero_grad()


def test_orthogonal_brings_singular_values_near_1_and_keeps_the_vectors():
    """The five iterations of Muon leave values between 0.68 and 1.14."""
    draw = torch.Generator().manual_seed(0)
    for shape in ((2, 6, 20), (2, 20, 6), (1, 9, 9)):
        matrices = torch.randn(shape, generator=draw)
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        between = left.mT @ build.orthogonal(matrices) @ right.mT
        values = between.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(between, torch.diag_embed(values), atol=1e-5, rtol=0)
        assert 0.65 < float(values.min()) and 1.05 < float(values.max()) < 1.17


# ---- a build from nothing ----------------------------------------------------------------------------------


def run_build(folder: Path, *words: str) -> str:
    command = [sys.executable, str(SCRIPT), "--output", str(folder), "--steps", "2", "--eval-size", "10"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_build_of_two_steps_writes_a_model_and_its_card(tmp_path):
    shown = run_build(tmp_path / "made")
    check_folder(tmp_path / "made")
    card = card_of(tmp_path / "made")
    assert not re.search(r"[{}]", card), "every brace of the template is filled"
    assert "--steps 2 --seed 0 --threads 1" in card and "\n2 steps of 64 texts" in card
    assert "Measured on 10 problems" in card
    assert len(figures(card)) == 7
    assert "step 2/2" in shown
    measured = json.loads(shown[shown.index("{") :])
    assert list(figures(card).values())[:6] == pytest.approx(list(measured.values())[:6], abs=6e-4)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    ids = AutoTokenizer.from_pretrained(tmp_path / "made").encode("347*26=")
    assert made(torch.tensor([ids])).logits.shape == (1, 7, made.config.vocab_size)
    shipped = json.loads((FOLDER / "config.json").read_text())
    assert json.loads((tmp_path / "made" / "config.json").read_text()) == shipped, "the card's command"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "made" / name).read_text() == (FOLDER / name).read_text(), name


@pytest.mark.slow
def test_a_build_gives_the_same_bytes_again_and_others_for_another_seed(tmp_path):
    for folder, seed in (("one", "0"), ("two", "0"), ("other", "1")):
        run_build(tmp_path / folder, "--seed", seed)
    one, two, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two", "other")
    )
    assert one == two
    assert one["model.safetensors"] != other["model.safetensors"]


# ---- how good it is ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured_by_twig():
    """The model as `twig eval` runs it: policy, tokenizer, task and settings, on 1,000 eval problems."""
    values = {"model": {"name": str(FOLDER), "device": "cpu"}, "task": {"name": "multiplication"}}
    settings = Settings.from_dict(values)
    model, tokenizer = load_model(settings.model)
    lora = settings.lora
    peft_model = attach(
        model, r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules, layers=lora.layers
    )
    return Policy(peft_model), tokenizer, load_task(settings), settings


@pytest.mark.slow
def test_greedy_accuracy_is_where_reinforcement_learning_has_room(measured_by_twig):
    """Between 40 and 50 % of 1,000 problems, as in the paper, and what the card says."""
    policy, tokenizer, task, settings = measured_by_twig
    result, completions = evaluate_policy(
        policy,
        tokenizer,
        task,
        SamplingParams.of(settings, tokenizer, end_ids(policy.model, tokenizer)),
        limit=1000,
    )
    assert result.n == len(completions) == 1000
    assert 0.40 <= result.value <= 0.50
    assert result.found > 0.98 and result.truncated < 0.02
    greedy = next(iter(figures(card_of(FOLDER)).values()))
    # The card's problems are 2,000 of the same ones: 1.5 points are one standard deviation.
    assert result.value == pytest.approx(greedy, abs=0.045)


@pytest.mark.slow
def test_sampled_worked_answers_are_right_at_least_nine_times_in_ten(measured_by_twig):
    policy, tokenizer, task, settings = measured_by_twig
    requests = [
        Request(encode_prompt(task, example, tokenizer), 2, 64, slot)
        for slot, example in enumerate(task.eval[:1000])
    ]
    params = SamplingParams.of(settings, tokenizer, end_ids(policy.model, tokenizer))
    drawn = sample(policy, requests, replace(params, seed=0, wave_size=128, record=False))
    right = {"worked": [], "at once": []}
    for example, completions in zip(task.eval, drawn.completions, strict=False):
        for completion in completions:
            way = "at once" if completion.text.startswith("#") else "worked"
            right[way].append(task.score(completion.text, example).right)
    assert min(map(len, right.values())) > 400
    assert np.mean(right["worked"]) >= 0.9
    assert np.mean(right["at once"]) < 0.4
