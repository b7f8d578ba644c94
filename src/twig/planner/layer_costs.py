"""Counts the bytes of one layer, one pack and one decode step, from a model's shape and a run's settings.

Follows the code of the engine line by line; imports no torch. A table has `rows` x `columns` = `tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from twig.core.algorithms.base import Load
from twig.engine.pack import LEAST_SAVED
from twig.planner.model_shape import Shape

_FEW_ROWS = 0.75  # as in engine/policy.py, which needs torch
_SLOTS, _SHARE_FROM = 64, 0.05  # as in engine/decode_graph.py
LOGITS_AT_ONCE = 2**20  # as in engine/sampler.py
HEAD_PART = 2**19  # as in engine/lm_head.py
HELD_FROM = 16  # as in engine/wave_cache.py
READ_AT_ONCE = 2048  # tokens, as there


@dataclass(frozen=True)
class Workload:
    """Everything about a run that its memory depends on.

    `kind` of device: cpu, cuda or mps. `element`, `stored`, `wide`: bytes of a number of the base, of the
    base on disk, and of adapter, log-probs and loss. `quantised`: nf4, int8 or None. `adapted`: numbers of
    the layers with adapters on `modules`, of at most `rank`; `adapter_numbers`: all that is trained; `dora`:
    whether lengths of rows are. `moments`: numbers that the optimizer keeps for each of the
    adapter. `load`: the most work of a group that the algorithm asks for. `prompt`: tokens of the longest
    prompt. `restart`: tokens of the longest prompt that includes a part of a completion, 0 if none does.
    `questions`: tokens of the prompts of an evaluation, the shortest first. `static_decode`: whether a
    captured step over permanent buffers samples the tokens. `packable`: whether oneDNN multiplies, so that
    sampling can use packed copies of the frozen matrices. `filled`: slots of keys and values that a wave of
    training fills at most (None: all of them, as if no completion ended early); see `filled_slots`.
    """

    shape: Shape
    kind: str
    element: int
    stored: int
    wide: int
    eager: bool
    plain: bool
    quantised: str | None
    rank: int
    modules: frozenset[str]
    adapted: tuple[int, ...]
    adapter_numbers: int
    moments: int
    load: Load
    prompt: int
    length: int
    generations: int
    prompts: int
    restart: int
    questions: tuple[int, ...]
    evaluated_between: bool
    static_decode: bool = False
    packable: bool = False
    filled: int | None = None
    dora: bool = False

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed copies of the layers' matrices and the head."""
        shape = self.shape
        return self.element * (shape.parameters()["linear"] + shape.vocabulary * shape.hidden)

    @property
    def cut(self) -> int:
        """The lowest adapted layer."""
        return min(self.adapted)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter's weights."""
        return self.wide * self.adapter_numbers

    @property
    def recorded(self) -> bool:
        """Whether sampling records the trunk's output."""
        return self.cut > 0 and not self.plain

    @property
    def path(self) -> int:
        """Tokens that the longest completion runs in an update: the last one is only predicted."""
        return self.prompt + self.length - 1

    @property
    def sampled_prompt(self) -> int:
        """Tokens of the longest prompt that training samples from, restarts included."""
        return max(self.prompt, self.restart)


@dataclass(frozen=True)
class Table:
    """One pass of an update: `rows` of `columns` tokens behind a stem of `stem` tokens, which runs first.

    The next-token distribution is computed for `head` tokens, which have `targets` continuations. `widest` is
    the largest part of `head` in one row (None: rows are even).
    """

    rows: int
    columns: int
    stem: int
    head: int
    targets: int
    widest: int | None = None

    @property
    def tokens(self) -> int:
        """Cells of the table."""
        return self.rows * self.columns

    @property
    def keys(self) -> int:
        """The most tokens that one token can attend to."""
        return self.stem + self.columns


# ---- one layer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves:
    """Bytes of a layer's two halves."""

    attention: float
    mlp: float

    @property
    def both(self) -> float:
        """Bytes of the whole layer."""
        return self.attention + self.mlp


