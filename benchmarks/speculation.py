"""Exact speculation from siblings: tokens per pass on real completions, and what wider passes cost.

    python benchmarks/speculation.py --record FILE --recipe RECIPE [GROUP.KEY=VALUE ...]
    python benchmarks/speculation.py --simulate NAME=FILE [NAME=FILE ...] --sums SUMS
    python benchmarks/speculation.py --time                         # on a GPU; writes speculation-time.json
    python benchmarks/speculation.py --summarise --sums SUMS        # writes speculation.json

`--record` samples completions with Twig, on a recipe's own prompts, and saves their tokens, one prompt a
line. `--simulate` replays them: a row's noise decides its tokens, so a drafted token stands if and only if
it is the recorded one, and no model is needed (`drafts.py` has the schemes). `--time` measures one captured
decode pass of a model's shape at several numbers of rows and of columns (a row's newest token and its
drafts): body and head through the layers of transformers over a static cache, then the draw of a token per
column. `--summarise` puts both together and predicts

    speed-up = sum of ms at 1 column over the passes without drafts
               / sum of ms at k + 1 columns over the passes with k drafts

where a pass costs what was measured for the next larger number of rows, so rows that end early count. Making
drafts and moving accepted keys and values are left out: this is the most that speculation can win.

In the results, `tokens_per_row_and_pass` is the mean over rows; `passes_saved` is how many times fewer passes
a whole group takes, which ends with its slowest row. An "earlier wave" is as large as the group, already
sampled from the same prompt, and its own passes are not counted.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, write
from drafts import SCHEMES, simulate
from shapes import SHAPES, build

COLUMNS = (1, 2, 3, 5, 9)
ROWS = (1, 8, 16, 32, 64, 128)
FILLED = 228  # tokens in the cache: a prompt of 100 and half of 256


# ---- recorded completions


def record(path: Path, recipe: str, overrides: list[str], prompts: int, completions: int) -> None:
    """Samples `completions` for each of a task's first `prompts` and appends them to `path`."""
    from twig.config.load import load
    from twig.engine.load import end_ids, load_model
    from twig.engine.lora import attach
    from twig.engine.policy import Policy
    from twig.engine.sampler import Request, SamplingParams, sample
    from twig.tasks.load import load_task
    from twig.tasks.prompts import encode_prompt

    settings = load(recipe, overrides)
    model, tokenizer = load_model(settings.model)
    task, ends = load_task(settings), end_ids(model, tokenizer)
    shape = dict(settings.lora)
    policy = Policy(
        attach(model, **shape, seed=0, adapter=settings.model.adapter),
        temperature=settings.rollout.temperature,
    )
    length = settings.rollout.max_completion_length
    for slot in range(prompts):
        began = time.perf_counter()
        ids = encode_prompt(task, task.train[slot], tokenizer)
        request = Request(ids, completions, length, slot)
        params = SamplingParams(ends, tokenizer.batch_decode, wave_size=completions, record=False)
        drawn = sample(policy, [request], params, step=1).completions[0]
        line = {
            "model": settings.model.name,
            "temperature": settings.rollout.temperature,
            "seed": 0,
            "step": 1,
            "slot": slot,
            "prompt": ids.tolist(),
            "ids": [c.ids.tolist() for c in drawn],
            "logps": [[round(float(p), 4) for p in c.logps] for c in drawn],
            "entropies": [[round(float(e), 4) for e in c.entropies] for c in drawn],
            "finished": [c.finished for c in drawn],
            "text": drawn[0].text,
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"prompt {slot}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


# ---- replaying them


def simulated(files: dict[str, Path], most: int, sums: Path) -> None:
    """Replays up to `most` groups of each prompt and size, and writes what they took to `sums`."""
    result: dict[str, Any] = {}
    for name, path in files.items():
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        cases: dict[tuple[str, int, int], Counter[str]] = {}
        for number, line in enumerate(lines):
            began = time.perf_counter()
            for key, case in _replay(line, most):
                cases.setdefault(key, Counter()).update(case)
            rows = [[*key, dict(total)] for key, total in cases.items()]
            result[name] = {"recorded": _described(lines), "cases": rows}
            sums.write_text(json.dumps(result), encoding="utf-8")
            print(
                f"{name}, prompt {number}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True
            )


def _described(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What was recorded, and how much of it completions share."""
    lengths = [len(ids) for line in lines for ids in line["ids"]]
    entropies = [e for line in lines for row in line["entropies"] for e in row]
    shared = {}
    for size in ROWS[1:]:
        tokens = nodes = 0
        for line in lines:
            for group, _ in _groups(line, size, len(lines[0]["ids"])):
                texts = [line["ids"][row] for row in group]
                tokens += sum(map(len, texts))
                nodes += len({tuple(text[: i + 1]) for text in texts for i in range(len(text))})
        shared[size] = round(1 - nodes / tokens, 4)
    return {
        "prompts": len(lines),
        "completions": len(lines[0]["ids"]),
        "temperature": lines[0]["temperature"],
        "mean_length": round(float(np.mean(lengths)), 1),
        "mean_entropy": round(float(np.mean(entropies)), 3),
        "share_of_tokens_in_shared_prefixes": shared,
    }


def _groups(line: dict[str, Any], size: int, most: int) -> list[tuple[range, range]]:
    """Up to `most` groups of rows, each with the rows of another wave of the same size (none: empty)."""
    total = len(line["ids"])
    starts = range(0, total - size + 1, size)[:most]
    earlier = [(start + size) % total for start in starts]
    return [
        (range(start, start + size), range(other, other + size) if 2 * size <= total else range(0))
        for start, other in zip(starts, earlier, strict=True)
    ]


def _replay(line: dict[str, Any], most: int) -> Iterator[tuple[tuple[str, int, int], dict[str, int]]]:
    """Every case of one prompt: (scheme, rows, drafts), and what its groups took.

    `before N` and `after N` count the passes for at most N rows, without and with drafts.
    """
    from twig.core.rng import uniforms

    longest = max(map(len, line["ids"]))
    noise = [
        uniforms(line["seed"], line["step"], line["slot"], row, longest) for row in range(len(line["ids"]))
    ]
    for size in ROWS:
        for group, other in _groups(line, size, most):
            texts = [line["ids"][row] for row in group]
            earlier = [line["ids"][row] for row in other]
            lengths = np.array([len(text) - 1 for text in texts])
            before = _by_rows("before", [int((lengths > at).sum()) for at in range(lengths.max())])
            for name, scheme in SCHEMES.items():
                if scheme.earlier and not earlier:
                    continue
                for width in (columns - 1 for columns in COLUMNS[1:]):
                    done = simulate(scheme, line["prompt"], texts, [noise[r] for r in group], width, earlier)
                    sums = {"tokens": done.tokens, "row_passes": sum(done.live)}
                    yield (name, size, width), sums | before | _by_rows("after", done.live)


def _by_rows(when: str, live: list[int]) -> dict[str, int]:
    """The passes by the smallest measured number of rows that holds them."""
    return dict(Counter(f"{when} {next(size for size in ROWS if size >= rows)}" for rows in live))


def summarised(sums: Path) -> dict[str, Any]:
    """Tokens per pass of each scheme, passes saved, and the predicted speed-up if passes were measured."""
    times, result = _times(), {}
    for name, model in json.loads(sums.read_text(encoding="utf-8")).items():
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for scheme, rows, drafts, case in model["cases"]:
            into = found.setdefault((scheme, drafts), {"scheme": scheme, "drafts": drafts})
            figures = {
                "tokens_per_row_and_pass": case["tokens"] / case["row_passes"],
                "passes_saved": _cost(case, "before", None, 1) / _cost(case, "after", None, 1),
            }
            if times is not None:
                plain = _cost(case, "before", times, 1)
                figures["predicted_speedup"] = plain / _cost(case, "after", times, drafts + 1)
            for figure, value in figures.items():
                into.setdefault(figure, {})[rows] = round(value, 3)
        result[name] = {"recorded": model["recorded"], "schemes": list(found.values())}
    return result


def _cost(case: dict[str, int], when: str, times: dict[tuple[int, int], float] | None, columns: int) -> float:
    """The milliseconds of a case's passes, or their number if none were measured."""
    return sum(
        count * (1 if times is None else times[int(key.split()[1]), columns])
        for key, count in case.items()
        if key.startswith(when)
    )


def _times() -> dict[tuple[int, int], float] | None:
    """Milliseconds of a pass by (rows, columns), as measured; None if they were not."""
    path = RESULTS / "speculation-time.json"
    if not path.is_file():
        return None
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    times = {(c["rows"], c["columns"]): c["pass_ms"] + c["draw_ms"] for c in cases if "draw_ms" in c}
    missing = [(rows, columns) for rows in ROWS for columns in COLUMNS if (rows, columns) not in times]
    if missing:
        print(f"{path}: no times for {missing}, so no speed-up is predicted", file=sys.stderr)
    return None if missing else times


# ---- what a pass costs


class Static:
    """A cache of fixed size whose newest columns are written over the same slots in every pass."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], like: torch.Tensor) -> None:
        self.pairs = [
            (like.new_zeros(shape).normal_(), like.new_zeros(shape).normal_()) for _ in range(layers)
        ]
        self.rows = self.columns = 1

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the newest columns and returns all keys and values of the rows in use."""
        stop = FILLED + self.columns
        k, v = (buffer[: self.rows, :, :stop] for buffer in self.pairs[layer])
        k[:, :, FILLED:] = keys
        v[:, :, FILLED:] = values
        return k, v

    def get_seq_length(self, *args: object) -> int:
        """Counts the tokens before the newest columns."""
        return FILLED


class Pass:
    """One decode pass over fixed buffers: tokens [rows, columns] to logits, and logits to tokens."""

    def __init__(self, shape: str, device: str, dtype: torch.dtype) -> None:
        with torch.device(device):
            self.model = build(shape, dtype)
        config = self.model.config
        size = (max(ROWS), config.num_key_value_heads, FILLED + max(COLUMNS))
        self.heads = config.hidden_size // config.num_attention_heads
        self.cache = Static(
            config.num_hidden_layers, (*size, self.heads), self.model.get_input_embeddings().weight
        )
        self.device, self.dtype = torch.device(device), dtype

    def prepare(self, rows: int, columns: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """The pass of body and head, and the draw of a token for each of its columns."""
        core, cache, device = self.model.get_decoder(), self.cache, self.device
        cache.rows, cache.columns = rows, columns
        ids = torch.full((rows, columns), 2, device=device)
        positions = torch.arange(FILLED, FILLED + columns, device=device).expand(rows, -1)
        at = torch.arange(FILLED + columns, device=device)
        mask = torch.zeros(rows, 1, columns, FILLED + columns, dtype=self.dtype, device=device)
        mask.masked_fill_(at > positions[:, None, :, None], float("-inf"))
        rotary = core.rotary_emb(torch.empty(0, dtype=self.dtype, device=device), positions)
        logits = torch.empty(rows * columns, self.model.config.vocab_size, dtype=self.dtype, device=device)
        uniform = torch.rand(rows * columns, device=device)
        tokens = torch.empty(rows * columns, dtype=torch.long, device=device)

        def run() -> None:
            hidden = core.embed_tokens(ids)
            for layer in core.layers:
                hidden = layer(
                    hidden,
                    attention_mask=mask,
                    position_embeddings=rotary,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
            torch.matmul(core.norm(hidden).flatten(0, 1), self.model.lm_head.weight.t(), out=logits)

        def draw() -> None:
            cumulative = torch.log_softmax(logits.float(), -1).exp().cumsum(-1)
            below = uniform[:, None] * cumulative[:, -1:]
            tokens.copy_(torch.searchsorted(cumulative, below, right=True)[:, 0])

        return run, draw


@torch.inference_mode()
def timed(options: argparse.Namespace, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Milliseconds of a pass for each number of rows and columns; `save` gets the result after each."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    began, cases = time.perf_counter(), []
    decode = Pass(options.shape, options.device, dtype)
    # the numbers that decide come first, in case time runs out
    for columns in (1, 5, 2, 9, 3):
        for rows in ROWS:
            if time.perf_counter() - began > options.seconds:
                return cases
            case: dict[str, Any] = {"rows": rows, "columns": columns}
            try:
                run, draw = decode.prepare(rows, columns)
                case["pass_ms"] = round(_milliseconds_of(run, options.device), 4)
                case["draw_ms"] = round(_milliseconds_of(draw, options.device), 4)
            except Exception as error:  # the other cases still count
                case["error"] = f"{type(error).__name__}: {error}"[:300]
            cases.append(case)
            save(cases)
            print(f"{time.perf_counter() - began:5.1f} s  {case}", flush=True)
    return cases


def _milliseconds_of(work: Callable[[], None], device: str, repeats: int = 10) -> float:
    """The median time of `work`: of a captured graph on a GPU, of plain calls on a CPU."""
    if device != "cuda":
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        return 1000 * float(np.median(seconds))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]))


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Exact speculation from siblings: gain and cost.")
    parser.add_argument("words", nargs="*", help="--simulate: NAME=FILE; --record: GROUP.KEY=VALUE")
    parser.add_argument("--record", type=Path, metavar="FILE", help="sample completions and append them")
    parser.add_argument("--simulate", action="store_true", help="replay recorded completions")
    parser.add_argument("--summarise", action="store_true", help="tokens per pass and predicted speed-up")
    parser.add_argument("--sums", type=Path, default=Path("speculation-sums.json"), metavar="FILE")
    parser.add_argument("--time", action="store_true", help="measure passes")
    parser.add_argument("--recipe", default="svamp-qwen2.5-0.5b-instruct")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=128)
    parser.add_argument("--groups", type=int, default=2, help="groups of a prompt and size to replay")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=25, help="--time starts no case after so long")
    return parser, parser.parse_args()


def main() -> None:
    parser, options = parse()
    if options.record:
        record(options.record, options.recipe, options.words, options.prompts, options.completions)
    if options.simulate:
        files = {name: Path(path) for name, _, path in (word.partition("=") for word in options.words)}
        simulated(files, options.groups, options.sums)
    if options.summarise:
        print(f"written to {write('speculation', {'models': summarised(options.sums)})}")
    if options.time:
        name = "speculation-time" + ("" if options.shape == "1.5b" else f"-{options.shape}")
        about = {"shape": options.shape, "filled": FILLED}
        timed(options, lambda cases: write(name, {**about, "cases": cases}))
    if not (options.record or options.simulate or options.time or options.summarise):
        parser.error("write --record, --simulate, --time or --summarise")


if __name__ == "__main__":
    main()
