"""Wrong input: exit status 2, one line that names the thing and what to write instead, files untouched."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from saved import save_model

from twig.cli.app import main
from twig.config.load import load, recipe_text
from twig.runs.folder import RunLog
from twig.training.train import train

REWARDS = """
def good(completions, **kwargs):
    return [1.0] * len(completions)

def raises(completions, **kwargs):
    return [1 / 0 for text in completions]

def too_few(completions, **kwargs):
    return [1.0]

def texts(completions, **kwargs):
    return ["good"] * len(completions)

not_a_function = 3
"""
FILES = {
    "dup.yaml": "model:\n  name: a\n  name: b\n",
    "list.yaml": "- model\n- task\n",
    "text.yaml": "tiny-arithmetic\n",
    "empty.yaml": "",
    "broken.yaml": "model: {name: tiny-arithmetic\n",
    "tab.yaml": "model:\n\tname: tiny-arithmetic\n",
    "two.yaml": "model: {name: x}\n---\nmodel: {name: y}\n",
    "tag.yaml": "model: !!python/object/apply:os.system [touch owned]\n",
    "dotted.yaml": "model.name: tiny-arithmetic\n",
    "scalar.yaml": "model: tiny-arithmetic\ntask: {name: multiplication}\n",
    "unknown.yaml": recipe_text("quickstart").replace("learning_rate", "learning_rat"),
    "group.yaml": recipe_text("quickstart") + "\nhardware:\n  budget: 4GiB\n",
    "number.yaml": recipe_text("quickstart") + "\n3: 4\n",
    "wrong.yaml": recipe_text("quickstart").replace("max_steps: 100", "max_steps: many"),
    "nomodel.yaml": "task: {name: multiplication}\n",
    "notask.yaml": "model: {name: tiny-arithmetic}\n",
    "rewards.py": REWARDS,
    "broken.py": "def good(completions, **kwargs:\n",
    "rhymes.jsonl": '{"prompt": "tree", "rhyme": "ee"}\n' * 20,
    "questions.jsonl": '{"ask": "tree", "rhyme": "ee"}\n' * 20,
    "half.jsonl": '{"prompt": "tree", "rhyme": "ee"}\n{"prompt": "st',
    "empty.jsonl": "",
    "blank.jsonl": "\n \n",
    "arrays.jsonl": '["tree", "ee"]\n',
    "numbers.jsonl": '{"prompt": 3}\n',
    "nulls.jsonl": '{"prompt": "tree"}\n{"prompt": null}\n',
    "mixed.jsonl": '{"prompt": "tree"}\n{"prompt": {"text": "tree"}}\n',
    "roles.jsonl": '{"prompt": [{"role": 3, "content": "tree"}]}\n',
    "chat.jsonl": '{"prompt": [{"role": "user", "content": "tree"}]}\n' * 5,
    "taken.jsonl": '{"prompt": "tree", "completions": "ee"}\n',
    "nul.jsonl": '{"prompt": "tree"}\n\x00\x00\n',
    "digits.jsonl": '{"prompt": "tree", "answer": ' + "9" * 5000 + "}\n",
    "splits.json": '{"train": [], "test": [{"prompt": "tree"}]}',
    "scalar.json": "3",
    "torn.json": '[{"prompt": "tree"}, ',
    "table.csv": "prompt,answer\ntree,ee\n",
    "damaged.parquet": "PAR1 no more",
    "nothing/readme.txt": "no data here",
    "svamp.jsonl": '{"Body": 3, "Question": "How many?", "Answer": 4}\n',
    "svamp-answer.jsonl": '{"Body": "b", "Question": "How many?", "Answer": "many"}\n',
    "gsm8k.jsonl": '{"question": "How many?", "answer": "many"}\n',
    "gsm8k-list.jsonl": '{"question": ["How many?"], "answer": "4"}\n',
    "photos/cat.png": "cat",
    "nomodel/readme.txt": "no model here",
}

# Area -> (command line, texts in the error). run/ and photos/ exist already; {stock} is the folder with
# damaged models (m_), adapters (a_) and runs, {model} that of a small model.
TABLE = {
    "commands": [
        ("train -x", ["-x", "twig train --help"]),
        ("--verison", ["--verison", "--version"]),
        ("plan", ["RECIPE_OR_FILE", "twig plan --help"]),
        ("plan quickstart --for 4", ["--for: '4' is not a size", "--for 4GiB,8GiB"]),
        ("plan quickstart --prompt-tokens 0", ["--prompt-tokens", "greater than or equal to 1"]),
        ("plan quikstart", ["quikstart", "quickstart"]),
        ("plan quickstart extra", ["override extra", "not group.key=value"]),
        ("plan quickstart model.device=gpu9", ["model.device: 'gpu9'"]),
        ("export", ["RUN", "twig export --help"]),
        ("export {stock}/run extra", ["extra", "twig export --help"]),
        ("export {stock}/run --push a/b/c", ["--push: a/b/c", "USER/NAME"]),
        ("export {stock}/run --public", ["--public: nothing is pushed", "--push USER/NAME"]),
        ("export {stock}/run --base-model !!", ["--base-model: !!", "USER/NAME"]),
        ("env extra", ["extra", "twig env --help"]),
        ("env --all", ["--all", "twig env --help"]),
        ("runs nowhere", ["nowhere: no such folder", "Name a run"]),
        ("recipes --all", ["--all", "twig recipes --help"]),
        ("eval {stock}/run --samples 1", ["--samples", "greater than or equal to 2"]),
        ("eval {model} --best --task multiplication", ["--best", "not a run", "Leave --best out"]),
        ("trian quickstart", ["'trian'", "train"]),
        ("train", ["RECIPE_OR_FILE", "--help"]),
        ("train quickstart --outptu x", ["--outptu", "--output"]),
        ("train quickstart --output", ["--output", "argument"]),
        ("train quickstart --train.max_steps=3", ["--train.max_steps", "Write train.max_steps"]),
        ("train train.max_steps=3", ["train.max_steps=3", "twig train quickstart train.max_steps=3"]),
        ("eval model.name=x", ["model.name=x", "twig eval MODEL_OR_RUN"]),
        ("eval", ["MODEL_OR_RUN"]),
        ("eval tiny-arithmetic", ["--task", "multiplication, svamp, gsm8k or custom"]),
        ("eval tiny-arithmetic --task svmp", ["task.name", "'svmp'", "svamp"]),
        ("eval tiny-arithmetic --task multiplication --limit many", ["--limit"]),
        ("eval tiny-arithmetic --task multiplication --limit 0", ["--limit", "greater than or equal to 1"]),
        ("eval {stock}/rnu", ["rnu: there is no such folder", "Did you mean ", "/run?"]),
        ("tasks list", ["tasks list", "twig tasks show SOURCE"]),
        ("tasks show", ["twig tasks show SOURCE", "multiplication"]),
        ("tasks show multiplicatoin", ["task.name", "multiplication"]),
        ("recipes quickstart", ["quickstart"]),
    ],
    "recipes": [
        ("plan dup.yaml", ["dup.yaml, line 3", "name is set twice"]),
        ("plan photos", ["photos", "a folder without config.yaml"]),
        ("train quikstart", ["quikstart", "no such recipe or file", "quickstart"]),
        ("train mine.yaml", ["mine.yaml", "no such recipe or file", "quickstart"]),
        ("train photos", ["photos", "a folder without config.yaml"]),
        ("train photos/cat.png", ["photos/cat.png", "not a mapping of groups"]),
        ("train binary.yaml", ["binary.yaml", "not text in UTF-8"]),
        ("train dup.yaml", ["dup.yaml, line 3", "name is set twice"]),
        ("train list.yaml", ["list.yaml", "a list is not a mapping of groups"]),
        ("train text.yaml", ["text.yaml", "'tiny-arithmetic' is not a mapping of groups"]),
        ("train empty.yaml", ["empty.yaml", "model.name: not set", "model.name=tiny-arithmetic"]),
        ("train broken.yaml", ["broken.yaml", "not readable as YAML"]),
        ("train tab.yaml", ["tab.yaml, line 2", "not readable as YAML", "\\t"]),
        ("train two.yaml", ["two.yaml", "not readable as YAML", "another document"]),
        ("train tag.yaml", ["tag.yaml", "not readable as YAML", "constructor"]),
        ("train dotted.yaml", ["model.name: unknown setting", "'model:'", "'name: ...'"]),
        ("train scalar.yaml", ["model: 'tiny-arithmetic' is not a group", "model.name="]),
        ("train unknown.yaml", ["unknown.yaml", "train.learning_rat:", "train.learning_rate"]),
        ("train group.yaml", ["group.yaml", "hardware: unknown setting", "model, lora"]),
        ("train number.yaml", ["number.yaml", "3: unknown setting"]),
        (
            "train wrong.yaml",
            ["wrong.yaml", "train.max_steps: 'many'", "train.max_steps=100"],
        ),
        ("train nomodel.yaml", ["nomodel.yaml", "model.name: not set"]),
        ("train notask.yaml", ["notask.yaml", "task.name: not set", "task.name=multiplication"]),
    ],
    "settings": [
        ("train quickstart model.name=a\x00b", ["model.name=a\\x00b", "not readable as YAML"]),
        (
            "train quickstart memory.budget=4Gigs",
            ["memory.budget: '4Gigs'", "memory.budget=6GiB"],
        ),
        ("plan quickstart memory.budget=0GiB", ["memory.budget: '0GiB'", "memory.budget=6GiB"]),
        (
            "eval {model} --task multiplication model.dtype=float8",
            ["model.dtype: 'float8'", "float64"],
        ),
        ("train quickstart log.report_to=[nothing]", ["log.report_to: 'nothing'", "tensorboard"]),
        ("train quickstart train.seed=-1", ["train.seed: -1"]),
        ("train quickstart max_steps", ["override max_steps", "not group.key=value"]),
        ("train quickstart max_steps=3", ["max_steps is not", "train.max_steps"]),
        ("train quickstart =3", ["override =3", "not group.key=value"]),
        ("train quickstart train=3", ["train is not group.key", "train.learning_rate=VALUE"]),
        ("train quickstart train..seed=3", ["train..seed", "train.seed"]),
        (
            "train quickstart train.learning_rat=1e-5",
            ["train.learning_rat:", "train.learning_rate"],
        ),
        ("train quickstart train.max_steps.x=1", ["train.max_steps: ", "train.max_steps="]),
        ("train quickstart train.max_steps=[", ["train.max_steps=[", "not readable as YAML", "quotes"]),
        ("train quickstart train.learning_rate=fast", ["learning_rate: 'fast'"]),
        ("train quickstart train.learning_rate=-1", ["learning_rate: -1"]),
        ("train quickstart train.learning_rate=.nan", ["learning_rate: nan"]),
        ("train quickstart train.max_steps=1e3", ["1000.0", "train.max_steps=1000"]),
        ("train quickstart train.max_steps=true", ["train.max_steps: true"]),
        ("train quickstart eval.before=yes", ["eval.before: 'yes'", "eval.before=true"]),
        ("train quickstart lora.layers=top", ["lora.layers: 'top'", "last_third"]),
        ("train quickstart lora.target_modules=[]", ["lora.target_modules: []", "q_proj"]),
        ("train quickstart model.name=", ["model.name: null"]),
        ("train quickstart rollout.num_generations=1", ["rollout.num_generations: 1 "]),
        ("train quickstart algorithm.name=gpro", ["algorithm.name: 'gpro'", "grpo"]),
        ("train quickstart algorithm.unbiased=true", ["algorithm.unbiased", "s-grpo"]),
        ("train quickstart task.digits=[3]", ["task.digits: [3]", "[3, 2]"]),
        ("train quickstart task.reward_file=rewards.py", ["task.reward_file", "FILE.py:"]),
    ],
    "folders": [
        ("eval {stock}/damaged_config", ["damaged_config/config.yaml", "not readable as YAML"]),
        ("export {stock}/damaged_config", ["damaged_config/config.yaml", "not readable as YAML"]),
        ("plan {stock}/damaged_config", ["damaged_config/config.yaml", "not readable as YAML"]),
        ("eval {stock}/other_task", ["other_task/config.yaml", "task.name: 'magic'", "multiplication"]),
        (
            "export {stock}/damaged_summary",
            ["damaged_summary", "summary.json", "--resume"],
        ),
        (
            "export {stock}/odd_summary",
            ["odd_summary", "summary.json", "--resume"],
        ),
        (
            "export {stock}/damaged_environment",
            ["damaged_environment/environment.json"],
        ),
        (
            "train {stock}/damaged_metrics --resume train.max_steps=2",
            ["metrics.jsonl line "],
        ),
        (
            "train {stock}/other_checkpoint --resume train.max_steps=2",
            ["lora.r", "began with 4"],
        ),
        (
            "train {stock}/odd_checkpoint --resume train.max_steps=2",
            ["step-1", "not a checkpoint of this run"],
        ),
        ("eval {stock}/cut_adapter", ["model.adapter", "cut_adapter", "does not fit"]),
        ("export {stock}/cut_adapter", ["adapter_model.safetensors", "damaged"]),
        ("export photos", ["photos: no run (it has no config.yaml)"]),
        ("export {stock}/run --output photos", ["--output: photos", "not empty"]),
        (
            "eval {stock}/run --output photos",
            ["--output: photos", "not an evaluation"],
        ),
        ("eval {stock}/run --output photos/cat.png", ["--output: photos/cat.png is a file"]),
        (
            "eval {stock}/run --against photos",
            ["--against: photos holds no evaluation.json", "twig eval MODEL --output"],
        ),
        ("train quickstart --output run", ["--output run", "holds another run", "--resume"]),
        ("train quickstart --output photos", ["--output photos", "not empty and not a run"]),
        ("train quickstart --output photos/cat.png", ["--output photos/cat.png", "a file, not a folder"]),
        ("train quickstart --output photos/cat.png/run", ["--output photos/cat.png/run"]),
        ("train quickstart --resume", ["--resume", "no run runs/quickstart-N", "--output DIR"]),
        ("train quickstart --resume --output photos", ["--resume", "photos holds no run"]),
        ("train quickstart --resume --output run train.seed=7", ["train.seed: 7", "train.seed=0"]),
        ("eval run", ["run", "no adapter", "twig train run --resume"]),
    ],
    "models": [
        (
            "{train} model.name={stock}/m_no_config",
            ["model.name", "m_no_config has no config.json"],
        ),
        (
            "{train} model.name={stock}/m_damaged_config",
            ["model.name", "m_damaged_config does not load"],
        ),
        ("{train} model.name={stock}/m_list_config", ["model.name", "m_list_config does not load"]),
        ("{train} model.name={stock}/m_empty_config", ["model.name", "m_empty_config does not load"]),
        (
            "{train} model.name={stock}/m_unknown_type",
            ["model.name", "m_unknown_type does not load", "nothing"],
        ),
        (
            "{train} model.name={stock}/m_text_width",
            ["model.name", "m_text_width does not load", "hidden_size"],
        ),
        ("{train} model.name={stock}/m_no_heads", ["model.name", "m_no_heads does not load"]),
        (
            "{train} model.name={stock}/m_cut_weights",
            ["model.name", "the weights of", "m_cut_weights are damaged", "again"],
        ),
        ("{train} model.name={stock}/m_empty_weights", ["model.name", "m_empty_weights are damaged"]),
        (
            "{train} model.name={stock}/m_other_width",
            ["model.name", "m_other_width has weights of another shape", "belong together"],
        ),
        (
            "{train} model.name={stock}/m_more_layers",
            ["model.name", "m_more_layers lacks weights", "model.layers.3", "belong together"],
        ),
        (
            "{train} model.name={stock}/m_pickle_only",
            ["model.name", "m_pickle_only has no safetensors weights"],
        ),
        ("{train} model.name={stock}/m_no_tokenizer", ["model.name", "m_no_tokenizer has no tokenizer"]),
        (
            "{train} model.name={stock}/m_damaged_tokenizer",
            ["model.name", "m_damaged_tokenizer does not load"],
        ),
        (
            "{train} model.name={stock}/m_own_code",
            [
                "model.name",
                "m_own_code needs to run its own Python code",
                "model.trust_remote_code=true if you trust it",
            ],
        ),
        ("eval {stock}/m_cut_weights --task multiplication", ["m_cut_weights are damaged"]),
        ("eval {stock}/m_own_code --task multiplication", ["m_own_code needs to run its own Python code"]),
        ("plan quickstart model.name={stock}/m_damaged_config", ["config.json: not readable as JSON"]),
        ("plan quickstart model.name={stock}/m_no_heads", ["num_attention_heads of at least 1"]),
        (
            "plan quickstart model.name={stock}/m_damaged_tokenizer",
            ["tokenizer.json is damaged", "--prompt-tokens N"],
        ),
        ("tasks show multiplication model.name={stock}/m_no_tokenizer", ["m_no_tokenizer has no tokenizer"]),
        (
            "tasks show multiplication model.name={stock}/m_damaged_tokenizer",
            ["m_damaged_tokenizer does not load"],
        ),
        (
            "train quickstart model.name=./nowhere",
            ["model.name", "./nowhere"],
        ),
        ("train quickstart model.name=nomodel", ["model.name", "nomodel has no config.json"]),
        (
            "train quickstart model.name=nobody/nothing",
            ["model.name", "nobody/nothing"],
        ),
        ("eval nobody/nothing --task multiplication", ["model.name", "nobody/nothing"]),
        ("tasks show multiplication model.name=nobody/nothing", ["model.name", "nobody/nothing"]),
        ("{train} model.device=gpu9", ["model.device", "gpu9"]),
        ("{train} lora.target_modules=[c_attn]", ["c_attn", "q_proj"]),
        ("{train} lora.layers=[7]", ["lora.layers: 7", "0 to 2"]),
        ("{train} rollout.suppress_tokens=[9999]", ["rollout.suppress_tokens: 9999"]),
        (
            "{train} rollout.decode=graph",
            ["rollout.decode: graph needs a CUDA device", "rollout.decode=auto"],
        ),
    ],
    "datasets": [
        ("{custom} task.path=empty.jsonl", ["empty.jsonl holds no rows"]),
        ("{custom} task.path=blank.jsonl", ["blank.jsonl holds no rows"]),
        ("{custom} task.path=arrays.jsonl", ["arrays.jsonl line 1 is not an object", "{...}"]),
        ("{custom} task.path=numbers.jsonl", ["data row 0: prompt "]),
        ("{custom} task.path=nulls.jsonl", ["data row 1", "no column 'prompt'", "null there"]),
        ("{custom} task.path=mixed.jsonl", ["data row 1: prompt "]),
        ("{custom} task.path=roles.jsonl", ["data row 0: prompt "]),
        ("{custom} task.path=chat.jsonl", ["the tokenizer has no chat template"]),
        ("{custom} task.path=taken.jsonl", ["column 'completions'"]),
        ("{custom} task.path=nul.jsonl", ["nul.jsonl line 2 is not readable as JSON"]),
        ("{custom} task.path={stock}/huge.jsonl", ["huge.jsonl line 2 is not readable as JSON"]),
        ("{custom} task.path={stock}/deep.jsonl", ["deep.jsonl line 1 is not readable as JSON"]),
        ("{custom} task.path=digits.jsonl", ["digits.jsonl line 1 is not readable as JSON"]),
        ("{custom} task.path=splits.json", ["splits.json holds no rows to train on"]),
        ("{custom} task.path=scalar.json", ["scalar.json is not a list of objects"]),
        ("{custom} task.path=torn.json", ["torn.json is not readable as JSON"]),
        ("{custom} task.path=table.csv", ["table.csv is none of .jsonl, .json, .parquet"]),
        ("{custom} task.path=damaged.parquet", ["damaged.parquet is not readable as Parquet"]),
        ("{custom} task.path=nothing", ["nothing holds no .jsonl, .json, .parquet file"]),
        ("{custom} task.path={stock}/latin.jsonl", ["latin.jsonl is not text in UTF-8"]),
        ("{custom} task.eval_size=20", ["task.eval_size", "20 rows"]),
        ("{custom} task.train_split=dev", ["task.train_split", "no split 'dev'", "rhymes, or all"]),
        ("{custom} task.prompt_template=Say{{verse}}", ["task.prompt_template: {verse}", "{rhyme}"]),
        ("{train} task.name=svamp task.path=svamp.jsonl", ["data row 0: Body ", "task.path"]),
        ("{train} task.name=svamp task.path=svamp-answer.jsonl", ["data row 0: ", "'many'"]),
        ("{train} task.name=gsm8k task.path=gsm8k.jsonl", ["data row 0: ", "'many'"]),
        ("{train} task.name=gsm8k task.path=gsm8k-list.jsonl", ["data row 0: question "]),
        ("eval {model} --task custom task.path=half.jsonl", ["half.jsonl line 2"]),
        ("tasks show custom task.path=half.jsonl", ["half.jsonl line 2"]),
        ("plan quickstart task.name=custom task.path=half.jsonl", ["half.jsonl line 2"]),
        ("{train} task.eval_size=99999", ["task.eval_size: 99999", "165"]),
        ("{train} task.chat=always", ["task.chat", "no chat template"]),
        ("{train} task.prompt_template='{{x}}'", ["task.prompt_template", "{x}"]),
        ("train quickstart task.name=custom", ["task.path: not set", "task.path=FILE.jsonl"]),
        ("{custom} task.path=nothing.jsonl", ["nothing.jsonl"]),
        ("{custom} task.path=questions.jsonl", ["'prompt'", "ask, rhyme", "task.prompt_column"]),
        ("{custom} task.path=half.jsonl", ["half.jsonl", "2"]),
        ("train quickstart task.name=custom task.path=rhymes.jsonl", ["task.reward_file=FILE.py:FUNCTION"]),
    ],
    "rewards": [
        ("tasks show custom task.path=rhymes.jsonl task.reward_file=broken.py:good", ["broken.py", "1"]),
        (
            "eval {model} --task custom task.path=rhymes.jsonl task.reward_file=nothing.py:good",
            ["nothing.py"],
        ),
        ("{custom} task.reward_file=nothing.py:good", ["nothing.py"]),
        ("{custom} task.reward_file=rewards.py:god", ["rewards.py", "god", "good"]),
        ("{custom} task.reward_file=rewards.py:not_a_function", ["not_a_function"]),
        ("{custom} task.reward_file=broken.py:good", ["broken.py", "1"]),
        (
            "{custom} task.reward_file=rewards.py:raises",
            ["rewards.py", "6", "ZeroDivisionError", "traceback"],
        ),
        ("{custom} task.reward_file=rewards.py:too_few", ["rewards.py", "too_few", "1"]),
        ("{custom} task.reward_file=rewards.py:texts", ["rewards.py", "texts", "'good'"]),
        (
            "{custom} task.reward_weights=[1,2]",
            ["task.reward_weights", "2 weights for 1", "one weight per function"],
        ),
    ],
    "adapters": [
        (
            "{train} model.adapter={stock}/a_no_config",
            ["model.adapter", "a_no_config", "holds no LoRA adapter"],
        ),
        (
            "{train} model.adapter={stock}/a_damaged_config",
            ["model.adapter", "a_damaged_config", "holds no LoRA adapter"],
        ),
        (
            "{train} model.adapter={stock}/a_list_config",
            ["model.adapter", "a_list_config", "holds no LoRA adapter"],
        ),
        (
            "{train} model.adapter={stock}/a_other_kind",
            ["model.adapter", "a_other_kind", "holds no LoRA adapter (it is of the kind"],
        ),
        (
            "{train} model.adapter={stock}/a_unknown_kind",
            ["model.adapter", "a_unknown_kind", "holds no LoRA adapter"],
        ),
        (
            "{train} model.adapter={stock}/a_other_rank",
            ["model.adapter", "a_other_rank", "does not fit the model"],
        ),
        (
            "{train} model.adapter={stock}/a_text_rank",
            ["model.adapter", "a_text_rank", "does not fit the model"],
        ),
        (
            "{train} model.adapter={stock}/a_other_layers",
            ["model.adapter", "a_other_layers", "does not fit the model"],
        ),
        (
            "{train} model.adapter={stock}/a_cut_weights",
            ["model.adapter", "a_cut_weights", "does not fit the model"],
        ),
        (
            "{train} model.adapter={stock}/a_other_weights",
            ["model.adapter", "a_other_weights", "weights of the base (x)"],
        ),
        (
            "{train} model.adapter={stock}/a_pickle_only",
            ["model.adapter", "a_pickle_only", "no other format is loaded"],
        ),
        (
            "{train} model.adapter=nowhere",
            ["model.adapter: nowhere holds no LoRA adapter"],
        ),
        ("{train} model.adapter={stock}/a_good lora.r=3", ["lora.r: 3 here, but 16 in", "lora.r"]),
        ("eval {stock}/a_damaged_config --task multiplication", ["names no base model", "model.adapter="]),
        ("eval {stock}/a_no_base --task multiplication", ["names no base model", "model.adapter="]),
        ("eval {stock}/a_pickle_only --task multiplication", ["no other format is loaded"]),
        ("eval {stock}/a_good", ["--task: not set", "multiplication"]),
    ],
}
CASES = [(line, expected) for area in TABLE.values() for line, expected in area]
SMALL = (
    "train quickstart --output new model.name={model} task.digits=[2,1] eval.limit=2 "
    "rollout.max_completion_length=4 train.max_steps=1"
)
CUSTOM = (
    "train quickstart --output new model.name={model} task.name=custom task.path=rhymes.jsonl "
    "task.reward_file=rewards.py:good eval.limit=4 rollout.max_completion_length=4"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def stock(model, tmp_path_factory):
    """A folder with damaged models, adapters and runs, and large data files; no case changes it."""
    folder = tmp_path_factory.mktemp("stock")
    damage_models(model, folder)
    run_folders(model, folder)
    damage_adapters(folder)
    (folder / "huge.jsonl").write_text('{"prompt": "tree"}\n' + "x" * 2**21 + "\n")
    (folder / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (folder / "latin.jsonl").write_bytes('{"prompt": "père"}\n'.encode("latin-1"))
    return folder


def copies(source, folder, prefix):
    """A function that makes a named copy of `source`, with some files replaced (None: removed)."""

    def copy(name, **files):
        target = folder / f"{prefix}{name}"
        shutil.copytree(source, target)
        for path, content in files.items():
            path = target / path.replace("__", "/").replace("_json", ".json").replace("_yaml", ".yaml")
            path.unlink(missing_ok=content is None)
            if content is not None:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        return target

    return copy


def cut(path):
    """Leaves the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def damage_models(model, folder):
    copy, config = copies(model, folder, "m_"), json.loads((model / "config.json").read_text())
    copy("no_config", config_json=None)
    copy("damaged_config", config_json="{bro")
    copy("list_config", config_json=[1])
    copy("empty_config", config_json={})
    copy("unknown_type", config_json=config | {"model_type": "nothing"})
    copy("text_width", config_json=config | {"hidden_size": "many"})
    copy("no_heads", config_json=config | {"num_attention_heads": 0})
    copy("other_width", config_json=config | {"hidden_size": 32})
    more = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    copy("more_layers", config_json=config | more)
    copy("damaged_tokenizer", tokenizer_json="{")
    copy("no_tokenizer", tokenizer_json=None, tokenizer_config_json=None)
    cut(copy("cut_weights") / "model.safetensors")
    (copy("empty_weights") / "model.safetensors").write_bytes(b"")
    pickled = copy("pickle_only")
    (pickled / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, pickled / "pytorch_model.bin")
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    own_code = copy("own_code", config_json=config | code)
    (own_code / "mine.py").write_text("open('owned', 'w')\n")


