"""The memory of each phase of a run, item by item: what the code holds, walked through in its order.

A phase is a `Ledger`: what is taken is added, what is given back is subtracted, and the peak is the largest
sum at any one time, with the items that were alive then. Lengths are the longest that the settings allow and
completions share nothing, so a prediction is a bound, reached where nothing ends early.

No torch.
"""

from dataclasses import dataclass, field

from twig.workload import (
    Sizes,
    Table,
    Work,
    backward_moment,
    kept_by_layer,
    last_queries,
    layer_moment,
    pack_table,
)

MIB = 2**20
# What the first calls of the libraries take and keep, beside all tensors: code that is mapped when it is
# first used, thread pools, workspaces; the backward pass adds its own. CPU: measured, see
# docs/performance.md. CUDA (with the context) and Apple: not measured.
LIBRARIES = {"cpu": 45 * MIB, "cuda": 600 * MIB, "mps": 300 * MIB}
BACKWARD_LIBRARIES = {"cpu": 15 * MIB, "cuda": 0, "mps": 0}
# The check of a model's layers when it is opened: rows of logits alive at once (`decoder.Decoder.check`).
_CHECK_ROWS = 94
_COMPACTED = 0.75  # of a wave's rows, at most, when the finished ones are left out
_INT, _BOOL = 8, 1


