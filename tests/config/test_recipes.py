"""Every recipe: it loads, runs with each algorithm by one override, and asks what it says it asks."""

import json
from copy import copy
from pathlib import Path

import pytest
from saved import save_model

from twig.cli.app import main
from twig.common.errors import UserError
from twig.config.load import Settings, load, parse_yaml, recipe_names, recipe_text
from twig.core.algorithms.registry import shipped
from twig.runs.reader import read_summary
from twig.study.plan import load_study, runs_of
from twig.tasks.load import load_task
from twig.tasks.prompts import encode_prompt, render_prompt

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
ASKED = """Solve the problem. Think step by step in a few short sentences.
Then write the answer on a line of its own: four hash signs and the number, such as #### 5.

Problem: {question}
Solution:"""


def settings_of(name, tmp_path, test_data, *overrides):
    """The recipe's settings, with data that lies on this machine."""
    words = list(overrides)
    task = load(name).task.name
    if task in ("svamp", "gsm8k"):
        words.append(f"task.path={test_data / task}")
    if task == "custom":
        rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(20)]
        (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
        words.append(f"task.path={tmp_path / 'problems.jsonl'}")
    return load(name, words)


def with_template(tokenizer, chat: bool):
    """A copy of the tokenizer, as a base model has it or with a chat template."""
    tokenizer = copy(tokenizer)
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


@pytest.mark.parametrize("algorithm", shipped())
@pytest.mark.parametrize("name", recipe_names())
def test_one_override_changes_the_algorithm(name, algorithm, caplog):
    own = load(name)
    settings = load(name, [f"algorithm.name={algorithm}"])
    assert settings.algorithm.name == algorithm
    if algorithm == own.algorithm.name:
        assert settings == own
        return
    # What the recipe sets and the algorithm lacks is named in one line, and nothing else is said.
    written = parse_yaml(recipe_text(name), name).get("algorithm", {})
    lacking = [key for key in written if key not in shipped()[algorithm].model_fields]
    assert len(caplog.messages) == bool(lacking)
    for key in lacking:
        assert f"algorithm.{key}=" in caplog.messages[0]
    again = own.with_overrides([f"algorithm.name={algorithm}"])
    assert again == settings, "from a recipe as from its settings"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_variant_of_a_study_of_the_documentation_is_taken(path):
    runs = runs_of(load_study(path), path.parent)
    assert runs
    for run in runs:
        assert run.settings.algorithm.name in shipped()


def test_a_file_in_place_of_a_name_drops_the_recipes_own_keys(caplog):
    settings = load("svamp-qwen2-1.5b", ["algorithm.file=mine.py:MyRule", "algorithm.decay=0.5"])
    assert settings.flat()["algorithm.decay"] == 0.5
    assert settings.algorithm.file == "mine.py:MyRule"
    assert not any(key.startswith("algorithm.replay") for key in settings.flat())
    assert settings.with_overrides(["algorithm.file=mine.py:MyRule"]) == settings, "it is the same one"
    assert load("quickstart", ["algorithm.name=grpo", "algorithm.file=null"]).algorithm.name == "grpo"
    back = settings.with_overrides(["algorithm.name=grpo"])
    assert (back.algorithm.name, back.algorithm.file) == ("grpo", None)
    assert "algorithm.decay=0.5" in caplog.text


def test_what_an_override_says_itself_is_not_dropped():
    with pytest.raises(UserError, match=r"algorithm\.replay: not a setting of algorithm\.name=grpo"):
        load("svamp-qwen2-1.5b", ["algorithm.replay.probability=0.5", "algorithm.name=grpo"])
    both = load("svamp-qwen2-1.5b", ["algorithm.beta=0.04", "algorithm.name=grpo"])
    assert both.algorithm.beta == 0.04
    back = both.with_overrides(["algorithm.name=t-spmo"])
    assert back.algorithm.name == "t-spmo" and "algorithm.beta" not in back.flat()


def test_the_defaults_of_another_algorithm_in_an_older_file_say_nothing(caplog):
    values = load("quickstart").model_dump()
    values["algorithm"] |= {"alpha": None, "divisor": None, "beta": 0.0, "scale_rewards": "group"}
    assert Settings.from_dict(values) == load("quickstart")
    assert not caplog.messages
    values["algorithm"] |= {"beta": 0.1}
    with pytest.raises(UserError, match=r"algorithm\.beta: not a setting of algorithm\.name=t-spmo"):
        Settings.from_dict(values)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_described_by_its_first_line_and_listed(name, capsys):
    first = recipe_text(name).partition("\n")[0]
    assert first.startswith("# ") and first.endswith(".") and len(first) < 100
    assert main(["recipes"]) == 0
    assert f"{name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", recipe_names())
def test_prompts_fit_and_right_answers_score(name, tmp_path, test_data, qwen2_tokenizer):
    settings = settings_of(name, tmp_path, test_data)
    embedded = settings.model.name == "tiny-arithmetic"
    if embedded:
        from twig.engine.load import load_model

        tokenizer = load_model(settings.model)[1]
    else:
        tokenizer = with_template(qwen2_tokenizer, chat=settings.task.chat != "never")
    task = load_task(settings)
    assert task.train and task.eval
    lengths = [len(encode_prompt(task, example, tokenizer)) for example in task.eval[:1000]]
    assert 0 < max(lengths) < 500
    for example in task.eval[:50]:
        answer = example.columns["answer"]
        assert task.score(f"so it is\n#### {answer}" if not embedded else f"#{answer}", example).right
        assert not task.score(f"so it is\n#### {answer}1" if not embedded else f"#{answer}1", example).right


