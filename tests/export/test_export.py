"""A run as a folder to share: what is in it gives the same logits, the card is true and cannot be broken,
nothing of this machine is in it; adapters that training starts from, and the best one."""

import hashlib
import importlib
import json
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, errors
from markdown_it import MarkdownIt
from peft import LoraConfig, PeftModel, get_peft_model
from project import ROOT
from safetensors.torch import load_file, save_file
from saved import build_tokenizer, save_model
from tiny import FAMILIES, SHAPE
from transformers import AutoModelForCausalLM, AutoTokenizer

import twig
from twig.cli.app import main
from twig.common.errors import UserError
from twig.common.progress import Progress
from twig.common.redact import code, fenced, public
from twig.config.load import Settings
from twig.core.algorithms.base import PAPER
from twig.core.algorithms.registry import shipped
from twig.evaluation.evaluate import Evaluation, measure_model
from twig.evaluation.statistics import wilson
from twig.export import export
from twig.export.card import SOFTWARE, Base, Merge, Subject, model_card
from twig.export.export import ExportOptions, export_run
from twig.export.upload import Push, push_folder
from twig.runs.reader import read_metrics, read_summary

PROMPTS = {"12*3=": "1", "9+8=": "3", "abc?": "5", "#=": "7", "0,1,": "9"}
TRAIN = [{"prompt": prompt, "wanted": digit} for prompt, digit in PROMPTS.items()]
EVAL = [{"prompt": text, "wanted": "2"} for text in ("4*4=", "x?", "77+1=")]
IDS = torch.arange(3, 40)[None]
# Family, and whether the head is the embedding.
MODELS = [("qwen2", True), ("llama", False)]
MODELS += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("qwen2", False), ("llama", True), ("gemma2", False), ("gemma2", True))
]
RESULT = {"value": 0.5, "low": 0.404, "high": 0.596, "n": 100, "found": 0.9, "right_lenient": None}
SUMMARY = {
    "schema_version": 1,
    "status": "finished",
    "steps": 100,
    "accuracy_before": RESULT,
    "accuracy_after": RESULT | {"value": 0.81234, "low": 0.72, "high": 0.88},
    "accuracy_best": RESULT | {"value": 0.9, "low": 0.82, "high": 0.95, "step": 75},
    "tokens_sampled": 1_234_567,
    "tokens_selected": 12_345,
    "seconds": 58.2,
}
ENVIRONMENT = {
    "versions": {"twig-rl": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
    "device": "cuda:0",
    "device_name": "A GPU",
    "dtype": "torch.bfloat16",
    "model_revision": "0123abc",
    "data_revision": "sha256:12",
    "passed": None,
}
ADAPTER = {"r": 16, "lora_alpha": 32.0, "target_modules": ["v_proj", "q_proj"], "layers_to_transform": [2, 3]}
HOSTILE = "a|b`c``d <img src=x onerror=alert(1)> </td>\n\n# Owned\n---\n[x](http://x) \x1b[31m\u202e *y*"


def digits(completions, **kwargs):
    """The share of digits in a completion: it varies from one to the next, whatever the model."""
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]


def save_family(folder, family, tied, dtype=torch.float32):
    """A random model of the family for `build_tokenizer`'s tokens, saved as users' models are."""
    tokenizer = build_tokenizer()
    name, extra = FAMILIES[family]
    own = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": tied}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            getattr(transformers, name)(**SHAPE | extra | own), dtype=dtype
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(base, output, *overrides, **given):
    values = {
        "model": {"name": str(base)},
        "task": {"name": "custom"},
        "rollout": {"num_generations": 4, "prompts_per_step": 2, "max_completion_length": 7},
        "train": {"max_steps": 2, "learning_rate": 0.05},
    }
    given = {"reward_funcs": digits, "train_dataset": TRAIN, "eval_dataset": EVAL} | given
    return twig.train(Settings.from_dict(values, overrides), output=output, **given)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("ann") / "mine")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A finished run on the small model, evaluated after each step."""
    return train(base, tmp_path_factory.mktemp("bob") / "run", "eval.steps=1")


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run, to change."""
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def checksums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# The same logits


@pytest.mark.parametrize("family, tied", MODELS)
def test_what_is_exported_gives_the_logits_of_what_was_trained(family, tied, tmp_path):
    """Adapter: the same bits. Merged in float32: within 1e-5 of the largest logit."""
    base = save_family(tmp_path / "base", family, tied)
    before = checksums(base)
    done = train(base, tmp_path / "run")
    expected = logits(done.model)
    adapter = export_run(done.folder, tmp_path / "adapter").folder
    merged = export_run(done.folder, tmp_path / "merged", ExportOptions(merged=True))
    assert checksums(base) == before
    own = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits(own), expected, rtol=1e-2), "the adapter does something"
    assert torch.equal(logits(PeftModel.from_pretrained(own, adapter)), expected)
    whole = AutoModelForCausalLM.from_pretrained(merged.folder)
    assert type(whole) is type(AutoModelForCausalLM.from_pretrained(base))
    assert (logits(whole) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == tied
    assert merged.merge.difference <= 1e-5 * merged.merge.largest
    assert names(adapter) == sorted(
        [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
    )
    assert names(merged.folder) == sorted(
        ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
        + ["tokenizer_config.json"]
    )


@pytest.mark.parametrize(
    "dtype", ["bfloat16", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("float16", "float64"))]
)
def test_a_merge_is_added_up_in_wide_numbers_and_rounded_once(dtype, tmp_path):
    kind = getattr(torch, dtype)
    base = save_family(tmp_path / "base", "llama", tied=False, dtype=kind)
    done = train(base, tmp_path / "run", f"model.dtype={dtype}")
    merged = export_run(done.folder, tmp_path / "merged", ExportOptions(merged=True))
    weights, own = (load_file(f / "model.safetensors") for f in (merged.folder, base))
    low = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    wide = torch.promote_types(kind, torch.float32)
    adapted = 0
    for name, weight in weights.items():
        assert weight.dtype == kind
        stem = f"base_model.model.{name.removesuffix('weight')}lora_"
        expected = own[name].to(wide)
        if f"{stem}A.weight" in low:
            adapted += 1
            expected = expected + (low[f"{stem}B.weight"] @ low[f"{stem}A.weight"]).to(wide) * 2
            assert not torch.equal(expected.to(kind), own[name])
        torch.testing.assert_close(weight, expected.to(kind), rtol=0, atol=1e-15 if dtype == "float64" else 0)
    assert adapted == 4
    loaded = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=kind)
    ids = export._ids(export._read(done.folder, False), build_tokenizer())
    with torch.no_grad():
        apart = (loaded(ids).logits.to(wide) - done.model(ids).logits.to(wide)).abs().max()
    assert merged.merge == Merge(dtype, float(apart), merged.merge.largest, ids.shape[1])
    card = (merged.folder / "README.md").read_text()
    rounding = "" if dtype == "float64" else f" and rounded once to {dtype}"
    assert f"added up in {str(wide)[6:]}{rounding}." in card
    assert f"differ by at most {merged.merge.difference:.2g} on one text ({ids.shape[1]} tokens" in card


