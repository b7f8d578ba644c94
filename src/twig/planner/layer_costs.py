"""What a run does, as far as memory depends on it: its tables, and what one layer holds while it runs.

Numbers of bytes from a shape, walked through as the code goes; no torch. Names of sizes: `rows` x `columns` =
`tokens` of a table.
"""

from dataclasses import dataclass

from twig.planner.model_shape import Shape

_FEW_ROWS = 0.75  # as in engine/policy.py, which needs torch
_SLOTS, _SHARE_FROM = 64, 0.05  # as in engine/decode_graph.py


@dataclass(frozen=True)
class Workload:
    """What a run does, as far as memory depends on it.

    `kind` of device: cpu, cuda or mps. `element`, `stored`, `wide`: bytes of a number of the base, of the
    base on disk, and of adapter, log-probs and loss. `quantised`: nf4, int8 or None. `adapted`: numbers of
    the layers with adapters on `modules`. `moments`: numbers that the optimizer keeps for each of the
    adapter. `kept_tokens`: most tokens with credit in a completion (None: all). `prompt`: tokens of the
    longest prompt. `restarts`: whether a prompt may go on with a part of a completion. `questions`: problems
    of an evaluation. `static_decode`: whether tokens are sampled by a captured step over buffers that stay.
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
    moments: int
    algorithm: str
    kept_tokens: int | None
    prompt: int
    length: int
    generations: int
    prompts: int
    restarts: bool
    questions: int
    evaluated_between: bool
    static_decode: bool = False

    @property
    def cut(self) -> int:
        """The lowest adapted layer."""
        return min(self.adapted)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter's weights."""
        return self.wide * self.shape.adapter_parameters(self.rank, self.modules, len(self.adapted))

    @property
    def recorded(self) -> bool:
        """Whether sampling records the trunk's output."""
        return self.cut > 0 and not self.plain

    @property
    def path(self) -> int:
        """Tokens that the longest completion needs in an update: the last one is only predicted."""
        return self.prompt + self.length - 1


@dataclass(frozen=True)
class Table:
    """One pass of an update: `rows` of `columns` tokens behind a stem of `stem` more, which is run before.

    `head` tokens have their next-token distribution computed, for `targets` tokens that may follow. `widest`
    is the most of `head` in a row (None: they are even).
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
        """What a token can see at most."""
        return self.stem + self.columns


# ---- one layer -------------------------------------------------------------------------------------------


def kept_by_layer(
    work: Workload, table: Table, with_input: bool, queries: int | None = None
) -> tuple[float, float]:
    """Bytes that the backward pass needs of one adapted layer: (attention's half, the MLP's half).

    `with_input`: whether a gradient goes to the layer's input; not so in the lowest one. `queries`: columns
    of each row that the layer is run at, where it is not all; keys and values are made of every column. The
    mask and the rotary embeddings are shared by all layers and not in here. The base's weights have no
    gradient, so a linear layer keeps its input only for its own adapter, and in the adapter's precision.
    """
    shape, e, adapted = work.shape, work.element, work.modules
    few, at = queries is not None, table.columns if queries is None else queries
    tokens, run, keys = table.tokens, table.rows * at, table.rows * table.keys
    scores = 4 * shape.heads * run * table.keys
    norm = 4 * shape.hidden + 4  # in float32, whatever the model is; and one factor a token

    def inputs(names: str, width: int, there: bool = False) -> float:
        count = sum(f"{name}_proj" in adapted for name in names.split())
        copies = count if e != work.wide else int(count > 0 and not there)
        return work.wide * (copies * width + count * work.rank)

    query, key, value = (with_input or f"{name}_proj" in adapted for name in "qkv")
    attends = query or key or value
    half = tokens * (inputs("k v" if few else "q k v", shape.hidden) + with_input * norm)
    token = few * (inputs("q", shape.hidden) + with_input * norm)
    if shape.qk_norm:
        token += query * 4 * (shape.query + shape.heads)
        half += tokens * key * 4 * (shape.key + shape.kv_heads)
    if work.eager:
        scored = query or key
        token += e * shape.query * key  # a factor is kept for the other one's gradient
        half += keys * e * shape.query * (query + scored)
        half += scores * (scored + shape.attention_softcap * scored * e / 4)
        half += scores * e / 4 * (value and (e != 4 or not scored))
        token += inputs("o", shape.query)
    else:
        token += attends * (2 * e * shape.query + work.wide * shape.heads)  # q, output, normaliser
        half += keys * attends * 2 * e * shape.query
        token += inputs("o", shape.query, there=attends)
    attends = attends or "o_proj" in adapted
    token += norm * (shape.norms == 4 and attends)
    half += run * token

    inner = with_input or attends
    gate, up = inner or "gate_proj" in adapted, inner or "up_proj" in adapted
    token = norm * inner + inputs("gate up", shape.hidden) + inputs("down", shape.intermediate)
    token += e * shape.intermediate * (2 * gate + up)
    token += norm * (shape.norms == 4 and (gate or up or "down_proj" in adapted))
    return half, run * token


def shared_by_layers(
    work: Workload, table: Table, windows: set[int | None], queries: int | None = None
) -> float:
    """Bytes of a table's masks, one a window, and of its rotary embeddings; at `queries` columns a row."""
    kinds = 2 if work.shape.per_type_rotary else 1
    run = table.rows * (table.columns if queries is None else queries)
    return work.element * run * (len(windows) * table.keys + kinds * 2 * work.shape.head_dim)


