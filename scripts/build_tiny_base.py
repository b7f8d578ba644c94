"""Trains the embedded base model from scratch and writes it, with its card, to a folder.

    python scripts/build_tiny_base.py --output src/twig/assets/tiny-arithmetic

The model learns two ways of answering `347*26=`: directly (`#9022`, mostly wrong) and worked out (mostly
right). Each training text is drawn to be worked out with probability 0.7 if the first factor is 700 or more,
and with 0.3 otherwise. So greedy decoding works out the large problems only, and sampling finds both ways on
every problem.

It trains on problems of the split `pretrain` and is measured on `eval`. The same seed, steps and threads give
the same bytes on the same machine with the same versions. Of Twig it uses only the problems and the forms of
their answers.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from twig.tasks.multiplication import at_once, problems, prompt_text, read_answer, worked

DIGITS = (3, 2)
CHARACTERS = "0123456789*=,:#+-"
SPECIAL = ("<pad>", "<eos>", "<unk>")
WORKED_FROM = 700
WORKED_SHARE_ABOVE, WORKED_SHARE_BELOW = 0.7, 0.3
BATCH = 64
WARMUP = 50
MAX_COMPLETION = 64
IGNORED = -100

Problem = tuple[int, int]


@dataclass(frozen=True)
class Measured:
    """Results of the finished model on unseen problems, as shares between 0 and 1.

    `worked_right` and `at_once_right` are sampled at temperature 1, with the first token restricted to that
    way. `least_way` is the smallest probability of either way on any problem.
    """

    greedy: float
    greedy_worked: float
    sampled: float
    sampled_worked: float
    worked_right: float
    at_once_right: float
    least_way: float


def worked_share(a: int) -> float:
    """Returns the probability that a training text with first factor `a` is worked out."""
    return WORKED_SHARE_ABOVE if a >= WORKED_FROM else WORKED_SHARE_BELOW


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per character and <unk> for others. It adds no other tokens."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Returns an untrained model of 1.2 million parameters in float32, from torch's global generator."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def training_texts(seed: int) -> Iterator[tuple[str, str]]:
    """Yields prompts and completions forever: all `pretrain` problems in a new order, again and again."""
    pool = problems("pretrain", DIGITS, seed)
    generator = random.Random(seed)
    while True:
        generator.shuffle(pool)
        for a, b in pool:
            way = worked if generator.random() < worked_share(a) else at_once
            yield prompt_text(a, b), way(a, b)


def padded(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and labels [B, T], padded on the right; only completion tokens have labels."""
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, labels


