"""What the documents say is true: examples run; files, functions, settings and metrics they name exist."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from pages import PAGES, blocks, code_words, examples, script
from project import MODULES, ROOT, SOURCE

import twig
from twig.cli.app import main
from twig.config.load import Settings
from twig.core.algorithms.registry import shipped
from twig.runs.folder import RunLog

README = PAGES["README.md"]

# What examples are run with instead of what they say, so that they take seconds.
SHORTER = {
    "max_steps: 100": "max_steps: 2",
    '"max_steps": 100': '"max_steps": 2',
    "max_completion_length: 64": "max_completion_length: 12",
    '"max_completion_length": 64': '"max_completion_length": 12',
}
# Pages whose examples are run by a test of their own.
ELSEWHERE = {
    "docs/start.md": "test_the_readme_from_top_to_bottom",
    "docs/architecture.md": "test_the_parts_put_together_by_hand_give_a_gradient",
    "docs/from-trl.md": "config/test_from_peft.py",
    "docs/from-sft.md": "config/test_from_sft.py",
}
WITH_EXAMPLES = sorted(name for name in PAGES if examples(PAGES[name]) and name not in ELSEWHERE)
# What is added to the commands.
SMALL = {
    "train": "train.max_steps=2 eval.limit=8 rollout.num_generations=4 rollout.prompts_per_step=2 "
    "rollout.max_completion_length=12 log.progress=quiet",
    "eval": "eval.limit=8 log.progress=quiet",
    "chat": "--prompt 347*26=",
    "plan": "train.max_steps=2 eval.limit=8",
}
SUFFIXES = (".py", ".md", ".html", ".json", ".jsonl", ".yaml", ".parquet", ".cff")
DOTTED = re.compile(r"([a-z][\w]*)(\.[\w]+)+")
METRIC = re.compile(
    r"(?:answers|completions|eval|flops|memory|optimizer|replay|rewards|sampling|time|tokens)/[\w/]*"
)
MINIMAL = {"model": {"name": "tiny-arithmetic"}, "task": {"name": "multiplication"}}
# Written by runs and by readers of the pages.
MADE = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "summary.json",
    "report.html",
    "problems.jsonl",
    "rewards.py",
    "my.yaml",
    "mine.py",
    "config.json",
    "arithmetic.yaml",
    "STUDY.yaml",
    "comparison.md",
    "comparison.json",
    "evaluation.json",
    "completions.jsonl",
    "traceback.txt",
    "warnings.txt",
    "site/index.html",
    "twig.schema.json",
}


def shorter(text: str) -> str:
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


# Examples run


@pytest.mark.slow
def test_the_readme_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """The quickstart, every command of the README with its files, and the example that uses the result."""
    monkeypatch.chdir(tmp_path)
    for _, text, file in blocks(README):
        if file is not None:
            Path(file).write_text(shorter(text), encoding="utf-8")
    assert main(["train", "quickstart", "--output", "runs/quickstart", *SMALL["train"].split()]) == 0
    commands = [
        shlex.split(line, comments=True)
        for language, text, _ in blocks(README)
        if language == "sh"
        for line in text.splitlines()
    ]
    assert commands
    for program, name, *arguments in commands:
        assert program == "twig"
        assert main([name, *arguments, *SMALL.get(name, "").split()]) == 0, (name, arguments)
        assert capsys.readouterr().out, (name, arguments)
    assert json.loads(Path("runs/my-1/summary.json").read_text())["task"] == "custom"

    (use,) = [text for text in examples(PAGES["docs/start.md"]) if "PeftModel" in text]
    names = {}
    exec(compile(use, "start.md", "exec"), names)
    assert re.fullmatch(r"347\*26=[0-9*=,:#+-]+\n", capsys.readouterr().out)
    trained = {n: p for n, p in names["model"].named_parameters() if "lora_B" in n}
    assert trained and any(bool(p.any()) for p in trained.values()), "the adapter of the run is in it"


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run_and_print_what_the_page_says(name, tmp_path, monkeypatch, capsys):
    """A block of text that follows an example is what it prints."""
    monkeypatch.chdir(tmp_path)
    assert examples(PAGES[name])
    parts = blocks(PAGES[name])
    for _, text, file in parts:
        if file is not None:
            Path(file).write_text(text, encoding="utf-8")
    for number, (language, text, file) in enumerate(parts):
        if language != "python" or file is not None:
            continue
        capsys.readouterr()
        exec(compile(shorter(text), name, "exec"), {})
        following = parts[number + 1] if number + 1 < len(parts) else ("", "", None)
        if following[0] == "text":
            assert capsys.readouterr().out == following[1]


def test_the_parts_put_together_by_hand_give_a_gradient():
    (parts,) = examples(PAGES["docs/architecture.md"])
    names = {}
    exec(compile(parts, "architecture.md", "exec"), names)
    assert 0 < names["rewards"].sum() < 16, "both kinds of answer are in the group"
    gradients = [p.grad for n, p in names["policy"].parameters.items() if "lora_B" in n]
    assert all(g is not None and bool(g.any()) for g in gradients)


def test_a_t_spmo_step_can_lower_the_expected_reward():
    # One token decides: two common ones, with rewards 1/2 and 0, and twelve rare ones with reward 1. The
    # group is 1000 completions in exactly the policy's proportions, so V(root) is the expected reward.
    number, reward = np.array([658, 282, *[5] * 12]), np.array([0.5, 0.0, *[1.0] * 12])
    tokens = np.repeat(np.arange(len(number)), number)
    trie = twig.PrefixTrie.build(list(tokens[:, None]), reward[tokens])
    credit = twig.algorithm("t-spmo").weights(trie, np.random.default_rng(0))
    p, weight = number / 1000, (credit.plus + credit.minus)[1:]
    ascent = weight - p * weight.sum()  # the gradient of sum(weight * log p) by the logits
    policy_gradient = p * (reward - p @ reward)  # that of the expected reward
    assert ascent @ policy_gradient < -1e-3
    # The same weights times count(n) / G are the policy gradient; a divisor changes neither direction.
    visited = weight * p
    np.testing.assert_allclose(visited - p * visited.sum(), policy_gradient, atol=1e-15)


# What is named exists


def every_setting() -> set[str]:
    """The settings of all shipped algorithms."""
    return {
        key
        for name in shipped()
        for key in Settings.model_validate(MINIMAL | {"algorithm": {"name": name}}).flat()
    }


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_function_and_file_named_exists(name):
    """`group.key` is a setting, `module.function` is in that module, `folder/file.py` is a file."""
    settings = every_setting()
    ours = {*Settings.model_fields, *MODULES, "twig"}
    code = [word for word in code_words(PAGES[name]) if not word.startswith("python -m twig.")]
    code = [re.sub(r"task\.path=\S+", "task.path", word) for word in code]  # the reader's own files
    parts = [part for word in code for part in re.split(r"[\s(=:]", word)]
    files = [part for part in parts if part.endswith(SUFFIXES)]
    for file in files:
        assert _is_file(file), f"{file} is no file"
    for dotted in (part for part in parts if DOTTED.fullmatch(part) and part not in files):
        if dotted.split(".")[0] in ours:
            assert dotted in settings or _has(dotted), f"{dotted} is neither a setting nor in a module"


def _is_file(name: str) -> bool:
    if name in MADE or re.fullmatch(r"completions/step-N\.parquet", name):
        return True
    places = (ROOT, SOURCE, ROOT / "docs", ROOT / "tests", SOURCE / "recipes")
    return any((place / name).is_file() for place in places)


def _has(dotted: str) -> bool:
    parts = dotted.split(".")
    if parts[0] == "twig":
        return ".".join(parts[1:]) in twig.__all__ or _has(".".join(parts[1:]))
    if dotted in MODULES:
        return True
    for length in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:length]) in MODULES:
            value = importlib.import_module("twig." + ".".join(parts[:length]))
            for part in parts[length:]:
                if not hasattr(value, part):
                    return False
                value = getattr(value, part)
            return True
    return False


def test_the_check_of_names_sees_a_wrong_one():
    for right in (
        "core.algorithms.t_spmo",
        "core.trie.PrefixTrie.value",
        "tasks.rewards.judge",
        "twig.train",
    ):
        assert _has(right)
    for wrong in (
        "core.algorithms.tspmo",
        "core.trie.PrefixTrie.values",
        "tasks.reward.score",
        "twig.trie",
        "nowhere.t_spmo",
    ):
        assert not _has(wrong)
    assert not _is_file("credits.py")


def metrics_explained() -> set[str]:
    """The names in the tables of docs/metrics.md; a test of training compares them with what runs write."""
    return set(re.findall(r"^\| `(.+?)`", PAGES["docs/metrics.md"], re.MULTILINE))


@pytest.mark.parametrize("name", PAGES)
def test_every_metric_named_is_explained(name):
    explained = metrics_explained()
    for metric in filter(METRIC.fullmatch, code_words(PAGES[name])):
        if not metric.endswith("/"):  # a folder, or a group of metrics
            assert metric in explained, metric


def test_the_check_of_metrics_sees_a_wrong_one():
    assert METRIC.fullmatch("tokens/chosen") and "tokens/chosen" not in metrics_explained()
    assert METRIC.fullmatch("tokens/selected") and "tokens/selected" in metrics_explained()


def test_every_algorithm_and_function_of_the_equations_is_on_their_page():
    """The page says where each rule is; a rule that is added needs its line."""
    named = {
        word for word in code_words(PAGES["docs/algorithms.md"]) if DOTTED.fullmatch(word) and _has(word)
    }
    for name, kind in shipped().items():
        module = kind.__module__.removeprefix("twig.")
        assert any(word == module or word.startswith(f"{module}.") for word in named), name
    for module in ("core.objective", "core.replay"):
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {f"{module}.{function}" for function in functions if function[0] != "_"} <= named


@pytest.mark.parametrize("name", PAGES)
def test_every_test_named_exists(name):
    for word in (word for word in code_words(PAGES[name]) if "::" in word):
        file, _, function = word.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, word


def test_type_checkers_see_the_names_that_are_exported():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (branch,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in branch.body
        for alias in node.names
    }
    exported = {name: place if ":" in place else f"{place}:{name}" for name, place in twig._EXPORTS.items()}
    assert seen == exported


# The learning curve

learning_curve = script("learning_curve")
ACCURACY = {"value": 0.476, "low": 0.4452, "high": 0.507, "n": 1000}


def write_run(folder, algorithm, rewards, summary=None):
    settings = Settings.from_dict(MINIMAL, [f"algorithm.name={algorithm}"])
    log = RunLog.create(folder, settings)
    for step, reward in enumerate(rewards, 1):
        log.log(step, {"reward": reward})
    log.log(len(rewards), {"eval/accuracy": 0.5})
    if summary is not None:
        log.save_summary(summary)
    return folder


def test_a_curve_is_the_reward_of_each_step(tmp_path):
    steps, rewards = learning_curve.curve(write_run(tmp_path / "a", "grpo", [0.0, 1.0, None, 0.5]))
    assert (steps.tolist(), rewards.tolist()) == ([1, 2, 4], [0.0, 1.0, 0.5])


def test_the_thick_line_is_the_mean_of_the_last_steps():
    values = np.array([1.0, 2.0, 6.0, 0.0])
    assert learning_curve.trailing_mean(values, 2).tolist() == [1.0, 1.5, 4.0, 3.0]
    assert learning_curve.trailing_mean(values, 1).tolist() == values.tolist()
    assert learning_curve.trailing_mean(values, 9).tolist() == [1.0, 1.5, 3.0, 2.25]


def test_runs_are_drawn_and_their_table_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    summary = {
        **{"status": "finished", "algorithm": "t-spmo", "task": "multiplication"},
        **{"steps": 2, "nodes_run": 3, "accuracy_best": None},
        "accuracy_before": ACCURACY,
        "accuracy_after": ACCURACY | {"value": 0.913},
        "tokens_sampled": 1_000_000,
        "tokens_selected": 12_345,
        "seconds": 171.6,
        "peak_memory_bytes": 3 * 2**29,
    }
    runs = [
        write_run(Path("a"), "t-spmo", [0.1, 0.9], summary),
        write_run(Path("b"), "grpo", [0.2, 0.3]),
        write_run(Path("c"), "grpo", [0.2, 0.3, 0.4]),
    ]
    assert learning_curve.main([*map(str, runs), "--output", "images/curve.svg"]) == 0
    picture = Path("images/curve.svg").read_text(encoding="utf-8")
    for text in ("t-spmo", "grpo (b)", "grpo (c)", "step", "#ffffff"):
        assert text in picture
    lines = capsys.readouterr().out.splitlines()
    before, after = "47.6 % (44.5 to 50.7, n = 1000)", "91.3 % (44.5 to 50.7, n = 1000)"
    assert lines[2:] == [
        f"| t-spmo | {before} | {after} | 1,000,000 | 1.2 % | 172 s | 1.50 GiB |",
        "| grpo (b) | - | - | - | - | - | - |",
        "| grpo (c) | - | - | - | - | - | - |",
    ]
    learning_curve.main([*map(str, runs), "--output", "again.svg"])
    assert Path("again.svg").read_text(encoding="utf-8") == picture
    learning_curve.main([*map(str, runs), "--output", "other.svg", "--smooth", "1"])
    assert Path("other.svg").read_text(encoding="utf-8") != picture


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert learning_curve.main([str(tmp_path / "empty"), "--output", str(tmp_path / "x.svg")]) == 2
    shown = capsys.readouterr()
    assert str(tmp_path / "empty") in shown.err and shown.err.count("\n") == 1
    assert not (tmp_path / "x.svg").exists()


@pytest.mark.parametrize(
    ("page", "part"),
    [
        ("docs/from-trl.md", re.compile(r"^## What is not here\n(.*)", re.DOTALL | re.MULTILINE)),
        ("docs/algorithms.md", re.compile(r"^\| absent from Twig \|(.*)$", re.MULTILINE)),
    ],
)
def test_what_a_page_calls_absent_is_neither_a_setting_nor_an_algorithm(page, part):
    absent = set(re.findall(r"`([\w-]+)`", part.search(PAGES[page])[1]))
    settings = {key.rpartition(".")[2] for name in shipped() for key in _flat(name)}
    assert len(absent) > 3 and len(settings) > 80
    assert not absent & (settings | set(shipped()) | {name.replace("-", "_") for name in shipped()})


def _flat(algorithm):
    return Settings.from_dict(MINIMAL, [f"algorithm.name={algorithm}"]).flat()
