"""Runs GRPO scripts of TRL's repository and documentation with Twig, unchanged but for the import.

    python scripts/trl_scripts.py FOLDER

FOLDER holds the scripts below as TRL's repository has them, each at its commit:
`git -C TRL show COMMIT:PATH > FOLDER/PATH`. Of a page, its first block of Python that trains is taken; of the
trainer's own file, the example in its documentation. Models and data are stand-ins under the names that the
scripts load, in a Hub cache that is made for the check; no network is used. The check fails if fewer than 8
scripts run to their end.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LEAST = 8
HASH = "0" * 40  # of every stand-in


@dataclass(frozen=True)
class Script:
    """A script at its commit, and the arguments that it is started with.

    `module` is what its import of TRL becomes: a script without `peft_config` asks for an adapter.
    """

    path: str
    commit: str
    arguments: str = ""
    module: str = "twig.trl"


_CLI = (
    "--model_name_or_path Qwen/Qwen3-0.6B --output_dir out --use_peft --max_steps 2 "
    "--max_completion_length 16 "
)
SCRIPTS = (
    Script(
        "trl/scripts/grpo.py",
        "v1.16.0",
        _CLI + "--dataset_name trl-lib/DeepMath-103K --reward_funcs accuracy_reward think_format_reward "
        "--lora_target_modules all-linear --eval_strategy no",
    ),
    Script(
        "examples/scripts/grpo_continuous_batching.py",
        "2e3b6fbce27b851fdc853118f67495f579b44aed",
        _CLI + "--num_generations 8 --log_completions",
    ),
    Script("examples/scripts/grpo_tldr.py", "6cf30b257c3b70299dcee99d698acfb1977c6afd"),
    Script("docs/source/lora_without_regret.md", "01892a27c9075041d947e98b1b74806aebedc2f5"),
    Script(
        "docs/source/grpo_trainer.md",
        "9057793fd19e6a5ef3f5f93e3569d9985399294d",
        module="twig.trl.with_lora",
    ),
    Script(
        "docs/source/vllm_integration.md",
        "01a3e7020e9e23f9c3081070fe04c565b16013f0",
        module="twig.trl.with_lora",
    ),
    Script("README.md", "v1.16.0", module="twig.trl.with_lora"),
    Script("trl/trainer/grpo_trainer.py", "v1.16.0", module="twig.trl.with_lora"),
)
MODELS = (
    "Qwen/Qwen2-0.5B-Instruct",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-14B",
)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# A tracker that a script reports to, and that is not installed.
TRACKIO = """
class _Run:
    def log(self, row, step=None): pass
    def finish(self): pass
def init(**options): return _Run()
"""


def main() -> int:
    """Runs every script and prints how each ended; returns 1 if too few ran to their end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="scripts as TRL's repository has them")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        make_stand_ins(home)
        ended = [_ends(script, folder, home) for script in SCRIPTS]
    print(f"{sum(ended)} of {len(SCRIPTS)} scripts ran to their end; at least {LEAST} are required")
    return 0 if sum(ended) >= LEAST else 1


def _ends(script: Script, folder: Path, home: Path) -> bool:
    """Runs a script in a folder of its own; returns whether it came to its end and left a finished run."""
    source = folder / script.path
    if not source.is_file():
        print(f"missing  {script.path}: git show {script.commit}:{script.path} > {source}")
        return False
    work = home / "work" / script.path.replace("/", "-")
    work.mkdir(parents=True)
    (work / "script.py").write_text(changed(source.read_text(encoding="utf-8"), script), encoding="utf-8")
    environ = os.environ | {
        "HF_HOME": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(home / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "script.py", *script.arguments.split()]
    done = subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True)
    summaries = [json.loads(path.read_text()) for path in work.glob("*/summary.json")]
    finished = done.returncode == 0 and [each["status"] for each in summaries] == ["finished"]
    steps = f"{summaries[0]['steps']} steps" if finished else done.stderr.strip().splitlines()[-1:]
    print(f"{'ran' if finished else 'FAILED':8} {script.path} ({script.module}): {steps}", flush=True)
    return finished


def changed(text: str, script: Script) -> str:
    """Returns a script, or the first block of a page or docstring that trains, with another import."""
    if ">>> trainer = GRPOTrainer(" in text:
        block = next(
            each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if ">>> trainer" in each
        )
        text = re.sub(r"^ *(>>>|\.\.\.) ?", "", block, flags=re.MULTILINE)
    if script.path.endswith(".md"):
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        text = next(block for block in blocks if "GRPOTrainer(" in block and ".train()" in block)
    return re.sub(r"^(\s*)from trl import", rf"\1from {script.module} import", text, flags=re.MULTILINE)


# ---- stand-ins ---------------------------------------------------------------------------------------------


def make_stand_ins(home: Path) -> None:
    """Writes a Hub cache with models and data, and a module for the tracker, below `home`."""
    _make_models(home / "hub" / "hub")
    solved = [{"prompt": _chat(f"{i} + {i}?"), "solution": f"${2 * i}$"} for i in range(8)]
    asked = [{"question": f"{i} and 2?", "answer": f"They are #### {i + 2}"} for i in range(8)]
    texts = [{"prompt": f"POST: {i}. TL;DR:", "completion": " short"} for i in range(128)]
    data = home / "hub" / "datasets"
    _make_data(data, "trl-lib/DeepMath-103K", {"train": solved, "test": solved})
    _make_data(data, "HuggingFaceH4/OpenR1-Math-220k-default-verified", {"train": solved})
    _make_data(data, "openai/gsm8k", {"train": asked, "test": asked}, "main")
    _make_data(data, "trl-lib/tldr", {"train": texts})
    (home / "modules").mkdir()
    (home / "modules" / "trackio.py").write_text(TRACKIO)


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _make_models(cache: Path) -> None:
    """Writes one random model of a few thousand weights under every name."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # the first entry of every hidden state is large, and speaks for the end
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight[1, 0] = 1.4
    for name in MODELS:
        folder = cache / f"models--{name.replace('/', '--')}"
        model.save_pretrained(folder / "snapshots" / HASH)
        tokenizer.save_pretrained(folder / "snapshots" / HASH)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(HASH)


def _make_data(cache: Path, name: str, splits: dict[str, list[dict]], config: str = "default") -> None:
    """Writes a data set as `datasets` keeps one that it has loaded from the Hub."""
    from datasets import Dataset, DatasetInfo
    from datasets.arrow_writer import ArrowWriter
    from datasets.naming import camelcase_to_snakecase
    from datasets.splits import SplitDict, SplitInfo

    owner, _, short = name.partition("/")
    stem = camelcase_to_snakecase(short)
    folder = cache / f"{owner}___{stem}" / config / "0.0.0" / HASH
    folder.mkdir(parents=True)
    infos, features = SplitDict(dataset_name=short), None
    for split, rows in splits.items():
        table = Dataset.from_list(rows)
        features = table.features
        writer = ArrowWriter(path=str(folder / f"{stem}-{split}.arrow"), features=features)
        for row in rows:
            writer.write(row)
        writer.finalize()
        infos.add(SplitInfo(name=split, num_examples=len(rows), dataset_name=short))
    info = DatasetInfo(
        features=features,
        splits=infos,
        builder_name="parquet",
        dataset_name=short,
        config_name=config,
        version="0.0.0",
    )
    info.write_to_directory(str(folder))


if __name__ == "__main__":
    sys.exit(main())