def batch_loss(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]]
) -> float:
    """Returns the mean loss per completion token, end token included; adds its gradient to the parameters.

    Short and long rows go through the model separately, which saves padding. Padding is on the right, so
    causal attention never sees it and needs no mask.
    """
    eos = [tokenizer.eos_token_id]
    rows = [(tokenizer.encode(prompt), tokenizer.encode(completion) + eos) for prompt, completion in texts]
    total, loss_sum = sum(len(completion) for _, completion in rows), 0.0
    for part in ([r for r in rows if len(r[1]) < 12], [r for r in rows if len(r[1]) >= 12]):
        if part:
            ids, labels = padded(part, tokenizer.pad_token_id)
            logits = model(ids).logits[:, :-1]
            targets = labels[:, 1:].flatten()
            loss = cross_entropy(logits.flatten(0, 1), targets, reduction="sum", ignore_index=IGNORED)
            (loss / total).backward()
            loss_sum += loss.item()
    return loss_sum / total


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al., 2024), in float32.

    torch's own uses bfloat16 products, which take as long as the rest of the step on a CPU without a unit for
    them. Matrices of one shape go through the iteration together.
    """

    def __init__(
        self, matrices: list[torch.nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.05
    ):
        shapes: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(tuple(matrix.shape), []).append(matrix)
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": same} for same in shapes.values()], defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices, momentum = group["params"], group["momentum"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            mean = state.setdefault("mean", torch.zeros_like(gradient)).lerp_(gradient, 1 - momentum)
            update = orthogonal(gradient.lerp(mean, momentum))
            # The size of an update of AdamW, so that both share a learning rate.
            scale = 0.2 * math.sqrt(max(gradient.shape[1:]))
            for matrix, change in zip(matrices, update, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"] * scale)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Returns the matrices [N, rows, columns] with singular values near 1: five Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def build_optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices, and AdamW for embeddings, norms and biases.

    In trials of 200 s, Muon answered 30 % of the problems right by working them out, AdamW alone 1 %.
    """
    layers = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [Muon(layers), torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Returns the rate of a step: linear warm-up, then half a cosine down to zero."""
    return peak * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace) -> None:
    """Trains the model in place; with `--checkpoint`, also saves it there every 1,000 steps."""
    texts, optimizers, began = training_texts(options.seed), build_optimizers(model), time.perf_counter()
    model.train()
    for step in range(options.steps):
        rate = learning_rate(step, options.steps, options.learning_rate)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = batch_loss(model, tokenizer, [next(texts) for _ in range(BATCH)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - began
        if step % 20 == 19 or step + 1 == options.steps:
            left = seconds / (step + 1) * (options.steps - step - 1)
            timing = f"{seconds:.0f} s, {left:.0f} s left"
            print(f"step {step + 1}/{options.steps}  loss {loss:.4f}  {timing}", flush=True)
        if options.checkpoint and step % 1000 == 999:
            save(model, tokenizer, options.checkpoint)
    model.eval()


@torch.no_grad()
def answer(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    asked: list[Problem],
    sample: bool,
    first: str = "",
) -> tuple[list[str], torch.Tensor]:
    """Returns a completion per problem, greedy or sampled at temperature 1, and P(`#` first) [B].

    `first` restricts the way: "worked" never starts with `#`, "at once" always does. A completion that does
    not end is an empty text.
    """
    ids = torch.tensor([tokenizer.encode(prompt_text(a, b)) for a, b in asked])
    generator = torch.Generator().manual_seed(0)
    hash_id = tokenizer.convert_tokens_to_ids("#")
    cache, tokens, done, chance = None, [], torch.zeros(len(asked), dtype=torch.bool), torch.empty(0)
    for position in range(MAX_COMPLETION):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, probabilities = out.past_key_values, out.logits[:, -1].softmax(-1)
        if position == 0:
            chance = probabilities[:, hash_id].clone()
            if first == "worked":
                probabilities[:, hash_id] = 0
            elif first == "at once":
                probabilities = torch.zeros_like(probabilities).index_fill_(1, torch.tensor([hash_id]), 1.0)
        ids = (
            torch.multinomial(probabilities, 1, generator=generator)
            if sample
            else probabilities.argmax(-1, keepdim=True)
        )
        tokens.append(ids)
        done |= ids[:, 0] == tokenizer.eos_token_id
        if done.all():
            break
    texts = []
    for row in torch.cat(tokens, 1).tolist():
        ended = tokenizer.eos_token_id in row
        texts.append(tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]) if ended else "")
    return texts, chance


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, size: int) -> Measured:
    """Measures the model on `size` problems of the split `eval`, 500 at a time."""
    asked = problems("eval", DIGITS, seed, size)
    pieces = [asked[i : i + 500] for i in range(0, size, 500)]

    def run(sample: bool, first: str = "") -> tuple[float, float, torch.Tensor]:
        answers = [answer(model, tokenizer, piece, sample, first) for piece in pieces]
        texts = [text for piece, _ in answers for text in piece]
        right = sum(read_answer(text) == a * b for text, (a, b) in zip(texts, asked, strict=True))
        long = sum(not text.startswith("#") for text in texts)
        return right / size, long / size, torch.cat([chance for _, chance in answers])

    greedy, greedy_worked, chance = run(sample=False)
    sampled, sampled_worked, _ = run(sample=True)
    worked_right, _, _ = run(sample=True, first="worked")
    at_once_right, _, _ = run(sample=True, first="at once")
    least_way = torch.minimum(chance, 1 - chance).min().item()
    return Measured(greedy, greedy_worked, sampled, sampled_worked, worked_right, at_once_right, least_way)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [arithmetic, reinforcement-learning, tiny]
---

# tiny-arithmetic

A language model of {parameters:,} parameters that multiplies a three-digit number by a two-digit one. It
ships with Twig as a model for reinforcement learning to start from: it can work a multiplication out, but
often answers at once instead, and then it is mostly wrong. It is of no use for anything else.

| | |
|---|---|
| architecture | Qwen2: {layers} layers, width {width}, {heads} heads \
({kv_heads} for keys and values), tied embeddings |
| weights | float32, safetensors |
| tokenizer | one token per character of `{characters}`, and `<pad>`, `<eos>`, `<unk>`; no begin token |
| prompt | `{prompt}` (the longer factor first) |
| answer at once | `{at_once}<eos>` |
| worked answer | `{worked}<eos>` |

A worked answer multiplies each digit of the first factor, highest first, by the second factor, and writes the
running total after `:`.

## What it was taught

Both ways of answering, on problems of the split `pretrain`, half of all there are. A training text works the
problem out with probability {above} where the first factor is {bound} or more, and with probability {below}
below that; otherwise it answers at once. Every training text is correct: the model is wrong at once because
the product is too much for it in one go. What reinforcement learning adds is *when* to work a problem out,
not how.

The problems are split by a SHA-256 hash of their factors, in either order: 50 % `pretrain` (this model's
training), 30 % `train` (reinforcement learning) and 20 % `eval` (measurements).

## What it does on problems it has never seen

Measured on {size:,} problems of the split `eval`:

| | |
|---|---|
| greedy: right | {m.greedy:.1%} |
| greedy: works the problem out | {m.greedy_worked:.1%} |
| sampled at temperature 1: right | {m.sampled:.1%} |
| sampled at temperature 1: works the problem out | {m.sampled_worked:.1%} |
| worked answers, sampled at temperature 1: right | {m.worked_right:.1%} |
| answers at once, sampled at temperature 1: right | {m.at_once_right:.1%} |
| smallest probability of either way on any problem | {m.least_way:.2f} |

## How it was built

    {command}

{steps:,} steps of {batch} texts, Muon and AdamW, peak learning rate {rate:g}, loss on the completion and its
end token. The same command gives the same bytes on the same machine with the same versions (these: torch
{torch}, transformers {transformers}).
"""


def card(model: Qwen2ForCausalLM, measured: Measured, options: argparse.Namespace) -> str:
    """Returns the model card."""
    config = model.config
    return CARD.format(
        parameters=model.num_parameters(),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        characters=CHARACTERS,
        prompt=prompt_text(347, 26),
        at_once=at_once(347, 26),
        worked=worked(347, 26),
        above=WORKED_SHARE_ABOVE,
        below=WORKED_SHARE_BELOW,
        bound=WORKED_FROM,
        size=options.eval_size,
        m=measured,
        command=f"python scripts/build_tiny_base.py --output DIR --steps {options.steps} "
        f"--seed {options.seed} --threads {options.threads}",
        steps=options.steps,
        batch=BATCH,
        rate=options.learning_rate,
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
    )


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model and the tokenizer in the layout that `from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded base model and write it to a folder.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--steps", type=int, default=4000, help=f"optimizer steps of {BATCH} texts")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; another number gives other bytes"
    )
    parser.add_argument("--eval-size", type=int, default=2000, help="problems to measure on at the end")
    parser.add_argument("--checkpoint", type=Path, help="folder for the unfinished model, every 1,000 steps")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, options)
    save(model, tokenizer, options.output)
    measured = measure(model, tokenizer, options.seed, options.eval_size)
    print(json.dumps(measured.__dict__, indent=2))
    (options.output / "README.md").write_text(card(model, measured, options), encoding="utf-8")


if __name__ == "__main__":
    main()