@dataclass(frozen=True)
class Item:
    """One thing that takes memory: its name and bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Phase:
    """A phase of a run at its peak: `items` are what is alive then, the largest first; they add up to
    `peak`."""

    name: str
    items: tuple[Item, ...]

    @property
    def peak(self) -> int:
        return sum(item.size for item in self.items)


class Ledger:
    """What is alive, by name, and what was at the peak so far."""

    def __init__(self, live: dict[str, float] | None = None) -> None:
        self.live = dict(live or {})
        self.highest, self.peak = dict(self.live), sum(self.live.values())

    def take(self, name: str, size: float) -> None:
        """`size` bytes more under `name`."""
        self.live[name] = self.live.get(name, 0) + size
        total = sum(self.live.values())
        if total > self.peak:
            self.highest, self.peak = dict(self.live), total

    def drop(self, name: str, size: float | None = None) -> None:
        """Gives back `size` bytes of `name`, by default all."""
        self.live[name] = 0 if size is None else self.live[name] - size

    def moment(self, name: str, size: float) -> None:
        """`size` bytes that are alive beside everything else, and gone at once."""
        self.take(name, size)
        self.drop(name, size)

    def phase(self, name: str) -> Phase:
        """The phase at its peak."""
        items = [Item(key, round(size)) for key, size in self.highest.items() if size > 0]
        return Phase(name, tuple(sorted(items, key=lambda item: -item.size)))


# ---- phases ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """The phases of `work` done in pieces of `sizes`."""

    work: Work
    sizes: Sizes
    base: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        work = self.work
        base = {"base weights": work.shape.weight_bytes(work.element, work.quantised)}
        base |= {"libraries": LIBRARIES[work.kind], "adapter": work.adapter_bytes}
        object.__setattr__(self, "base", base)

    def phases(self) -> tuple[Phase, ...]:
        """Loading, sampling, update and evaluation."""
        return self.loading(), self.sampling(), self.update(), self.evaluation()

    def loading(self) -> Phase:
        """Files are mapped, not read: weights that keep their dtype stay pages of the file, others are a copy
        beside it. What goes to a GPU is read into the machine's own memory first, which is not counted."""
        work = self.work
        ledger = Ledger(self.base)
        copied = work.stored != work.element if work.kind == "cpu" else work.kind == "mps"
        if copied:
            ledger.moment("weights as stored", work.shape.weight_bytes(work.stored))
        ledger.moment("check of the layers", _CHECK_ROWS * work.shape.vocabulary * work.element)
        return ledger.phase("loading")

    def _trained(self) -> Ledger:
        """What is alive from the first step on."""
        work = self.work
        ledger = Ledger(self.base)
        ledger.take("libraries", BACKWARD_LIBRARIES[work.kind])
        ledger.take("gradients", work.adapter_bytes)
        ledger.take("optimizer", work.moments * work.adapter_bytes)
        return ledger

    def _boundary(self, ledger: Ledger) -> None:
        work = self.work
        tokens = work.prompts * (work.prompt + work.generations * work.length)
        if work.recorded:
            ledger.take("trunk's output, recorded", tokens * work.shape.hidden * work.element)

    def sampling(self) -> Phase:
        """A wave from its prompts to its last token."""
        work = self.work
        ledger = self._trained()
        self._boundary(ledger)
        rows = min(self.sizes.wave_size, work.prompts * work.generations)
        ledger.take("sampled tokens", work.prompts * work.generations * work.length * 36)
        if work.plain:
            self._plain_wave(ledger, min(rows, work.generations))
        else:
            exact, rest = divmod(rows, work.generations)
            # A restart's prompt has all but one token of a completion, beside a prompt with none of it.
            width = work.path if work.restarts else work.prompt
            self._wave(ledger, rows, min(work.prompts, exact + 2 * (rest > 0) - (exact == 0)), width)
        return ledger.phase("sampling")

    def evaluation(self) -> Phase:
        """One greedy answer a problem, after training; between steps the last batch is still there."""
        work = self.work
        ledger = self._trained()
        if work.evaluated_between:
            self._boundary(ledger)
        rows = min(self.sizes.eval_batch_size, work.questions)
        if work.plain:
            self._plain_wave(ledger, min(rows, 1))
        else:
            self._wave(ledger, rows, rows, work.prompt)
        return ledger.phase("evaluation")

    def _wave(self, ledger: Ledger, rows: int, prompts: int, width: int) -> None:
        """`rows` completions of `prompts` prompts of up to `width` tokens."""
        work, shape, e, wide = self.work, self.work.shape, self.work.element, self.work.wide
        slots = width + work.length
        row = shape.layers * 2 * shape.key * e  # keys and values of a token
        hidden, prompt_tokens = shape.hidden * e, prompts * width
        ledger.take("sampled tokens", rows * work.length * (3 * wide + 2 * _INT))

        masks = self._masks(ledger, prompts, width, set(shape.windows))
        ledger.take("key-value cache", prompt_tokens * row)
        ledger.take("activations", 2 * prompt_tokens * hidden)  # the trunk's output and what goes on
        ledger.moment("activations", layer_moment(work, prompts, width))
        ledger.drop("masks", masks)
        ledger.take("logits", (2 * prompts + rows) * shape.vocabulary * wide)
        ledger.drop("logits", 2 * prompts * shape.vocabulary * wide)
        # The buffers of the whole wave are made at once; a CPU gives their pages as they are written to.
        first = width if work.kind == "cpu" else slots
        ledger.take("key-value cache", rows * first * row)
        ledger.drop("key-value cache", prompt_tokens * row)
        ledger.take("key-value cache", rows * (slots - first) * row)
        ledger.drop("activations")

        kinds = 2 if shape.per_type_rotary else 1
        ledger.take("masks", rows * (slots * (_INT + _BOOL) + work.length * 2 * kinds * shape.head_dim * e))
        # Choosing a token: logits, log-probs, probabilities, and their sums or entropies.
        ledger.moment("logits", 3 * rows * shape.vocabulary * wide)
        # Rows that ended are left out, and the others copied, one layer after another.
        ledger.moment("key-value cache", _COMPACTED * rows * slots * row / shape.layers)
        ledger.take("activations", rows * hidden)
        ledger.moment("activations", layer_moment(work, rows, 1, slots))
        ledger.moment("logits", rows * shape.vocabulary * (2 * wide if e == wide else wide + e))

    def _masks(
        self, ledger: Ledger, rows: int, columns: int, windows: set[int | None], keys: int | None = None
    ) -> float:
        """Takes the masks and rotary embeddings of a table; returns their bytes."""
        shape, e = self.work.shape, self.work.element
        cells = rows * columns * (columns if keys is None else keys)
        if any(window is not None for window in windows):
            ledger.moment("masks", cells * (_INT + 2 * _BOOL))
        rotary = 2 * rows * columns * shape.head_dim * e * (2 if shape.per_type_rotary else 1)
        size = len(windows) * cells * e + rotary
        ledger.take("masks", size)
        ledger.moment("masks", cells * _BOOL)
        return size

    def update(self) -> Phase:
        """The packs of one batch, forward and backward, and the optimizer's step."""
        work, shape = self.work, self.work.shape
        ledger = self._trained()
        self._boundary(ledger)
        ledger.take("sampled tokens", work.prompts * work.generations * work.length * (36 + 4 * _INT))
        table = pack_table(work, self.sizes.pack_size)
        if work.plain:
            self._plain_pack(ledger, table)
        else:
            stem = 2 * table.stem * shape.key * work.element  # keys and values of a layer
            ledger.take("prompt's keys and values", (shape.layers - work.cut * work.recorded) * stem)
            self._pack(ledger, table)
            ledger.take("prompt's keys and values", (shape.layers - work.cut) * stem)  # their gradients
            if table.stem:
                self._stem(ledger, Table(1, table.stem, 0, 0, 0))
        ledger.take("gradients", work.adapter_bytes)  # the pack's, before they are added to the batch's
        ledger.drop("gradients", work.adapter_bytes)
        return ledger.phase("update")

    def _pack(self, ledger: Ledger, table: Table) -> None:
        work, shape, e = self.work, self.work.shape, self.work.element
        hidden, tokens, top = shape.hidden * e, table.tokens, shape.layers - 1
        rows, columns, queries = table.rows, table.columns, last_queries(work, table)
        cells, square = tokens * table.keys, columns**2 * _BOOL
        ledger.take("masks", (1 + (table.stem == 0)) * cells * _BOOL + square)
        ledger.drop("masks", (table.stem == 0) * cells * _BOOL + square)
        masks = self._masks(ledger, rows, columns, set(shape.windows), table.keys)
        ledger.take("activations", tokens * hidden)  # the trunk's output
        if not work.recorded and work.cut > 0:
            ledger.moment("activations", layer_moment(work, rows, columns, table.keys))

        kept = {
            i: kept_by_layer(work, table, i > work.cut, queries if i == top else None)
            for i in range(work.cut, shape.layers)
        }
        padded = cells * e if work.kind == "cuda" and not work.eager and table.keys % 8 else 0
        own = 2 * tokens * shape.key * e * (table.stem > 0)  # keys and values before the stem's join them
        for i, halves in kept.items():
            run = tokens if i < top or queries is None else rows * queries
            inner = layer_moment(work, 1, run, table.keys)
            ledger.take("activations", own)
            if self.sizes.checkpoint_layers:
                ledger.moment("activations", inner)
                ledger.take("kept for backward", tokens * hidden * (i > work.cut))
            else:
                ledger.take("kept for backward", sum(halves))
                ledger.take("masks", padded)
                ledger.moment("activations", run * (3 * hidden + shape.intermediate * e))
        ledger.drop("activations", own * len(kept))
        ledger.drop("masks", cells * _BOOL + (masks if work.eager else 0))
        if not self.sizes.checkpoint_layers:
            ledger.drop("activations", tokens * hidden)

        self._head(ledger, table.head, table.targets)
        ledger.take("activations", tokens * hidden)  # the gradient that comes down
        numbers = [top] if queries is None or top == work.cut else [top, top - 1]
        for i in numbers:  # the last layer may run at few columns; the one below it then needs more
            at = queries if i == top else None
            self._layer_backward(ledger, table, kept[i], at, padded)
        for name in ("activations", "masks", "kept for backward"):
            ledger.drop(name)

    def _layer_backward(
        self, ledger: Ledger, table: Table, kept: tuple[float, float], queries: int | None, padded: float
    ) -> None:
        work = self.work
        attention, mlp = backward_moment(work, table, queries)
        if self.sizes.checkpoint_layers:
            run = table.tokens if queries is None else table.rows * queries
            ledger.moment("activations", layer_moment(work, 1, run, table.keys))
            ledger.take("kept for backward", sum(kept))
            ledger.take("masks", padded)
        ledger.moment("activations", mlp)
        ledger.drop("kept for backward", kept[1])
        ledger.moment("activations", attention)
        ledger.drop("kept for backward", kept[0])
        if self.sizes.checkpoint_layers:
            ledger.drop("masks", padded)

    def _stem(self, ledger: Ledger, table: Table) -> None:
        """A prompt is run again once its packs are done, and their gradients are sent through it."""
        work, shape, e = self.work, self.work.shape, self.work.element
        inputs, below = table.tokens * shape.hidden * e, range(work.cut, shape.layers - 1)
        self._masks(ledger, table.rows, table.columns, set(shape.windows))
        ledger.take("activations", inputs)
        kept = {i: kept_by_layer(work, table, i > work.cut) for i in below}
        for i, halves in kept.items():
            ledger.take(
                "kept for backward", inputs * (i > work.cut) if self.sizes.checkpoint_layers else sum(halves)
            )
        ledger.moment("activations", layer_moment(work, table.rows, table.columns))
        if kept:
            self._layer_backward(ledger, table, kept[max(kept)], None, 0)
        for name in ("activations", "masks", "kept for backward"):
            ledger.drop(name)

    def _head(self, ledger: Ledger, rows: int, targets: int) -> None:
        """From the last layer's output at `rows` to its gradient."""
        shape, e, wide = self.work.shape, self.work.element, self.work.wide
        width = shape.hidden
        chunk = min(max(self.sizes.head_chunk // rows, 1), shape.vocabulary) * rows
        several = chunk < rows * shape.vocabulary
        ledger.take(
            "head", rows * width * (e + 4 + e + wide)
        )  # rows, the norm's input and output, log Z's gradient
        # One chunk is computed while the one before is still there.
        size = wide * several + e + wide * (e != wide) + 2 * wide * shape.logit_softcap
        ledger.moment("head chunk", chunk * size)
        ledger.moment("head", targets * width * (e + wide + wide * (e != wide)) + rows * width * wide)
        ledger.drop("head")

    # ---- the plain engine ------------------------------------------------------------------------------

    def _plain_wave(self, ledger: Ledger, rows: int) -> None:
        """A prompt's completions by the model's own forward: the logits of the whole prompt, a cache that is
        copied as it grows."""
        work, shape, e, wide = self.work, self.work.shape, self.work.element, self.work.wide
        row = shape.layers * 2 * shape.key * e
        ledger.take("key-value cache", rows * work.prompt * row)
        ledger.take("activations", rows * work.prompt * shape.hidden * e)
        ledger.moment("activations", layer_moment(work, rows, work.prompt))
        ledger.moment(
            "logits", rows * work.prompt * shape.vocabulary * e + 4 * rows * shape.vocabulary * wide
        )
        ledger.drop("activations")
        ledger.take("key-value cache", rows * work.length * row)
        ledger.moment("key-value cache", rows * (work.prompt + work.length) * row / shape.layers)
        ledger.moment("logits", rows * shape.vocabulary * (4 * wide + e))

    def _plain_pack(self, ledger: Ledger, table: Table) -> None:
        """Whole rows through the whole model, logits of every token among them."""
        work, shape, e, wide = self.work, self.work.shape, self.work.element, self.work.wide
        tokens, head = table.tokens, table.head
        ledger.take("masks", tokens * table.columns * _BOOL)
        ledger.take("activations", tokens * shape.hidden * e)
        for i in range(work.cut, shape.layers):
            ledger.take("kept for backward", sum(kept_by_layer(work, table, i > work.cut)))
        ledger.take("logits", tokens * shape.vocabulary * e)
        ledger.take("logits", head * shape.vocabulary * wide * (1 + (e != wide)))
        ledger.moment("logits", (head * wide + tokens * e) * shape.vocabulary)
        ledger.drop("logits")
        ledger.moment("activations", max(backward_moment(work, table)))
