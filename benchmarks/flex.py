"""Attention over packs: SDPA with a dense mask against FlexAttention with a block mask of the same `ends`.

    python benchmarks/flex.py                                # on a GPU; writes results/flex.json
    python benchmarks/flex.py --device cpu --shape tiny      # a check; writes results/flex-tiny.json

For the packs of eight GRPO groups (G completions of 256 tokens, prompts of 100, forks early or late) and
several pack sizes: milliseconds forward and backward, the time to make each mask, peak memory, and the
largest error of output and gradients against float64, relative to the largest entry. SDPA is what the layers
of transformers call: keys and values repeated, an additive mask, whichever kernel torch takes, and apart the
memory-efficient one. FlexAttention is compiled once for any length; compiling is timed apart. A decoder layer
and the head are timed too, which gives attention's share of an update. On a CPU FlexAttention has no backward
pass: there it runs forward only, uncompiled, and every length is divided by 16.

A case is written as soon as it is measured, and none begins after `--seconds`.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from statistics import median
from typing import Any

import numpy as np
import torch
from common import write
from shapes import SHAPES, build, completions, early_forks, entropic_forks, recorded_forks
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from twig.core.algorithms.registry import algorithm
from twig.core.credit import Scored, assign
from twig.core.trie import PrefixTrie
from twig.core.types import Completion, Example, Group
from twig.engine.decoder import tree_visible
from twig.engine.pack import Pack, build_packs

BLOCK = 128
PROMPT, LENGTH, GROUPS = 100, 256, 8
SIZES = (2048, 4096, 8192, 1024, 512)
REFERENCE = 2300  # longest pack that is compared with float64
# (completions, forks); the ones that decide come first
TRIES = ((16, "early"), (8, "early"), (50, "early"), (16, "late"), (50, "late"), (8, "recorded"))


# ---- packs


def packs_of(generations: int, forks: str, size: int, scale: int = 1) -> list[Pack]:
    """The packs of a step of full-token GRPO; `scale` divides every length."""
    return build_packs(_step(generations, forks, scale), size // scale)


@cache
def _step(generations: int, forks: str, scale: int) -> list[Scored]:
    """The groups of a step with their credit."""
    length, groups, tries = LENGTH // scale, [], []
    for number in range(GROUPS):
        rewards = np.arange(generations) % 2 * 1.0
        rows = completions(length, _forks(generations, forks, length, number), 1000, seed=number)
        made = [Completion(ids, np.zeros(length), np.zeros(length), True, "") for ids in rows]
        groups.append(Group(Example(""), number, np.arange(PROMPT // scale), made, rewards))
        tries.append(PrefixTrie.build(rows, rewards))
    rngs = [np.random.default_rng(0) for _ in tries]
    credits, _ = assign(algorithm("grpo"), tries, rngs, GROUPS)
    return [Scored(*each) for each in zip(groups, tries, credits, range(GROUPS), strict=True)]


def _forks(generations: int, forks: str, length: int, number: int) -> list[tuple[int, int]]:
    if forks == "early":
        return early_forks(generations)
    if forks == "late":
        return entropic_forks(generations, length, 0.02, seed=number)
    return recorded_forks(length)[number]


def key_tables(pack: Pack, device: str) -> tuple[Tensor, Tensor]:
    """(column [S + L], end [B, S + L]) of each key: query q sees key k if column[k] <= q < end[k].

    The S keys of the stem come first, before column 0, and every query sees them.
    """
    stem = 0 if pack.stem is None else len(pack.stem)
    batch, width = pack.ends.shape
    ends = np.concatenate([np.full((batch, stem), width), pack.ends], 1)
    columns = torch.arange(-stem, width, device=device)
    return columns, torch.from_numpy(ends).to(device)


# ---- masks


def dense_mask(pack: Pack, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask [B, 1, L, S + L] as the decoder makes it from the pack's `ends`."""
    visible = tree_visible(ends)
    if pack.stem is not None:
        visible = torch.cat([visible.new_ones(*ends.shape, len(pack.stem)), visible], 2)
    mask = torch.zeros(visible.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill_(~visible, float("-inf"))[:, None]


def tree_mask(columns: Tensor, ends: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's mask function of a pack."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (columns[k] <= q) & (q < ends[b, k])

    return visible


def block_mask(columns: Tensor, ends: Tensor, queries: int) -> BlockMask:
    """The block mask straight from the tables: which blocks are seen whole, in part or not at all.

    Takes time in proportion to blocks, where comparing all pairs takes it in proportion to queries times
    keys. Blocks on the diagonal count as seen in part; the mask function decides inside them.
    """
    batch, keys = ends.shape
    missing = -keys % BLOCK
    column = torch.nn.functional.pad(columns, (0, missing), value=queries).view(-1, BLOCK)
    end = torch.nn.functional.pad(ends, (0, missing)).view(batch, 1, -1, BLOCK)
    first_key, last_key = column.amin(-1), column.amax(-1)
    first = torch.arange(0, queries, BLOCK, device=ends.device)[:, None]
    last = (first + BLOCK - 1).clamp(max=queries - 1)
    # a part of the last block may be padding: its real keys end before the padding's column
    below = torch.where(last_key < queries, last_key, queries - 1) <= first
    seen = torch.where(below, end.amax(-1) > first, first_key <= last)
    whole = (last_key <= first) & (end.amin(-1) > last)
    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~whole),
        *_ordered(whole.expand_as(seen)),
        BLOCK_SIZE=BLOCK,
        mask_mod=tree_mask(columns, ends),
        seq_lengths=(queries, keys),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row of blocks [B, Q, K] are chosen, and the numbers of those, first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1)[:, None].int(), order[:, None].int()