@pytest.mark.slow
def test_the_tokenizer_and_the_endings_are_those_of_the_base(tmp_path, test_data):
    base = save_model(tmp_path / "base")
    shutil.copy(test_data / "qwen2_tokenizer" / "tokenizer.json", base)
    shutil.copy(test_data / "qwen2_tokenizer" / "tokenizer_config.json", base)
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 2], "do_sample": true, "top_k": 3}')
    # Only the form is looked at: the weights know fewer tokens than this tokenizer.
    done = train(
        save_model(tmp_path / "other"), tmp_path / "run", "train.max_steps=1", "log.completions_steps=0"
    )
    edit(done.folder / "adapter" / "adapter_config.json", base_model_name_or_path=str(base))
    for merged in (False, True):
        if merged:
            shutil.copy(tmp_path / "other" / "tokenizer.json", base)
            shutil.copy(tmp_path / "other" / "tokenizer_config.json", base)
        folder = export_run(done.folder, tmp_path / f"{merged}", ExportOptions(merged=merged)).folder
        own, loaded = (AutoTokenizer.from_pretrained(f) for f in (base, folder))
        for text in ("347*26= 9022\n\n#### 5", "  Ünïcödé 中文 don't", "<|im_start|>user\nhi<|im_end|>"):
            assert loaded(text)["input_ids"] == own(text)["input_ids"], text
        assert loaded.chat_template == own.chat_template
        assert loaded.special_tokens_map == own.special_tokens_map
    ends = json.loads((folder / "generation_config.json").read_text())
    assert (ends["eos_token_id"], ends["do_sample"], ends["top_k"]) == ([1, 2], True, 3)


