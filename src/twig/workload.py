"""What a run does, as far as memory depends on it: its tables, and what one layer holds while it runs.

Numbers of bytes from a shape, walked through as the code goes; no torch. Names of sizes: `rows` x `columns` =
`tokens` of a table.
"""

from dataclasses import dataclass

from twig.shape import Shape


@dataclass(frozen=True)
class Work:
    """What a run does, as far as memory depends on it.

    `kind` of device: cpu, cuda or mps. `element`, `stored`, `wide`: bytes of a number of the base, of the
    base on disk, and of adapter, log-probs and loss. `quantised`: nf4, int8 or None. `adapted`: numbers of
    the layers with adapters on `modules`. `moments`: numbers that the optimizer keeps for each of the
    adapter. `kept_tokens`: most tokens with credit in a completion (None: all). `prompt`: tokens of the
    longest prompt.
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
    evaluated_between: bool

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
class Sizes:
    """How much is computed at once."""

    wave_size: int
    pack_size: int
    head_chunk: int
    checkpoint_layers: bool
    eval_batch_size: int


# ---- one layer -------------------------------------------------------------------------------------------


def kept_by_layer(work: Work, rows: int, columns: int, with_input: bool) -> tuple[float, float]:
    """Bytes that the backward pass needs of one adapted layer: (attention's half, the MLP's half).

    `with_input`: whether a gradient goes to the layer's input; not so in the lowest one. The mask and the
    rotary embeddings are shared by all layers and not in here. The base's weights have no gradient, so a
    linear layer keeps its input only for its own adapter, and in the adapter's precision.
    """
    shape, e, adapted = work.shape, work.element, work.modules
    tokens, scores = rows * columns, 4 * shape.heads * rows * columns**2
    norm = 4 * shape.hidden + 4  # in float32, whatever the model is; and one factor a token

    def inputs(names: str, width: int, there: bool = False) -> float:
        count = sum(f"{name}_proj" in adapted for name in names.split())
        copies = count if e != work.wide else int(count > 0 and not there)
        return work.wide * (copies * width + count * work.rank)

    query, key, value = (with_input or f"{name}_proj" in adapted for name in "qkv")
    attends = query or key or value
    token = inputs("q k v", shape.hidden) + with_input * norm
    if shape.qk_norm:
        token += query * 4 * (shape.query + shape.heads) + key * 4 * (shape.key + shape.kv_heads)
    half = 0.0
    if work.eager:
        scored = query or key
        token += e * shape.query * (key + query + scored)  # a factor is kept for the other one's gradient
        half += scores * (scored + shape.attention_softcap * scored * e / 4)
        half += scores * e / 4 * (value and (e != 4 or not scored))
        token += inputs("o", shape.query)
    else:
        token += attends * (4 * e * shape.query + work.wide * shape.heads)  # q, k, v, output, normaliser
        token += inputs("o", shape.query, there=attends)
    attends = attends or "o_proj" in adapted
    token += norm * (shape.norms == 4 and attends)
    half += tokens * token

    inner = with_input or attends
    gate, up = inner or "gate_proj" in adapted, inner or "up_proj" in adapted
    token = norm * inner + inputs("gate up", shape.hidden) + inputs("down", shape.intermediate)
    token += e * shape.intermediate * (2 * gate + up)
    token += norm * (shape.norms == 4 and (gate or up or "down_proj" in adapted))
    return half, tokens * token


def shared_by_layers(work: Work, rows: int, columns: int, windows: set[int | None]) -> float:
    """Bytes of a table's masks, one a window, and of its rotary embeddings."""
    kinds = 2 if work.shape.per_type_rotary else 1
    masks = len(windows) * rows * columns**2
    return work.element * (masks + kinds * 2 * rows * columns * work.shape.head_dim)


def kept_by_head(work: Work, rows: int, targets: int) -> float:
    """Bytes that the backward pass needs of the final norm and the head: the norm's input, and the gradient
    of log Z by it."""
    return rows * (work.shape.hidden * (4 + work.wide) + 4) + work.wide * targets


def kept_by_pack(work: Work, rows: int, columns: int, head: int, targets: int) -> float:
    """Bytes that the backward pass needs of a table, with `head` rows of it predicting `targets` tokens."""
    upper = range(work.cut, work.shape.layers)
    layers = sum(sum(kept_by_layer(work, rows, columns, i > work.cut)) for i in upper)
    attends = not work.modules.isdisjoint({"q_proj", "k_proj", "v_proj"})
    windows = {work.shape.windows[i] for i in upper if attends or i > work.cut}
    if work.eager:  # it adds its mask, and keeps the softmax of the sum
        windows = set()
    shared = shared_by_layers(work, rows, columns, windows)
    return layers + shared + kept_by_head(work, head, targets)


def layer_moment(work: Work, rows: int, columns: int, keys: int | None = None) -> float:
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


def backward_moment(work: Work, rows: int, columns: int) -> tuple[float, float]:
    """Bytes of gradients alive within one layer's backward pass: (in attention, in the MLP)."""
    shape, e = work.shape, work.element
    tokens = rows * columns
    inner = max(3 * e, (work.wide + 2 * e) if "down_proj" in work.modules else 0)
    mlp = tokens * (2 * e * shape.hidden + inner * shape.intermediate)
    attention = tokens * e * (2 * shape.hidden + 5 * shape.query)
    if work.eager:
        attention += shape.heads * rows * columns**2 * (8 if e == 4 else 8 + e)
    return attention, mlp


# ---- tables ----------------------------------------------------------------------------------------------


def pack_table(work: Work, pack_size: int) -> tuple[int, int]:
    """(rows, columns) of the largest pack: full length, nothing shared but the prompt.

    For T-SPMO two completions each share all but their last token: the most that can need running.
    """
    if work.plain:
        return max(min(pack_size // work.path, work.prompts * work.generations), 1), work.path
    branches = work.generations // 2 if work.algorithm == "t-spmo" else work.generations
    trie = work.prompt + branches * (work.length - 1)
    columns = min(trie, max(pack_size, work.path))
    return max(min(pack_size // columns, work.prompts if columns == trie else 1), 1), columns


def head_rows(work: Work, rows: int, columns: int) -> tuple[int, int]:
    """(tokens whose next-token distribution a pack needs, weighted tokens that it predicts) at most."""
    inside = max(columns - work.prompt + 1, 1)
    if work.algorithm == "t-spmo":
        forks = rows * min(inside, work.generations - 1)
        return forks, 2 * forks
    if work.kept_tokens is not None:
        paths = -(-inside // max(work.length - 1, 1))
        inside = min(inside, paths * min(work.kept_tokens, work.length))
    return rows * inside, rows * inside