def damage_adapters(folder):
    copy = copies(folder / "run" / "adapter", folder, "a_")
    config = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())
    copy("good")
    copy("no_config", adapter_config_json=None)
    copy("damaged_config", adapter_config_json="{")
    copy("list_config", adapter_config_json=[])
    copy("other_kind", adapter_config_json=config | {"peft_type": "IA3"})
    copy("unknown_kind", adapter_config_json=config | {"peft_type": "NOTHING"})
    copy("other_rank", adapter_config_json=config | {"r": 3})
    copy("text_rank", adapter_config_json=config | {"r": "three"})
    copy("other_layers", adapter_config_json=config | {"layers_to_transform": [77]})
    copy("no_base", adapter_config_json=config | {"base_model_name_or_path": None})
    cut(copy("cut_weights") / "adapter_model.safetensors")
    save_file({"x": torch.zeros(2)}, copy("other_weights") / "adapter_model.safetensors")
    pickled = copy("pickle_only")
    (pickled / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(2)}, pickled / "adapter_model.bin")


def run_folders(model, folder):
    settings = load(
        "quickstart",
        [
            f"model.name={model}",
            "task.digits=[2,1]",
            "eval.limit=2",
            "train.max_steps=1",
            "rollout.prompts_per_step=1",
            "rollout.num_generations=2",
            "rollout.max_completion_length=4",
        ],
    )
    run = train(settings, output=folder / "run").folder
    other = train(settings.with_overrides(["lora.r=4"]), output=folder / "other_run").folder
    copy, config = copies(run, folder, ""), (run / "config.yaml").read_text()
    copy("damaged_config", config_yaml="model: {")
    copy("other_task", config_yaml=config.replace("name: multiplication", "name: magic"))
    copy("damaged_summary", summary_json="{")
    summary = json.loads((run / "summary.json").read_text())
    copy("odd_summary", summary_json=summary | {"accuracy_after": "good"})
    copy("damaged_environment", environment_json="{")
    with open(copy("damaged_metrics") / "metrics.jsonl", "a") as file:
        file.write("{bro\n")
    cut(copy("cut_adapter") / "adapter" / "adapter_model.safetensors")
    replaced = copy("other_checkpoint")
    shutil.rmtree(replaced / "checkpoints")
    shutil.copytree(other / "checkpoints", replaced / "checkpoints")
    odd = copy("odd_checkpoint") / "checkpoints" / "step-1"
    (odd / "state.json").write_text("{}")
    manifest = json.loads((odd / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (odd / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with FILES, a run and a file that is not text."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    log = RunLog.create(folder / "run", load("quickstart"))
    log.log(1, {"reward": 0.5})
    log.close()
    return folder


@pytest.fixture
def place(files, tmp_path, monkeypatch):
    """A copy of these; the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(files, tmp_path, dirs_exist_ok=True)


def arguments_of(line, model, stock=""):
    line = line.replace("{custom}", CUSTOM).replace("{train}", SMALL)
    return [word.strip("'") for word in line.format(model=model, stock=stock).split(" ")]


def stamps(folder):
    """When each file was written. Not those to which lines are added: they say what was changed, and when."""
    stamped, folders = {}, [folder]
    while folders:
        for entry in os.scandir(folders.pop()):  # many times faster than Path.rglob
            if entry.is_dir():
                folders.append(entry)
            elif entry.name != "warnings.txt":
                stamped[entry.path] = entry.stat().st_mtime_ns
    return stamped


def snapshot(folder):
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".pyc" not in path.name
    }


def test_there_are_enough_cases_in_each_area_and_none_twice():
    assert len({line for line, _ in CASES}) == len(CASES) >= 200
    areas = "commands recipes settings folders models adapters datasets rewards"
    assert set(TABLE) == set(areas.split())
    assert min(map(len, TABLE.values())) >= 10
    commands = Counter(
        line.split()[0].replace("{custom}", "train").replace("{train}", "train") for line, _ in CASES
    )
    assert {"train", "eval", "plan", "export", "tasks", "recipes", "env"} <= set(commands)


@pytest.mark.parametrize("line, expected", CASES, ids=[line for line, _ in CASES])
def test_one_line_says_what_is_wrong_and_what_to_write(line, expected, place, model, stock, capsys):
    before, stamped = snapshot(place), stamps(stock)
    status = main(arguments_of(line, model, stock))
    shown, said = capsys.readouterr()
    assert (status, shown) == (2, ""), said
    # Less those that say how far it came: phases, which file of Python is run, where and how a run goes on.
    progress = ("running the Python file", "resuming from step", "train.max_steps: 2 from here on")
    lines = [
        text for text in said.splitlines() if not text.endswith(" ...") and not text.startswith(progress)
    ]
    assert len(lines) == 1 and lines[0].startswith("twig: "), said
    assert lines[0].isprintable() and len(lines[0]) < 2500
    for word in expected:
        assert word in said
    assert stamps(stock) == stamped
    after = snapshot(place)
    assert {path: after.get(path) for path in before} == before
    new = {path.relative_to(place).as_posix() for path in set(after) - set(before)}
    # Only a reward function's own fault leaves something: the folder with its traceback.
    assert new == set() or "traceback" in said and "new/traceback.txt" in new
    assert not (place / "owned").exists()


def test_a_reward_functions_traceback_is_in_the_run_folder(place, model, capsys):
    arguments = arguments_of("{custom} task.reward_file=rewards.py:raises log.progress=quiet", model)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "rewards.py" in said and "line 6" in said or "rewards.py:6" in said
    text = (place / "new" / "traceback.txt").read_text()
    assert "ZeroDivisionError" in text and "1 / 0 for text in completions" in text
    assert main(arguments) == 2, "the folder does not stop the next try"
    assert "holds another run" not in capsys.readouterr().err


def test_several_unknown_settings_are_still_one_line(place, capsys):
    assert main(["train", "quickstart", "train.a=1", "train.b=2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_hostile_name_neither_styles_nor_breaks_the_line(place, capsys):
    assert main(["train", "\x1b[31m\nred[bold].yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said and "\\x1b[31m red[bold].yaml" in said


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs folders that cannot be written")
def test_a_folder_that_cannot_be_written(place, capsys):
    (place / "locked").mkdir(mode=0o500)
    assert main(["train", "quickstart", "--output", "locked/run"]) == 2
    assert "locked/run: cannot be written (Permission denied)" in capsys.readouterr().err


def test_a_full_disk_is_one_line(place, capsys, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(28, "No space left on device", "new/checkpoints/x")

    monkeypatch.setattr("twig.training.train.train", fill)
    assert main(["train", "quickstart", "--output", "new", "log.progress=quiet"]) == 2
    said = capsys.readouterr().err
    assert "new/checkpoints/x: No space left on device" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "line, expected",
    [
        pytest.param("train dup.yaml", "name is set twice", marks=pytest.mark.slow),
        pytest.param("train quickstart --output run", "holds another run", marks=pytest.mark.slow),
        ("trian", "'train'"),
    ],
)
def test_the_same_from_a_shell(line, expected, place):
    command = [sys.executable, "-m", "twig", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("twig: ") and done.stderr.count("\n") == 1
    assert expected in done.stderr