@pytest.mark.parametrize("form", ["adapter on the hub", "adapter", "adapter of the embedded model", "merged"])
def test_the_six_lines_of_the_card_run(form, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = Path(trained.summary and trained.model.peft_config["default"].base_model_name_or_path)
    folder, options = trained.folder, {}
    if form == "adapter on the hub":  # a folder of that name stands for the model on the Hub
        shutil.copytree(base, "ann/mine")
        monkeypatch.setattr(export, "_is_local", lambda name: Path(name).is_absolute())
        options = {"base_model": "ann/mine"}
    elif form == "adapter":
        shutil.copytree(base, f"FOLDER/{base.name}")
    elif form == "merged":
        options = {"merged": True}
    else:
        overrides = "train.max_steps=1 eval.limit=4 rollout.max_completion_length=8".split()
        folder = twig.train(twig.load_settings("quickstart", overrides), output="run").folder
    export_run(folder, "shared", ExportOptions(**options))
    card = Path("shared/README.md").read_text()
    (lines,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert lines.count("\n") <= 6
    loaded = {}
    exec(compile(lines, "README.md", "exec"), loaded)
    assert capsys.readouterr().out.strip()
    if form == "adapter of the embedded model":
        assert "is on no Hub" in card and "load_model('tiny-arithmetic')" in lines
    else:
        assert (logits(loaded["model"]) - logits(trained.model)).abs().max() < 1e-6
        assert loaded["tokenizer"]("12*3=")["input_ids"] == trained.tokenizer("12*3=")["input_ids"]


@pytest.mark.slow
def test_an_export_can_be_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overrides = ["train.max_steps=1", "eval.limit=8", "train.learning_rate=0.05"]
    overrides.append("rollout.max_completion_length=8")
    twig.train(twig.load_settings("quickstart", overrides), output="run")
    tables = []
    for form in ("run", "exports/run", "exports/run-merged"):
        if form != "run":
            assert main(["export", "run", *(["--merged"] if "merged" in form else [])]) == 0
            assert capsys.readouterr().out.splitlines()[0] == f"folder   {form}"
        arguments = ["--task", "multiplication", "--limit", "8", "rollout.max_completion_length=8"]
        assert main(["eval", form, *arguments, "log.progress=quiet"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] == tables[2]


# The card


def subject(*overrides, **given):
    values = {"model": {"name": "Qwen/Qwen2-1.5B"}, "task": {"name": "svamp"}}
    settings = Settings.from_dict(values, overrides)
    kept = {"name": "ann/better", "settings": settings, "summary": SUMMARY, "environment": ENVIRONMENT}
    kept |= {"adapter": ADAPTER, "base": Base("Qwen/Qwen2-1.5B", "Qwen/Qwen2-1.5B"), "best": False}
    return Subject(**kept | {"prompt": "Ann has 3", "chat": False} | given)


def metadata(card):
    """The metadata as the Hub reads it, and the page below it."""
    loaded = ModelCard(card)
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert data.get("base_model") == loaded.data.base_model
    return data, loaded.text


def test_the_metadata_is_what_the_hub_reads():
    data, _ = metadata(model_card(subject()))
    assert data == {
        "base_model": "Qwen/Qwen2-1.5B",
        "datasets": ["ChilleD/SVAMP"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["twig", "reinforcement-learning", "t-spmo", "lora", "arxiv:2504.20834"],
        "model-index": [
            {
                "name": "ann/better",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "ChilleD/SVAMP", "type": "ChilleD/SVAMP"},
                        "metrics": [
                            {"type": "accuracy", "value": 0.8123, "name": "accuracy, greedy, 100 problems"}
                        ],
                    }
                ],
            }
        ],
    }
    merge = Merge("bfloat16", 0.0625, 20.5, 99)
    data, _ = metadata(model_card(subject(merge=merge, license="apache-2.0")))
    assert (data["library_name"], data["license"], "lora" in data["tags"]) == (
        "transformers",
        "apache-2.0",
        False,
    )
    unmeasured = SUMMARY | dict.fromkeys(["accuracy_before", "accuracy_after", "accuracy_best"])
    data, text = metadata(model_card(subject(summary=unmeasured, base=Base("mine"))))
    assert not {"model-index", "base_model", "license"} & set(data)
    assert "Accuracy was not measured." in text and "in a folder called `mine`" in text


@pytest.mark.parametrize(
    "overrides, passed, expected",
    [
        (["task.name=gsm8k"], None, ["openai/gsm8k"]),
        (["task.name=multiplication"], None, None),
        (["task.path=data/svamp"], None, None),
        (["task.name=custom", "task.path=ann/rhymes"], None, None),
        (["task.name=custom", "task.path=ann/cached"], None, ["ann/cached"]),
        ([], "reward_funcs, train_dataset", None),
    ],
)
def test_only_data_from_the_hub_is_named_as_such(overrides, passed, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--ann--cached").mkdir()
    card = model_card(subject(*overrides, environment=ENVIRONMENT | {"passed": passed}))
    data, text = metadata(card)
    assert data.get("datasets") == expected
    assert ("Passed from Python" in text) == (passed is not None)
    for path in ("data/svamp", "ann/rhymes"):
        assert path not in card


def test_rewards_that_are_more_than_right_or_wrong_have_their_mean():
    results = {
        f"accuracy_{when}": SUMMARY[f"accuracy_{when}"] | {"graded": True, "reward": reward}
        for when, reward in (("before", 0.1), ("after", 0.25))
    }
    data, text = metadata(model_card(subject(summary=SUMMARY | results)))
    (metric,) = data["model-index"][0]["results"][0]["metrics"]
    assert (metric["type"], metric["value"]) == ("reward", 0.25)
    assert "\n| after step 100 (this model) | 0.250 | 100 |\n" in text and "may be chance" not in text


def test_the_page_has_the_numbers_of_the_run():
    text = model_card(subject("train.learning_rate=3e-4", "algorithm.name=s-grpo", "log.progress=quiet"))
    for line in (
        "| before training | 50.0 % | 40.4 to 59.6 % | 100 | 90.0 % | - |",
        "| after step 100 (this model) | 81.2 % | 72.0 to 88.0 % | 100 | 90.0 % | - |",
        "- tokens: 1,234,567 sampled, 12,345 of them with credit (1.0 %)",
        "- versions: twig-rl `0.1.0`, torch `2.13.0`, transformers `5.23.0`, peft `0.21.2`",
        "- adapter: `rank 16, alpha 32, q_proj, v_proj of layers 2, 3`",
        "- base: `Qwen/Qwen2-1.5B`, commit `0123abc`",
        "- device: `A GPU`",
    ):
        assert f"\n{line}\n" in text, line
    assert "step 75" not in text and "may be chance" not in text
    (settings,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(settings) == {
        "model": {"name": "Qwen/Qwen2-1.5B"},
        "task": {"name": "svamp"},
        "algorithm": {"name": "s-grpo"},
        "train": {"learning_rate": 0.0003},
    }


def test_the_best_adapters_card_says_that_it_was_chosen():
    card = model_card(subject(best=True))
    assert "| after step 75, the best (this model) | 90.0 % |" in card
    assert "| after step 100 | 81.2 % |" in card
    assert "accuracy is on average too high" in card
    assert metadata(card)[0]["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.9
    assert "too high" not in model_card(subject())
    for after, chance in ((RESULT, True), (RESULT | {"value": 0.2, "low": 0.1, "high": 0.3}, False)):
        card = model_card(subject(summary=SUMMARY | {"accuracy_after": after}))
        assert ("may be chance" in card) == chance


def page(card):
    """The page as a browser shows it: its tokens."""
    tokens = MarkdownIt("commonmark").enable("table").parse(metadata(card)[1])
    return [part for token in tokens for part in (token, *(token.children or []))]


@pytest.mark.parametrize("merge", [None, Merge("float32", 0.1, 2.0, 3)])
@pytest.mark.parametrize("on_the_hub", [False, True])
def test_no_name_and_no_setting_can_break_the_page(on_the_hub, merge):
    """The page is built as that of a run with harmless names is; only what code says differs."""

    def card(text):
        overrides = [f"task.{key}={json.dumps(text + '```')}" for key in ("prompt_template", "system_prompt")]
        overrides += [f"rollout.stop={json.dumps([text])}", f"model.revision={json.dumps(text)}"]
        about = {"device_name": text, "versions": {"torch": text}, "data_revision": text, "passed": text}
        return model_card(
            subject(
                *overrides,
                name=text,
                base=Base(text, text if on_the_hub else None),
                environment=ENVIRONMENT | about,
                adapter=ADAPTER | {"target_modules": text},
                prompt=text + "\n````\n# Owned\n" + "x" * 200,
                merge=merge,
            )
        )

    hostile, calm = card(HOSTILE), card("x")
    tokens, expected = page(hostile), page(calm)
    assert [token.type for token in tokens] == [token.type for token in expected]
    plain = [
        [token.content for token in each if token.type == "text" and token.content]
        for each in (tokens, expected)
    ]
    assert plain[0] == plain[1]
    assert "\x1b" not in hostile and "\u202e" not in hostile
    data = metadata(hostile)[0]
    assert "\n" not in data["model-index"][0]["name"] and data["tags"] == metadata(calm)[0]["tags"]
    fences = [token for token in tokens if token.type == "fence"]
    assert [token.info for token in fences] == ["python", "text", "yaml", "bibtex"]
    compile(fences[0].content, "README.md", "exec")
    assert yaml.safe_load(fences[2].content)["task"]["name"] == "svamp"


def test_an_algorithms_own_title_summary_and_file_cannot_break_the_page(monkeypatch):
    """They come from a file of the user's; unlike names they are text of the page, not code."""

    def card(text, *overrides):
        kind = shipped()["grpo"]
        for name in ("title", "summary", "citation"):
            monkeypatch.setattr(kind, name, text)
        return model_card(subject("algorithm.name=grpo", *overrides))

    for text in (
        HOSTILE,
        "- a",
        "1. a",
        "# a",
        "| a |",
        "<b>",
        "&lt;",
        "~~a~~",
        "$a$",
        "\\",
        "![x](y)",
        "_a_ __b__",
    ):
        tokens, expected = page(card(text)), page(card("x"))
        assert [token.type for token in tokens if token.type not in ("text", "text_special")] == [
            token.type for token in expected if token.type not in ("text", "text_special")
        ], text
        shown = "".join(token.content for token in tokens if token.type in ("text", "text_special"))
        assert " ".join(text.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").split()) in shown
    file = "algorithm.file=secret-client/mine.py:MyRule"
    text = model_card(subject("algorithm.name=MyRule", file, "algorithm.power=2"))
    assert "secret-client" not in text and "trained by reinforcement learning with MyRule on" in text
    (settings,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(settings)["algorithm"] == {"name": "MyRule", "file": "mine.py:MyRule", "power": 2}


@pytest.mark.parametrize("text", ["`", "``", "a`", "", " ", "a\nb", "`a` b``"])
def test_code_is_one_piece_of_code(text):
    (paragraph,) = [t for t in MarkdownIt().parse(f"x {code(text)} y") if t.type == "inline"]
    assert [child.type for child in paragraph.children] == ["text", "code_inline", "text"]
    assert paragraph.children[1].content.strip() == " ".join(text.split())
    (block,) = MarkdownIt().parse(fenced(text, "text"))
    assert block.content == text + "\n"


def test_neither_secrets_nor_paths_are_public():
    secrets = [
        "hf_abcdefghijklmnopqrst",
        "sk-proj-abcdefghijklmnop",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    ]
    secrets += ["AKIAABCDEFGHIJKLMNOP", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"]
    for secret in secrets:
        assert public(f"use {secret}, please") == "use (removed), please"
    assert public("https://ann:pass@example.org/x") == "https://(removed)@example.org/x"
    assert public({"HF_TOKEN": "x", "max_tokens": 3, "a": [{"password": "y"}]}) == {
        "HF_TOKEN": "(removed)",
        "max_tokens": 3,
        "a": [{"password": "(removed)"}],
    }
    for path in ("/home/ann/w/x.py", "~/w/x.py", "../w/x.py", "C:\\Users\\ann\\x.py", "\\\\host\\ann\\x.py"):
        assert public(path) == "x.py"
    for path in ("/home/ann/w/x.py", "~/w/ann/x.py", "C:\\Users\\ann\\x.py"):
        assert public(f"read {path}, then\ngo on") == "read .../x.py, then\ngo on"
    for text in (
        "<think>3/4 and a/b</think>",
        "km/h",
        "https://example.org/a/b",
        "Qwen/Qwen2-1.5B",
        "1 // 2",
    ):
        assert public(text) == text
    overrides = ["task.path=/home/ann/w/data.jsonl", "task.reward_file=/home/ann/w/rewards.py:exact"]
    overrides += ["task.name=custom", "model.adapter=runs/secret-client/adapter"]
    overrides += ["task.chat_template_kwargs={api_key: abc, note: hf_abcdefghijklmnop}"]
    card = model_card(subject(*overrides, base=Base("mine")))
    for text in ("ann/w", "secret-client", "abc", "hf_"):
        assert text not in card.replace("ann/better", "").replace(ENVIRONMENT["model_revision"], ""), text
    for text in ("path: data.jsonl", "reward_file: rewards.py:exact", "adapter: adapter", "earlier adapter"):
        assert text in card


@pytest.mark.parametrize("merged", [False, True])
def test_nothing_of_this_machine_is_in_an_export(merged, trained, base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    folder = export_run(trained.folder, tmp_path / "shared", ExportOptions(merged=merged)).folder
    for path in folder.iterdir():
        content = path.read_bytes()
        for place in (base, base.parent, trained.folder, trained.folder.parent, tmp_path, Path.home(), ROOT):
            assert str(place).encode() not in content or str(place) == "/", path
        assert b"hf_abc" not in content
    if not merged:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] is None
        config = json.loads((trained.folder / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base), "the run's own stays as it was"


def test_the_base_is_named_as_others_find_it(run, base, tmp_path):
    number = iter(range(99))

    def exported(given=None, **options):
        done = export_run(run, tmp_path / f"out{next(number)}", ExportOptions(base_model=given, **options))
        path = done.folder / "adapter_config.json"
        return done.base, json.loads(path.read_text())["base_model_name_or_path"] if path.exists() else None

    config, environment = run / "adapter" / "adapter_config.json", run / "environment.json"
    assert exported() == (Base("mine"), None)
    assert exported("ann/mine-1B") == (Base("ann/mine-1B", "ann/mine-1B"), "ann/mine-1B")
    moved = shutil.copytree(base, tmp_path / "moved")
    assert exported(str(moved)) == (Base("moved"), None)
    given = export._read(run, False)
    # A folder elsewhere may have the name of a model on the Hub: a commit decides.
    edit(config, base_model_name_or_path="models/mine")
    given = export._read(run, False)
    assert export._locate_base(given, None).base == Base("mine")
    edit(environment, model_revision="0123abc")
    given = export._read(run, False)
    assert export._locate_base(given, None) == export._Located(
        Base("models/mine", "models/mine"), "models/mine"
    )
    assert export._base_settings(given, "models/mine").revision == "0123abc"
    assert export._base_settings(given, "other/model").revision is None
    edit(config, base_model_name_or_path="tiny-arithmetic")
    assert exported() == (Base("tiny-arithmetic", embedded=True), "tiny-arithmetic")
    edit(config, base_model_name_or_path=None)
    with pytest.raises(UserError, match="^--base-model: .*passed from Python"):
        exported()
    for wrong in ("/no/such/folder", "a/b/c", "bad name", "../x"):
        with pytest.raises(UserError, match="^--base-model: .*neither"):
            exported(wrong)


def test_the_licence_is_the_one_that_the_base_names(run, base, tmp_path):
    own = Path(shutil.copytree(base, tmp_path / "base"))
    edit(run / "adapter" / "adapter_config.json", base_model_name_or_path=str(own))
    cards = {None: None, "license: mit": "mit", "license: other": None, "license: [a, b]": None, "x: [": None}
    for number, (text, expected) in enumerate(cards.items()):
        if text is not None:
            (own / "README.md").write_text(f"---\n{text}\n---\n")
        folder = export_run(run, tmp_path / str(number), ExportOptions(merged=True)).folder
        assert metadata((folder / "README.md").read_text())[0].get("license") == expected
    (own / "README.md").write_text("---\nlicense: mit\n---\n")
    folder = export_run(run, tmp_path / "adapter").folder
    assert "license" not in metadata((folder / "README.md").read_text())[0], "that is for its author to say"


def test_prompts_are_shown_as_the_model_saw_them(run, tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    folder = export_run(run, tmp_path / "chat", ExportOptions(tokenizer=tokenizer)).folder
    text = (folder / "README.md").read_text()
    assert "```text\n<user>...<answer>\n```" in text
    assert "tokenizer('<user>...<answer>', return_tensors=\"pt\", add_special_tokens=False)" in text
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    config = run / "config.yaml"
    values = yaml.safe_load(config.read_text())
    values["task"] |= {"name": "svamp", "system_prompt": "Be brief.", "chat": "never"}
    config.write_text(yaml.safe_dump(values))
    prompt = export._prompt(twig.load_settings(str(run)), tokenizer)
    assert prompt.text.startswith("Be brief.\n\nSolve the problem.") and "Ann has 3 apples" in prompt.text
    assert not prompt.chat
    values["task"] |= {"prompt_template": "{Body} {question} {{x}}", "system_prompt": None}
    config.write_text(yaml.safe_dump(values))
    prompt = export._prompt(twig.load_settings(str(run)), tokenizer)
    assert prompt.text.startswith("... Ann has 3") and prompt.text.endswith("{x}")


def test_every_algorithm_is_described_and_the_citations_are_the_projects():
    for name, algorithm in shipped().items():
        card = model_card(subject(f"algorithm.name={name}"))
        assert f"{algorithm.title}: {algorithm.summary}." in card
        assert PAPER in card and (algorithm.citation or PAPER) in card
        others = {other.citation for other in shipped().values()} - {None, algorithm.citation}
        assert not [entry for entry in others if entry in card]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = citation["references"]
    for value in (citation["title"], citation["license"], citation["authors"][0]["name"]):
        assert value in SOFTWARE
    for value in (
        paper["title"],
        str(paper["year"]),
        *(author["family-names"] for author in paper["authors"]),
    ):
        assert value in PAPER
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in PAPER
    assert f"version = {{{citation['version']}}}" in model_card(subject())


# Whole or not at all


class Heard(Progress):
    def __init__(self):
        self.phases, self.messages = [], []

    def phase(self, name, total=None):
        self.phases.append(name)

    def message(self, text):
        self.messages.append(text)


def test_a_target_that_is_not_empty_is_refused_and_an_empty_one_is_filled(run, tmp_path):
    target = tmp_path / "out" / "shared"
    target.mkdir(parents=True)
    heard = Heard()
    assert export_run(run, target, ExportOptions(merged=True), progress=heard).folder == target
    assert heard.phases == ["loading", "merging", "writing", "checking"]
    assert heard.messages == [
        "the card names no base on the Hub, only mine; add --base-model ID if it has one"
    ]
    assert names(target.parent) == ["shared"]
    before = checksums(target)
    for options in (ExportOptions(), ExportOptions(merged=True)):
        with pytest.raises(UserError, match="^--output: .*shared is not empty"):
            export_run(run, target, options)
    file = tmp_path / "file"
    file.write_text("mine")
    for wrong in (file, file / "below"):
        with pytest.raises(UserError, match="^--output: "):
            export_run(run, wrong)
    assert checksums(target) == before and file.read_text() == "mine"


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device"), "safetensors"])
@pytest.mark.parametrize("merged", [False, True])
def test_nothing_half_is_left(fault, merged, run, tmp_path, monkeypatch):
    if fault == "safetensors":
        fault = export.SafetensorError("I/O error: No space left on device")

    def fail(subject):
        assert [path.suffix for path in tmp_path.iterdir()].count(".tmp") == 1
        raise fault

    monkeypatch.setattr(export, "model_card", fail)
    expected = KeyboardInterrupt if fault is KeyboardInterrupt else UserError
    with pytest.raises(expected) as raised:
        export_run(run, tmp_path / "shared", ExportOptions(merged=merged))
    assert expected is KeyboardInterrupt or "No space left on device" in str(raised.value)
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_line_stops_at_once_and_leaves_nothing(number, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "model_card", lambda subject: signal.raise_signal(number))
    assert main(["export", str(run), "--output", str(tmp_path / "shared")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "twig: stopped"
    assert names(tmp_path) == ["run"]


def test_files_are_for_everyone_to_read(run, tmp_path):
    folder = export_run(run, tmp_path / "shared", ExportOptions(merged=True)).folder
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_command_line_says_what_it_wrote(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run", "--merged", "--best"]) == 0
    shown, said = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert lines["folder"] == "exports/run-best-merged" and lines["form"] == "merged model"
    assert lines["base"] == "mine" and re.fullmatch(r"logits .* at most \S+ \(float32\)", lines["exact"])
    assert "merging ..." in said
    assert main(["export", "run", "--adapter"]) == 0
    assert "form     adapter" in capsys.readouterr().out


def spoil(name):
    def stopped(run):
        edit(run / "summary.json", status="stopped")

    def killed(run):
        (run / "summary.json").unlink()

    def no_checkpoint(run):
        stopped(run)
        shutil.rmtree(run / "checkpoints")

    def old(run):
        (run / "summary.json").write_text('{"status": "finished"}')

    def no_adapter(run):
        shutil.rmtree(run / "adapter")

    def never_evaluated(run):
        edit(run / "summary.json", accuracy_best=None)

    def torn(run):
        path = run / "adapter" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-50])

    def no_config(run):
        (run / "adapter" / "adapter_config.json").write_text("{")

    def base_gone(run):
        edit(run / "adapter" / "adapter_config.json", base_model_name_or_path="/no/such/folder")

    return locals()[name]


@pytest.mark.parametrize(
    "spoiled, arguments, says",
    [
        ("no_checkpoint", "", ["stopped, not finished", "--resume, or pass --best"]),
        ("old", "", ["summary.json"]),
        ("no_adapter", "", ["adapter_model.safetensors", "--resume"]),
        ("never_evaluated", "--best", ["--best: ", "Leave out --best"]),
        ("torn", "", ["adapter_model.safetensors: damaged"]),
        ("torn", "--merged", ["adapter_model.safetensors"]),
        ("no_config", "", ["adapter_config.json: cannot be read"]),
        ("base_gone", "", ["/no/such/folder is not a folder"]),
        (None, "--public", ["--public", "--push USER/NAME"]),
        (None, "--push nobody", ["--push: nobody", "USER/nobody"]),
        (None, "--push a/b/c", ["--push: a/b/c is not a name"]),
        (None, "--push ann/x..y", ["--push: ann/x..y is not a name"]),
        (None, "--push ann/x", ["HF_HUB_OFFLINE is set"]),
        (None, "--base-model a/b/c", ["--base-model: a/b/c"]),
    ],
)
def test_what_cannot_be_exported_is_one_line(spoiled, arguments, says, run, tmp_path, capsys):
    if spoiled:
        spoil(spoiled)(run)
    assert main(["export", str(run), "--output", str(tmp_path / "shared"), *arguments.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("twig: ") and "fault in Twig" not in last
    for text in says:
        assert text in last
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("ended", ["stopped", "killed"])
def test_a_run_that_is_not_finished_is_exported_from_its_newest_checkpoint(ended, trained, run, tmp_path):
    for name in ("adapter", "adapter-best"):  # the weights and their shape are in the checkpoint alone
        shutil.rmtree(run / name)
    spoil(ended)(run)
    folder = export_run(run, tmp_path / "shared").folder
    both = (trained.folder / "adapter", folder)
    saved, written = (load_file(each / "adapter_model.safetensors") for each in both)
    assert saved.keys() == written.keys() and all(torch.equal(saved[key], written[key]) for key in saved)
    own, config = (json.loads((each / "adapter_config.json").read_text()) for each in both)
    for key in ("r", "lora_alpha", "target_modules", "layers_to_transform", "task_type", "bias"):
        assert own[key] == config[key]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "- steps: 2 (the run was not finished)" in card


def test_a_stopped_runs_best_adapter_can_be_exported(run, tmp_path):
    spoil("stopped")(run)
    folder = export_run(run, tmp_path / "shared", ExportOptions(best=True)).folder
    best = run / "adapter-best" / "adapter_model.safetensors"
    assert (folder / "adapter_model.safetensors").read_bytes() == best.read_bytes()


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert "no run (it has no config.yaml)" in capsys.readouterr().err


def test_a_quantised_base_is_not_merged_into(run, base, tmp_path):
    own = Path(shutil.copytree(base, tmp_path / "base"))
    edit(own / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    edit(run / "adapter" / "adapter_config.json", base_model_name_or_path=str(own))
    with pytest.raises(UserError, match="^--merged: .* is quantised.* --base-model "):
        export_run(run, tmp_path / "merged", ExportOptions(merged=True))
    assert export_run(run, tmp_path / "adapter").folder.is_dir()
    options = ExportOptions(merged=True, base_model=str(base))
    assert export_run(run, tmp_path / "merged", options).base == Base("mine")


def test_a_merge_that_does_something_else_is_refused(tmp_path):
    """Added to a head that is the embedding, an adapter of the head changes what goes in as well."""
    base = save_family(tmp_path / "base", "qwen2", tied=True)
    done = train(base, tmp_path / "run")
    export_run(done.folder, tmp_path / "before", ExportOptions(merged=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["lm_head"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of it
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(done.folder / "adapter", save_embedding_layers=False)
    with pytest.raises(UserError, match="^--merged: the merged model differs .* of what the adapter does"):
        export_run(done.folder, tmp_path / "merged", ExportOptions(merged=True))
    assert not (tmp_path / "merged").exists()


def test_a_merge_out_of_range_is_refused(tmp_path):
    base = save_family(tmp_path / "base", "llama", tied=False, dtype=torch.float16)
    done = train(base, tmp_path / "run", "model.dtype=float16", "train.max_steps=1")
    weights = done.folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    for tensor in tensors.values():
        tensor.fill_(300.0)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="^--merged: .* leaves the range of torch.float16"):
        export_run(done.folder, tmp_path / "merged", ExportOptions(merged=True))


# To the Hub


class FakeApi:
    """What is asked of the Hub; `fault` is raised by the call of that name."""

    calls, fault, private = [], {}, True

    def __init__(self, **kwargs):
        assert kwargs == {"library_name": "twig", "library_version": twig.__version__}

    def _answer(self, call, **kwargs):
        FakeApi.calls.append((call, kwargs))
        if call in FakeApi.fault:
            raise FakeApi.fault[call]

    def create_repo(self, repo_id, *, private, exist_ok):
        self._answer("create_repo", repo_id=repo_id, private=private, exist_ok=exist_ok)
        return f"https://hub.example/{repo_id}"

    def model_info(self, repo_id):
        self._answer("model_info", repo_id=repo_id)
        return type("Info", (), {"private": FakeApi.private})

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self._answer("upload_folder", repo_id=repo_id, files=names(folder_path))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "fault", {})
    monkeypatch.setattr(FakeApi, "private", True)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    return FakeApi


def test_a_push_is_private_unless_public_is_asked_for(hub, run, tmp_path):
    heard = Heard()
    done = export_run(run, tmp_path / "a", push=Push("ann/better"), progress=heard)
    assert [call for call, _ in hub.calls] == ["create_repo", "model_info", "upload_folder"]
    assert hub.calls[0][1] == {"repo_id": "ann/better", "private": True, "exist_ok": True}
    assert hub.calls[2][1] == {"repo_id": "ann/better", "files": names(tmp_path / "a")}
    assert done.url == "https://hub.example/ann/better"
    assert heard.phases[-1] == "uploading" and "MiB to ann/better" in heard.messages[-1]
    assert "from_pretrained(model, 'ann/better')" in (tmp_path / "a" / "README.md").read_text()
    hub.calls.clear()
    export_run(run, tmp_path / "b", push=Push("ann/better", public=True))
    assert hub.calls[0][1]["private"] is False and hub.calls[-1][0] == "upload_folder"


def test_a_public_repository_gets_nothing_unless_public_is_asked_for(hub, run, tmp_path):
    hub.private = False
    with pytest.raises(UserError, match="^--push: ann/better is public.* --public"):
        export_run(run, tmp_path / "a", push=Push("ann/better"))
    assert "upload_folder" not in [call for call, _ in hub.calls]
    assert (tmp_path / "a" / "README.md").is_file()


def http(status, kind=errors.HfHubHTTPError, said=None):
    """An answer of the Hub as the library raises it."""
    library = importlib.import_module(errors.Response.__module__.partition(".")[0])
    request = library.Request("POST", "https://hub.example/api/repos/create?key=hf_secret")
    response = errors.Response(status, request=request)
    return kind(
        f"{status} Client Error for url https://x/y?token=1\nmore", response=response, server_message=said
    )


def unreachable():
    library = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]
    return library.ConnectError("[Errno -2] Name or service not known")


@pytest.mark.parametrize(
    "call, fault, says",
    [
        ("create_repo", http(401), "does not accept the token; "),
        ("create_repo", http(403), "the token may not write there"),
        ("upload_folder", http(403), "the token may not write there"),
        ("create_repo", http(404, errors.RepositoryNotFoundError), "the Hub answers 404"),
        (
            "upload_folder",
            http(400, errors.BadRequestError, "bad metadata\nin it"),
            "400 (bad metadata in it)",
        ),
        ("upload_folder", http(500), "the Hub answers 500"),
        ("create_repo", unreachable(), "the Hub is not reachable (ConnectError"),
        ("upload_folder", TimeoutError("timed out"), "the Hub is not reachable (TimeoutError"),
        ("create_repo", errors.OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        ("create_repo", errors.LocalTokenNotFoundError("none"), "does not accept the token"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value)[:20],
)
def test_what_goes_wrong_on_the_hub_is_one_line(call, fault, says, hub, run, tmp_path, capsys):
    hub.fault = {call: fault}
    target = tmp_path / "shared"
    assert main(["export", str(run), "--output", str(target), "--push", "ann/better"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("twig: --push: ann/better: ") and says in last
    assert f" hf upload ann/better {target} --private" in last
    assert "token=" not in last and "hf_" not in last
    assert (target / "README.md").is_file()
    with pytest.raises(UserError) as raised:
        push_folder(target, Push("ann/better"), Progress())
    assert "\n" not in str(raised.value)


def test_without_a_token_nothing_is_written(hub, run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="^--push: .*no token .*hf auth login"):
        export_run(run, tmp_path / "shared", push=Push("ann/better"))
    assert names(tmp_path) == ["run"] and hub.calls == []


# Adapters in run folders


def evaluations(monkeypatch, right):
    """Every evaluation gives the next of `right`, of ten problems."""
    left = iter(right)

    def evaluate(*args, **kwargs):
        number = next(left)
        return Evaluation(number / 10, *wilson(number, 10), 10, None, None, None, 5.0, 0.0), []

    monkeypatch.setattr("twig.training.session.evaluate_policy", evaluate)


@pytest.mark.parametrize(
    "right, best",
    [
        ([9, 2, 5, 5, 3], 2),
        ([0, 4, 4, 4, 4], 1),
        ([0, 1, 2, 3, 7], 4),
        ([0, 0, 0, 0, 0], 1),
        ([9, 1, 6, 2, 6], 2),
    ],
)
def test_the_best_adapter_is_the_earliest_of_the_best_evaluated(right, best, base, tmp_path, monkeypatch):
    """The first number is that before training, of which there is no adapter."""
    evaluations(monkeypatch, right)
    seen = {}

    class Keep(Progress):
        def evaluation(self, when, result):
            seen[when] = {n: p.detach().clone() for n, p in session.policy.parameters.items()}

    from twig.training import train as loop

    class Session(loop.Session):
        def __init__(self, *args):
            nonlocal session
            session = self
            super().__init__(*args)

    session = None
    monkeypatch.setattr(loop, "Session", Session)
    done = train(base, tmp_path / "run", "train.max_steps=4", "eval.steps=1", progress=Keep())
    summary = read_summary(done.folder)
    assert summary["accuracy_best"]["step"] == best
    assert summary["accuracy_best"]["value"] == right[best] / 10
    saved = load_file(done.folder / "adapter-best" / "adapter_model.safetensors")
    expected = seen["after" if best == 4 else f"step {best}"]
    assert {n.replace(".default", "") for n in expected} == set(saved)
    assert all(torch.equal(saved[n.replace(".default", "")], p) for n, p in expected.items())
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), done.folder / "adapter-best"
    )
    if best == 4:
        assert torch.equal(logits(loaded), logits(done.model))
    else:
        assert not torch.equal(logits(loaded), logits(done.model))


def test_a_saved_adapter_has_no_page_with_paths(trained):
    for name in ("adapter", "adapter-best"):
        assert names(trained.folder / name) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def odd(base, tmp_path_factory):
    """An adapter of another shape than the settings' defaults, random."""
    folder = tmp_path_factory.mktemp("odd")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=5,
        target_modules=["o_proj", "k_proj"],
        layers_to_transform=[0, 2],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


SAME_SHAPE = ["lora.r=3", "lora.alpha=5", "lora.target_modules=[k_proj,o_proj]"]


@pytest.mark.parametrize("overrides", [[], SAME_SHAPE])
def test_training_starts_from_an_adapter_of_any_shape(overrides, odd, base, tmp_path, monkeypatch):
    before = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), odd))
    files = checksums(odd)
    still = train(
        base,
        tmp_path / "still",
        f"model.adapter={odd}",
        *overrides,
        reward_funcs=lambda prompts, **k: [1.0 for _ in prompts],
    )
    assert torch.equal(logits(still.model), before), (
        "equal rewards change nothing: it begins where the adapter is"
    )
    done = train(base, tmp_path / "run", f"model.adapter={odd}", *overrides)
    assert not torch.allclose(logits(done.model), before)
    config = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (3, 5, [0, 2])
    assert sorted(config["target_modules"]) == ["k_proj", "o_proj"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), done.folder / "adapter")
    assert torch.equal(logits(loaded), logits(done.model))
    assert checksums(odd) == files
    card = (export_run(done.folder, tmp_path / "shared").folder / "README.md").read_text()
    assert "`rank 3, alpha 5, k_proj, o_proj of layers 0, 2`" in card and "earlier adapter" in card


def test_the_kl_term_of_a_run_from_an_adapter_refers_to_that_adapter(odd, base, tmp_path):
    """As TRL's: the policy is its reference at the first step, and leaves it."""
    words = ["algorithm.name=grpo", "algorithm.beta=0.1", f"model.adapter={odd}"]
    done = train(base, tmp_path / "run", *words)
    first, second = (row["kl"] for row in read_metrics(done.folder))
    assert abs(first) < 1e-7 < 1e-5 < second


@pytest.mark.parametrize("evaluated", [False, True])
def test_dropout_that_an_adapter_was_trained_with_is_off_and_noted(evaluated, odd, base, tmp_path):
    class Heard(Progress):
        def __init__(self):
            self.lines = []

        def message(self, text):
            self.lines.append(text)

    heard = Heard()
    dropped = Path(shutil.copytree(odd, tmp_path / "dropped"))
    edit(dropped / "adapter_config.json", lora_dropout=0.5)
    if evaluated:
        values = {"model": {"name": str(base), "adapter": str(dropped)}, "task": {"name": "multiplication"}}
        words = ["eval.limit=1", "rollout.max_completion_length=4"]
        measure_model(Settings.from_dict(values, words), None, heard)
    else:
        done = train(base, tmp_path / "run", f"model.adapter={dropped}", progress=heard)
        again = train(base, tmp_path / "again", f"model.adapter={odd}")
        assert checksums(done.folder / "adapter") == checksums(again.folder / "adapter")
    notes = [line for line in heard.lines if line.startswith(f"note: {dropped}")]
    assert len(notes) == 1 and "lora_dropout=0.5" in notes[0]


@pytest.mark.parametrize(
    "word, says",
    [
        ("lora.r=4", "lora.r: 4 here, but 3 in"),
        ("lora.alpha=7", "lora.alpha: 7.0 here, but 5 in"),
        (
            "lora.target_modules=[q_proj]",
            r"lora.target_modules: \['q_proj'\] here, but \['k_proj', 'o_proj'\]",
        ),
        ("lora.layers=all", r"lora.layers: all here, but \[0, 2\]"),
        ("lora.layers=[2]", r"lora.layers: \[2\] here, but \[0, 2\]"),
    ],
)
def test_a_setting_that_asks_for_another_shape_is_refused(word, says, odd, base, tmp_path):
    with pytest.raises(UserError, match=f"^{says}"):
        train(base, tmp_path / "run", f"model.adapter={odd}", word)


def test_an_adapter_that_is_missing_or_of_another_model_is_one_line(odd, tmp_path):
    with pytest.raises(UserError, match="^model.adapter: .*nowhere holds no LoRA adapter"):
        train(save_model(tmp_path / "base"), tmp_path / "a", f"model.adapter={tmp_path / 'nowhere'}")
    other = save_family(tmp_path / "other", "llama", tied=False)
    with pytest.raises(UserError, match="^model.adapter: .* does not fit the model .*model.name"):
        train(other, tmp_path / "b", f"model.adapter={odd}")