def kept_by_layer(work: Workload, table: Table, with_input: bool, queries: int | None = None) -> Halves:
    """Counts the bytes that the backward pass needs of one adapted layer.

    `with_input`: whether a gradient goes to the layer's input; false in the lowest one. `queries`: columns of
    each row that the layer runs at (None: all); keys and values are always computed for every column. Leaves
    out the mask and the rotary embeddings, which all layers share. The base's weights have no gradient, so a
    linear layer keeps its input only for its own adapter, and in the adapter's precision.
    """
    shape, e, adapted, linear = work.shape, work.element, work.modules, work.shape.linear()
    few, at = queries is not None, table.columns if queries is None else queries
    tokens, run, keys = table.tokens, table.rows * at, table.rows * table.keys
    scores = 4 * shape.heads * run * table.keys
    norm = 4 * shape.hidden + 4  # in float32 for every dtype of the model; and one factor a token

    def inputs(names: str, width: int, already_kept: bool = False) -> float:
        own = [linear[f"{name}_proj"] for name in names.split() if f"{name}_proj" in adapted]
        copies = len(own) if e != work.wide else int(bool(own) and not already_kept)
        scaled = work.dora * (e + work.wide) * sum(each.outputs for each in own)  # the base's, the adapter's
        return work.wide * (copies * width + len(own) * work.rank) + scaled

    query, key, value = (with_input or f"{name}_proj" in adapted for name in "qkv")
    attends = query or key or value
    half = tokens * (inputs("k v" if few else "q k v", shape.hidden) + with_input * norm)
    token = few * (inputs("q", shape.hidden) + with_input * norm)
    if shape.qk_norm:
        token += query * 4 * (shape.query + shape.heads)
        half += tokens * key * 4 * (shape.key + shape.kv_heads)
    if work.eager:
        scored = query or key
        token += e * shape.query * key  # each factor is kept for the gradient of the other
        half += keys * e * shape.query * (query + scored)
        half += scores * (scored + shape.attention_softcap * scored * e / 4)
        half += scores * e / 4 * (value and (e != 4 or not scored))
        token += inputs("o", shape.query)
    else:
        token += attends * (2 * e * shape.query + work.wide * shape.heads)  # q, output, normaliser
        half += keys * attends * 2 * e * shape.query
        token += inputs("o", shape.query, already_kept=attends)
    attends = attends or "o_proj" in adapted
    token += norm * (shape.norms == 4 and attends)
    half += run * token

    inner = with_input or attends
    gate, up = inner or "gate_proj" in adapted, inner or "up_proj" in adapted
    token = norm * inner + inputs("gate up", shape.hidden) + inputs("down", shape.intermediate)
    token += e * shape.intermediate * (2 * gate + up)
    token += norm * (shape.norms == 4 and (gate or up or "down_proj" in adapted))
    return Halves(half, run * token)