def kept_by_head(work: Workload, rows: int, targets: int) -> float:
    """Bytes that the backward pass needs of the final norm and the head: the norm's input, and the gradient
    of log Z by it."""
    return rows * (work.shape.hidden * (4 + work.wide) + 4) + work.wide * targets


def last_queries(work: Workload, table: Table) -> int | None:
    """The columns a row that the last layer is run at, None where it is all: see `engine.policy.Policy`."""
    widest = min(-(-table.head // table.rows), table.columns) if table.widest is None else table.widest
    return widest if not work.plain and widest <= _FEW_ROWS * table.columns else None


def kept_by_pack(work: Workload, table: Table) -> float:
    """Bytes that the backward pass needs of a table, the keys and values of its stem among them not."""
    top, queries = work.shape.layers - 1, last_queries(work, table)
    layers = sum(
        sum(kept_by_layer(work, table, i > work.cut, queries if i == top else None))
        for i in range(work.cut, work.shape.layers)
    )
    attends = not work.modules.isdisjoint({"q_proj", "k_proj", "v_proj"})

    def masks(numbers: range) -> set[int | None]:
        # eager attention adds its mask, and keeps the softmax of the sum
        seen = {work.shape.windows[i] for i in numbers if attends or i > work.cut}
        return set() if work.eager else seen

    if queries is None:
        shared = shared_by_layers(work, table, masks(range(work.cut, top + 1)))
    else:
        shared = shared_by_layers(work, table, masks(range(work.cut, top)))
        shared += shared_by_layers(work, table, masks(range(top, top + 1)), queries)
    return layers + shared + kept_by_head(work, table.head, table.targets)


def layer_moment(work: Workload, rows: int, columns: int, keys: int | None = None) -> float:
    """Bytes alive within a layer's forward pass beside its input and what the backward pass needs.

    `keys` a query sees, by default the columns.
    """
    shape, e, wide = work.shape, work.element, work.wide
    keys = columns if keys is None else keys
    attention = e * (2 * shape.hidden + 4 * shape.query + 2 * shape.key)
    if work.eager:
        attention += shape.heads * keys * max(2 * e, e + 4 + (e != 4) * e)
    mlp = e * (3 * shape.hidden + 3 * shape.intermediate)
    norm = e * shape.hidden + (e != 4) * 8 * shape.hidden
    found = max(attention, mlp, norm)
    for name in work.modules:  # beside the module's own output: the adapter's, scaled, and the sum
        inputs, outputs = shape.linear()[name]
        around = 2 * e * shape.hidden + (e * shape.intermediate if name in ("up_proj", "down_proj") else 0)
        found = max(found, around + (e != wide) * wide * inputs + outputs * (e + 2 * wide))
    return rows * columns * found


def backward_moment(work: Workload, table: Table, queries: int | None = None) -> tuple[float, float]:
    """Bytes of gradients alive within one layer's backward pass: (in attention, in the MLP)."""
    shape, e = work.shape, work.element
    tokens = table.rows * (table.columns if queries is None else queries)
    inner = max(3 * e, (work.wide + 2 * e) if "down_proj" in work.modules else 0)
    mlp = tokens * (2 * e * shape.hidden + inner * shape.intermediate)
    # queries, the output, and of keys and values those of every head
    attention = (
        tokens * e * (2 * shape.hidden + 3 * shape.query) + table.rows * table.keys * 2 * e * shape.query
    )
    if work.eager:
        attention += shape.heads * tokens * table.keys * (8 if e == 4 else 8 + e)
    return attention, mlp


# ---- decode steps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeTable:
    """What a captured decode step has room for: `prompts` of `slots` tokens, and of each `each` completions
    of `length` tokens. `sampled`: noise is drawn, and what the update needs is recorded."""

    prompts: int
    each: int
    slots: int
    length: int
    sampled: bool

    @classmethod
    def of(cls, prompts: int, each: int, width: int, length: int, sampled: bool) -> "DecodeTable":
        """Rounds up as `engine.decode_graph.StepShape` does, so that waves that are alike share a step."""
        power = 1 << max(prompts - 1, 0).bit_length()
        fewer = 3 * power // 4
        prompts = fewer if prompts <= fewer else power
        return cls(prompts, each, *(-(-n // _SLOTS) * _SLOTS for n in (width, length)), sampled)

    @property
    def rows(self) -> int:
        """Completions, those that are not there among them."""
        return self.prompts * self.each


def waves_of(prompts: int, generations: int, size: int) -> list[tuple[int, int]]:
    """The different waves of `size` completions: (prompts, most completions of one of them), the largest
    first.

    >>> waves_of(8, 50, 256), waves_of(2, 6, 4)
    ([(6, 50), (3, 50)], [(2, 2), (1, 4)])
    """
    total, found = prompts * generations, set()
    for start in range(0, total, size):
        stop = min(start + size, total)
        first, last = start // generations, (stop - 1) // generations
        ends = (generations * (first + 1) - start, stop - generations * last)
        most = generations if last - first > 1 else stop - start if last == first else max(ends)
        found.add((last - first + 1, most))
    return sorted(found, key=lambda wave: (-wave[0] * wave[1], -wave[0]))


def decode_buffers(work: Workload, table: DecodeTable) -> float:
    """Bytes that a decode step keeps for the next wave: caches, what is recorded, the next logits."""
    shape, e, wide, rows = work.shape, work.element, work.wide, table.rows
    token = shape.layers * 2 * shape.key * e
    copies = token * table.slots * (rows - table.prompts)
    weights = shape.weight_bytes(e, work.quantised) + work.adapter_bytes
    of_prompts = table.prompts if copies > _SHARE_FROM * weights else rows  # held once, or for each row
    cache = token * (of_prompts * table.slots + rows * table.length)
    recorded = rows * table.length * (8 + 2 * wide + table.sampled * wide)
    trunk = table.sampled * work.recorded * rows * table.length * shape.hidden * e
    kinds = 2 if shape.per_type_rotary else 1
    rotary = kinds * 2 * (table.slots + table.length) * shape.head_dim * e
    return cache + recorded + trunk + rotary + rows * shape.vocabulary * wide


def decode_moment(work: Workload, table: DecodeTable) -> float:
    """Bytes alive within a decode step: while a token is chosen, or within a layer, or in the head."""
    shape, e, wide, rows = work.shape, work.element, work.wide, table.rows
    chosen = 3 * wide  # weights, probabilities, and the terms of the entropy or blocks of sums
    head = max(e + wide, 2 * wide) if e != wide or work.shape.logit_scale else wide
    seen = table.slots + table.length
    masks = 2 * len(set(shape.windows)) * table.prompts * seen * wide
    # scores of both parts, joined, scaled, masked; their softmax; in the model's dtype
    layer = max(layer_moment(work, rows, 1, 1), 4 * rows * shape.heads * seen * wide)
    return max(rows * shape.vocabulary * max(chosen, head), layer + masks)


# ---- tables ----------------------------------------------------------------------------------------------


def pack_table(work: Workload, pack_size: int) -> Table:
    """The largest pack: full length, nothing shared but the prompt.

    For T-SPMO two completions each share all but their last token: the most that can need running.
    """
    if work.plain:
        rows = max(min(pack_size // work.path, work.prompts * work.generations), 1)
        return Table(rows, work.path, 0, *_heads(work, rows, work.path - work.prompt + 1))
    branches = work.generations // 2 if work.algorithm == "t-spmo" else work.generations
    behind = branches * (work.length - 1)
    if work.prompt + behind <= pack_size:
        rows = max(min(pack_size // (work.prompt + behind), work.prompts), 1)
        return Table(rows, work.prompt + behind, 0, *_heads(work, rows, behind + 1))
    columns = min(1 + behind, max(pack_size, work.length))
    return Table(1, columns, work.prompt - 1, *_heads(work, 1, columns))


def _heads(work: Workload, rows: int, inside: int) -> tuple[int, int]:
    """Of tables with `inside` tokens of a trie a row: tokens whose next-token distribution is needed, and
    weighted tokens that they predict, at most."""
    if work.algorithm == "t-spmo":
        forks = rows * min(inside, work.generations - 1)
        return forks, 2 * forks
    if work.kept_tokens is not None:
        paths = -(-inside // max(work.length - 1, 1))
        inside = min(inside, paths * min(work.kept_tokens, work.length))
    return rows * inside, rows * inside