# ---- one attention


def by_sdpa(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """SDPA as the layers of transformers call it when there is a mask: keys and values repeated."""
    k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // x.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_flex(compiled: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention with the same number of key heads as the model has."""
    return compiled(q, k, v, block_mask=mask, enable_gqa=True)


class Inputs:
    """Random queries, keys, values and output gradient of a pack's shape."""

    def __init__(self, pack: Pack, heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
        count, kv_heads, size = heads
        batch, width = pack.ends.shape
        keys = width + (0 if pack.stem is None else len(pack.stem))
        draw = torch.Generator(device).manual_seed(0)
        options = {"generator": draw, "dtype": dtype, "device": device}
        self.q = torch.randn(batch, count, width, size, **options)
        self.k, self.v = (torch.randn(batch, kv_heads, keys, size, **options) for _ in range(2))
        self.grad = torch.randn(batch, count, width, size, **options)

    def run(self, attend: Callable[..., Tensor], mask: Any) -> list[Tensor]:
        """Output and gradients of queries, keys and values; the output alone where there are none."""
        leaves = self._leaves(mask)
        out = attend(*leaves, mask)
        if not out.requires_grad:
            return [out]
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad)]

    def forward(self, attend: Callable[..., Tensor], mask: Any) -> Tensor:
        """Output alone, ready for a backward pass."""
        return attend(*self._leaves(mask), mask)

    def _leaves(self, mask: Any) -> list[Tensor]:
        has_backward = self.q.is_cuda or isinstance(mask, Tensor)
        return [x.detach().requires_grad_(has_backward) for x in (self.q, self.k, self.v)]

    def reference(self, mask: Tensor) -> list[Tensor]:
        """The same in float64, written out."""
        wide = Inputs.__new__(Inputs)
        wide.q, wide.k, wide.v, wide.grad = (x.double() for x in (self.q, self.k, self.v, self.grad))

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + mask, -1) @ v

        return wide.run(attend, mask.double())


# ---- measuring