def last_queries(work: Workload, table: Table) -> int | None:
    """Returns the columns a row that the last layer runs at, None for all: see `engine.policy.Policy`."""
    widest = min(-(-table.head // table.rows), table.columns) if table.widest is None else table.widest
    return widest if not work.plain and widest <= _FEW_ROWS * table.columns else None


def layer_moment(work: Workload, rows: int, columns: int, keys: int | None = None) -> float:
    """Counts the bytes alive within a layer's forward pass beside its input and what the backward pass needs.

    A query attends to `keys` tokens, by default to the columns.
    """
    shape, e, wide = work.shape, work.element, work.wide
    keys = columns if keys is None else keys
    attention = e * (2 * shape.hidden + 4 * shape.query + 2 * shape.key)
    if work.eager:
        attention += shape.heads * keys * max(2 * e, e + 4 + (e != 4) * e)
    mlp = e * (3 * shape.hidden + 3 * shape.intermediate)
    norm = e * shape.hidden + (e != 4) * 8 * shape.hidden
    most = max(attention, mlp, norm)
    for name in work.modules:  # beside the module's own output: the adapter's, scaled, and the sum
        linear = shape.linear()[name]
        around = 2 * e * shape.hidden + (e * shape.intermediate if name in ("up_proj", "down_proj") else 0)
        most = max(most, around + (e != wide) * wide * linear.inputs + linear.outputs * (e + 2 * wide))
    return rows * columns * most + _lengths_moment(work)


def _lengths_moment(work: Workload) -> float:
    """Counts the bytes alive while DoRA computes the lengths of a matrix's rows, for the largest matrix.

    PEFT multiplies the adapter out: by an identity matrix, then scaled, then added to the base's matrix.
    """
    if not work.dora:
        return 0
    copies, linear = 3 + (work.element != work.wide), work.shape.linear()
    return max(
        work.wide * (linear[name].inputs ** 2 + copies * linear[name].weights) for name in work.modules
    )


def shared_moment(work: Workload, rows: int, prompts: int, width: int) -> float:
    """Counts the bytes alive within `engine.shared_attention.attend_parts`, at a wave's last token."""
    shape, e, wide = work.shape, work.element, work.wide
    cast = wide if e != wide else 0

    def part(tables: int, keys: int) -> float:  # scores, masked, and weights; keys or values
        return 3 * rows * shape.heads * keys * wide + cast * tables * keys * shape.key

    queries = rows * shape.query * (2 * e + cast + 3 * wide)
    return queries + max(part(prompts, width), part(rows, work.length))


def backward_moment(work: Workload, table: Table, queries: int | None = None) -> Halves:
    """Counts the bytes of gradients alive within one layer's backward pass."""
    shape, e = work.shape, work.element
    tokens = table.rows * (table.columns if queries is None else queries)
    inner = max(3 * e, (work.wide + 2 * e) if "down_proj" in work.modules else 0)
    mlp = tokens * (2 * e * shape.hidden + inner * shape.intermediate)
    # Queries, the output, and the keys and values of every head.
    attention = (
        tokens * e * (2 * shape.hidden + 3 * shape.query) + table.rows * table.keys * 2 * e * shape.query
    )
    if work.eager:
        attention += shape.heads * tokens * table.keys * (8 if e == 4 else 8 + e)
    return Halves(attention, mlp)


# ---- decode steps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wave:
    """Completions sampled together: of `prompts` prompts, at most `each` of one prompt."""

    prompts: int
    each: int


def waves_of(prompts: int, generations: int, size: int) -> list[Wave]:
    """Returns the different waves of `size` completions, the largest first.

    >>> waves_of(2, 6, 4)
    [Wave(prompts=2, each=2), Wave(prompts=1, each=4)]
    """
    total, waves = prompts * generations, set()
    for start in range(0, total, size):
        stop = min(start + size, total)
        first, last = start // generations, (stop - 1) // generations
        ends = (generations * (first + 1) - start, stop - generations * last)
        each = generations if last - first > 1 else stop - start if last == first else max(ends)
        waves.add(Wave(last - first + 1, each))
    return sorted(waves, key=lambda wave: (-wave.prompts * wave.each, -wave.prompts))


def filled_slots(lengths: Sequence[int], longest: int, page: float = 0) -> int:
    """Returns the slots that completions of these lengths fill in the plain loop, if they share nothing.

    There is room for `longest` tokens in each row. `page` is the number of slots in a page of memory: what a
    row has filled ends in the middle of one.

    >>> filled_slots([1, 2, 5, 5], 8)  # the last token is not run
    9
    """
    return round(sum(min(length - 1 + page / 2, longest) for length in lengths if length > 1))


@dataclass(frozen=True)
class DecodeTable:
    """The size of a captured decode step: `prompts` of `slots` tokens, `each` completions of each.

    A completion has up to `length` tokens. `sampled`: the step draws noise and records what the update needs.
    """

    prompts: int
    each: int
    slots: int
    length: int
    sampled: bool

    @classmethod
    def of(cls, wave: Wave, width: int, length: int, sampled: bool) -> "DecodeTable":
        """Rounds up as `engine.decode_graph.StepShape` does, so that similar waves share a step.

        `width` is the length of the wave's longest prompt.
        """
        power = 1 << max(wave.prompts - 1, 0).bit_length()
        fewer = 3 * power // 4
        prompts = fewer if wave.prompts <= fewer else power
        slots, length = (-(-n // _SLOTS) * _SLOTS for n in (width, length))
        return cls(prompts, wave.each, slots, length, sampled)

    @property
    def rows(self) -> int:
        """Completions, unused rows included."""
        return self.prompts * self.each


def decode_buffers(work: Workload, table: DecodeTable) -> float:
    """Counts the bytes that a decode step keeps for the next wave: caches, recorded values, logits."""
    shape, e, wide, rows = work.shape, work.element, work.wide, table.rows
    token = shape.layers * 2 * shape.key * e
    copies = token * table.slots * (rows - table.prompts)
    weights = shape.weight_bytes(e, work.quantised) + work.adapter_bytes
    of_prompts = table.prompts if copies > _SHARE_FROM * weights else rows  # kept once, or for each row
    cache = token * (of_prompts * table.slots + rows * table.length)
    recorded = rows * table.length * (8 + 2 * wide + table.sampled * wide)
    trunk = table.sampled * work.recorded * rows * table.length * shape.hidden * e
    kinds = 2 if shape.per_type_rotary else 1
    rotary = kinds * 2 * (table.slots + table.length) * shape.head_dim * e
    return cache + recorded + trunk + rotary + rows * shape.vocabulary * wide


def decode_moment(work: Workload, table: DecodeTable) -> float:
    """Counts the bytes alive within a decode step: choosing a token, within a layer, or in the head."""
    shape, e, wide, rows = work.shape, work.element, work.wide, table.rows
    chosen = 3 * wide  # weights, probabilities, and the terms of the entropy or blocks of sums
    head = max(e + wide, 2 * wide) if e != wide or work.shape.logit_scale else wide
    seen = table.slots + table.length
    masks = 2 * len(set(shape.windows)) * table.prompts * seen * wide
    # The scores of both parts, joined, scaled and masked; their softmax; in the model's dtype.
    layer = max(layer_moment(work, rows, 1, 1), 4 * rows * shape.heads * seen * wide)
    return max(rows * shape.vocabulary * max(chosen, head), layer + masks)


# ---- tables ----------------------------------------------------------------------------------------------


def pack_tables(work: Workload, pack_size: int) -> list[Table]:
    """Returns the largest packs, full or of completions of full length that share nothing but the prompt.

    The last, if there are several, is that of prompts that begin alike and so share a stem. It has the
    most cells if they differ in their last token only, or, if a trie fits behind a stem only, if the stem
    is short.
    """
    if work.plain:
        rows = max(min(pack_size // work.path, work.prompts * work.generations), 1)
        return [_table(work, rows, work.path, 0, work.path - work.prompt + 1)]
    stem, behind = work.prompt - 1, work.load.paths * (work.length - 1)
    whole, shares = work.prompt + behind, (work.prompts - 1) * stem >= LEAST_SAVED[work.kind]
    if whole > pack_size:
        columns = min(1 + behind, max(pack_size, work.length))
        tables = [_table(work, 1, columns, stem, columns)]
        tables.append(_table(work, 1, pack_size, 0, pack_size))  # tries that are small enough
        if shares and 1 + behind <= pack_size:
            tables.append(_table(work, 1, pack_size, whole - pack_size, behind + 1))
        return tables
    rows = max(min(pack_size // whole, work.prompts), 1)
    # smaller tries of other prompts fill what these leave
    columns = pack_size // rows if rows < work.prompts else whole
    tables = [_table(work, rows, columns, 0, columns - stem)]
    if shares:
        tables.append(_table(work, rows, columns - stem, stem, columns - stem))
    return tables


def _table(work: Workload, rows: int, columns: int, stem: int, inside: int) -> Table:
    """Returns a table with `inside` tokens of a trie in each row, and the most tokens its head may need."""
    if work.load.forks_only:
        forks = rows * min(inside, work.generations - 1)
        return Table(rows, columns, stem, head=forks, targets=2 * forks)
    if work.load.tokens_per_path is not None:
        paths = -(-inside // max(work.length - 1, 1))
        inside = min(inside, paths * min(work.load.tokens_per_path, work.length))
    return Table(rows, columns, stem, head=rows * inside, targets=rows * inside)