def test_a_base_model_is_asked_in_plain_text(tmp_path, test_data, qwen2_tokenizer):
    settings = settings_of("svamp-qwen2-1.5b", tmp_path, test_data)
    task, tokenizer = load_task(settings), with_template(qwen2_tokenizer, chat=True)
    example = task.eval[0]
    expected = ASKED.replace("{question}", example.prompt)
    assert render_prompt(task, example, tokenizer) == expected
    ids = encode_prompt(task, example, tokenizer)
    assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("svamp-qwen2.5-0.5b-instruct", "<|im_start|>assistant\n"),
        ("gsm8k-llama-3.2-1b-instruct", "<|im_start|>assistant\n"),
        ("gsm8k-qwen3-1.7b", "<|im_start|>assistant\n<think></think>"),
    ],
)
def test_a_chat_model_is_asked_through_its_template(name, ending, tmp_path, test_data, qwen2_tokenizer):
    settings = settings_of(name, tmp_path, test_data)
    task, tokenizer = load_task(settings), with_template(qwen2_tokenizer, chat=True)
    example = task.eval[3]
    question = ASKED.replace("{question}", example.prompt)
    if task.name == "gsm8k":
        question = question.replace(" Think step by step in a few short sentences.", "")
        question = question.replace("problem.\n", "problem step by step.\n")
    expected = f"<|im_start|>user\n{question}<|im_end|>\n{ending}"
    assert render_prompt(task, example, tokenizer) == expected
    marks = {tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_start|>", "<|im_end|>")}
    assert marks <= set(encode_prompt(task, example, tokenizer).tolist())


def test_the_paper_s_other_task_asks_for_three_digits(tmp_path, test_data, qwen2_tokenizer):
    settings = settings_of("multiplication-qwen2-1.5b", tmp_path, test_data)
    task = load_task(settings)
    prompt = render_prompt(task, task.eval[0], with_template(qwen2_tokenizer, chat=False))
    a, b = task.eval[0].columns["a"], task.eval[0].columns["b"]
    assert prompt.endswith(f"such as #### 5.\n\nProblem: {a} * {b}\nSolution:")
    assert 100 <= a <= 999 and 100 <= b <= 999
    assert len(task.eval) == 500


@pytest.mark.parametrize("column", ["question", "prompt"])
def test_rows_of_questions_and_answers_need_no_python(column, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    rows = [{column: f"{i}+1=", "answer": i + 1} for i in range(12)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = "train custom --output run model.name=model task.path=problems.jsonl task.prompt_template=null"
    words += " rollout.num_generations=4 rollout.prompts_per_step=2 rollout.max_completion_length=6"
    words += " train.max_steps=2 train.warmup_steps=0 eval.steps=0 log.progress=quiet"
    assert main(words.split()) == 0, capsys.readouterr().err
    summary = read_summary(tmp_path / "run")
    assert summary["accuracy_after"]["found"] is not None
    assert summary["accuracy_after"]["right_lenient"] is not None


def test_answers_that_cannot_be_compared_need_a_reward(tmp_path):
    (tmp_path / "problems.jsonl").write_text('{"question": "Where?", "answer": "in Paris"}\n' * 3)
    settings = load("custom", [f"task.path={tmp_path / 'problems.jsonl'}"])
    with pytest.raises(UserError, match=r"^task custom: no reward .*column answer with a number"):
        load_task(settings)


def test_a_reward_of_one_s_own_says_what_is_right(tmp_path):
    """A column `answer` is nothing but a column there."""
    (tmp_path / "problems.jsonl").write_text('{"question": "2?", "answer": "2"}\n' * 3)
    settings = load("custom", [f"task.path={tmp_path / 'problems.jsonl'}"])
    assert load_task(settings).score is not None
    assert load_task(settings, reward_funcs=lambda completions, **columns: [0.0]).score is None


def test_a_variant_drops_what_its_algorithm_lacks_of_the_whole_study(tmp_path, caplog):
    (tmp_path / "study.yaml").write_text(
        "base: quickstart\nmax_tokens: 100\nseeds: [0]\n"
        "overrides: [algorithm.replay.probability=0.5, algorithm.alpha=8]\n"
        "variants: {grpo: [algorithm.name=grpo], s-grpo: [algorithm.name=s-grpo]}\n"
    )
    grpo, s_grpo = (run.settings for run in runs_of(load_study(tmp_path / "study.yaml"), tmp_path))
    assert s_grpo.algorithm.alpha == 8 and "algorithm.alpha" not in grpo.flat()
    assert any("algorithm.name=grpo: dropped" in line and "replay" in line for line in caplog.messages)
    (tmp_path / "study.yaml").write_text(
        "base: quickstart\nmax_tokens: 100\nseeds: [0]\n"
        "variants: {grpo: [algorithm.name=grpo, algorithm.replay.probability=0.5]}\n"
    )
    with pytest.raises(UserError, match=r"variant.*grpo.*algorithm\.replay: not a setting of"):
        runs_of(load_study(tmp_path / "study.yaml"), tmp_path)