class Meter:
    """Times work and its memory on a device."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device == "cuda"

    def milliseconds(self, work: Callable[[], Any], calls: int = 4) -> float:
        """The time of a call: the median of three bursts of `calls`, after a call that warms up.

        In a burst the processor runs ahead of the GPU, as it does between the layers of a model.
        """
        work()
        found = []
        for _ in range(3):
            self.wait()
            began = time.perf_counter()
            for _ in range(calls if self.cuda else 1):
                work()
            self.wait()
            found.append(1000 * (time.perf_counter() - began) / (calls if self.cuda else 1))
        return round(median(found), 4)

    def peak_mib(self, work: Callable[[], Any]) -> float | None:
        """What `work` takes at most over what is held before it; None on a CPU."""
        if not self.cuda:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def errors(found: list[Tensor], reference: list[Tensor] | None) -> dict[str, float] | None:
    """The largest difference of each tensor from the reference, relative to its largest entry."""
    if reference is None:
        return None
    pairs = zip(("out", "dq", "dk", "dv"), found, reference, strict=False)
    return {n: float(f"{float((a.double() - b).abs().max() / b.abs().max()):.3g}") for n, a, b in pairs}


def compare(
    pack: Pack, heads: tuple[int, int, int], dtype: torch.dtype, compiled: Callable[..., Tensor], meter: Meter
) -> dict[str, Any]:
    """One pack: each kind of attention, its mask, memory and errors; a failure of one is recorded."""
    device, width = meter.device, pack.ends.shape[1]
    columns, ends = key_tables(pack, device)
    own_ends, inputs = torch.from_numpy(pack.ends).to(device), Inputs(pack, heads, dtype, device)
    make_dense = partial(dense_mask, pack, own_ends, dtype)
    make_blocks = partial(block_mask, columns, ends, width)
    reference = inputs.reference(make_dense()) if ends.shape[1] <= REFERENCE else None
    blocks = make_blocks()
    result = {
        "batch": len(ends),
        "queries": width,
        "keys": ends.shape[1],
        "visible": round(float(tree_visible(own_ends).float().mean()), 4),
        "blocks_run": round(_share_of_blocks(blocks), 4),
    }
    sides = {
        "sdpa": (partial(by_sdpa, None), make_dense),
        "sdpa_efficient": (partial(by_sdpa, SDPBackend.EFFICIENT_ATTENTION), make_dense),
        "flex": (partial(by_flex, compiled), make_blocks),
    }
    if not meter.cuda:
        del sides["sdpa_efficient"]
    for name, (attend, make) in sides.items():
        try:
            result[name] = _measured(inputs, attend, make, reference, meter)
        except Exception as error:  # the others still count
            result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    if ends.shape[1] <= 4352:

        def all_pairs() -> BlockMask:
            return create_block_mask(tree_mask(columns, ends), len(ends), None, width, ends.shape[1], device)

        result["create_block_mask_ms"] = meter.milliseconds(all_pairs, 1)
    return result


def _share_of_blocks(mask: BlockMask) -> float:
    """The share of all blocks that a kernel has to run."""
    return float((mask.kv_num_blocks + mask.full_kv_num_blocks).sum()) / mask.kv_indices.numel()


def _measured(
    inputs: Inputs,
    attend: Callable[..., Tensor],
    make: Callable[[], Any],
    reference: list[Tensor] | None,
    meter: Meter,
) -> dict[str, Any]:
    began = time.perf_counter()
    found = inputs.run(attend, make())
    meter.wait()
    first = time.perf_counter() - began
    wrong = errors(found, reference)
    del found
    mask = make()
    return {
        "first_call_s": round(first, 3),
        "mask_ms": meter.milliseconds(make),
        "forward_ms": meter.milliseconds(lambda: inputs.forward(attend, mask)),
        "both_ms": meter.milliseconds(lambda: inputs.run(attend, mask)),
        "peak_mib": meter.peak_mib(lambda: inputs.run(attend, make())),
        "errors": wrong,
    }


def layer_and_head(model: Any, width: int, meter: Meter) -> dict[str, Any]:
    """Milliseconds forward and backward of a decoder layer with a dense mask, its attention, and the head.

    The weights are frozen, so a product costs two of its size backwards and forwards, and none for weights.
    """
    config, dtype = model.config, model.dtype
    with torch.device(meter.device):
        hidden = torch.randn(1, width, config.hidden_size, dtype=dtype)
        positions = torch.arange(width)[None]
        mask = torch.full((1, 1, width, width), float("-inf"), dtype=dtype).triu(1)
    core, grad = model.get_decoder(), torch.ones_like(hidden)
    rotary = core.rotary_emb(hidden, positions)

    def layer() -> Any:
        leaf = hidden.detach().requires_grad_()
        out = core.layers[0](leaf, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        return torch.autograd.grad(out, leaf, grad)

    rows = hidden[0, :512]
    size = config.hidden_size // config.num_attention_heads
    draw = partial(torch.randn, dtype=dtype, device=meter.device)
    q = draw(1, config.num_attention_heads, width, size)
    k, v = (draw(1, config.num_key_value_heads, width, size) for _ in range(2))

    def attention() -> Any:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(by_sdpa(None, *leaves, mask), leaves, q)

    def head() -> Any:
        leaf = rows.detach().requires_grad_()
        return torch.autograd.grad(model.lm_head(leaf).float().logsumexp(-1).sum(), leaf)

    weights = sum(p.numel() for n, p in core.layers[0].named_parameters() if n.endswith("proj.weight"))
    return {
        "tokens": width,
        "layer_ms": meter.milliseconds(layer),
        "attention_ms": meter.milliseconds(attention),
        "head_ms_per_512_rows": meter.milliseconds(head),
        # backwards twice the scores and the sums, and the scores once more
        "attention_flops_over_products": round(3.5 * 4 * width * config.hidden_size / (4 * weights), 3),
    }


# ---- the runs


def cases(options: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Measures in the order of what decides most; `save` gets the result so far after each case."""
    began, meter = time.perf_counter(), Meter(options.device)
    scale = 1 if meter.cuda else 16
    dtype = torch.bfloat16 if meter.cuda else torch.float32
    shape = SHAPES[options.shape]
    count, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    heads = (count, kv_heads, shape["hidden_size"] // count)
    result: dict[str, Any] = {"shape": options.shape, "scale": scale, "packs": [], "layers": []}

    def left() -> bool:
        return time.perf_counter() - began < options.seconds

    def measure(generations: int, forks: str, pack: Pack, dtype: torch.dtype, kind: str) -> bool:
        if not left():
            return True
        about = {"generations": generations, "forks": forks, "dtype": str(dtype)[6:], "compiled": kind}
        try:
            found = compare(pack, heads, dtype, flex[kind], meter)
        except Exception as error:  # the other cases still count
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        result["packs"].append(about | found)
        save(result)
        print(f"{time.perf_counter() - began:5.1f} s  {_in_short(about | found)}", flush=True)
        return "error" not in found and "error" not in found["flex"]

    flex = _compiled(meter)
    with torch.device(options.device):
        model = build(options.shape, dtype, num_hidden_layers=1).requires_grad_(False)
    for width in (2048, 4096, 8192, 1024):
        try:
            result["layers"].append(layer_and_head(model, width // scale, meter))
        except Exception as error:
            result["layers"].append({"tokens": width, "error": f"{type(error).__name__}: {error}"[:500]})
        save(result)
    del model
    packs = _different_packs(scale)
    works = measure(*packs[0], dtype, "for any length")
    usual, other = sorted(flex, reverse=not works)
    for number, pack in enumerate(packs[works:]):
        measure(*pack, dtype, usual)
        if number == 4:
            measure(*packs[0], torch.float32, usual)
            measure(*packs[1], dtype, other)


def _different_packs(scale: int) -> list[tuple[int, str, Pack]]:
    """The first pack of each kind of trie and size, each shape once; those of several rows last."""
    found: dict[Any, tuple[int, str, Pack]] = {}
    for generations, forks in TRIES:
        for size in SIZES:
            pack = packs_of(generations, forks, size, scale)[0]
            found.setdefault((generations, forks, pack.ends.shape), (generations, forks, pack))
    return sorted(found.values(), key=lambda each: len(each[2].ends) > 1)


def _in_short(case: dict[str, Any]) -> str:
    """One line about a case: its pack and the time of each kind."""
    about = [case[key] for key in ("generations", "forks", "dtype", "batch", "queries") if key in case]
    sides = {name: case[name] for name in ("sdpa", "sdpa_efficient", "flex") if name in case}
    times = [f"{name} {side.get('both_ms', side.get('error', '')[:60])}" for name, side in sides.items()]
    return ", ".join([*map(str, about), *times, case.get("error", "")[:80]])


def _compiled(meter: Meter) -> dict[str, Callable[..., Tensor]]:
    """FlexAttention compiled once for all lengths, and anew for each."""

    # torch keeps what it compiled by function: the second way needs one of its own
    def fixed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return flex_attention(q, k, v, **options)

    ways = {"for any length": flex_attention, "for one length": fixed}
    if not meter.cuda:
        return ways
    return {name: torch.compile(way, dynamic=way is flex_attention) for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention over packs: SDPA against FlexAttention.")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=35, help="no case begins after so long")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    name = "flex" + ("" if options.shape == "1.5b" else f"-{options.shape}")
    cases(options, lambda result: write(name, result))


if __name__ == "__main__":
    main()
