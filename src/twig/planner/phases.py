"""Predicts the memory of each phase of a run, item by item, in the order in which the code takes it.

A phase is a `Ledger`: memory that is taken is added, memory that is given back is subtracted, and the peak is
the largest sum at any one time, with the items that were alive then. Lengths are the longest that the
settings allow and completions share nothing, so a prediction is a bound, reached if nothing ends early.

On a CUDA device a phase counts its tensors and, in the items named in `OUTSIDE`, everything else.

No torch.
"""

from dataclasses import dataclass, field

from twig.config.sizes import Sizes
from twig.planner.layer_costs import (
    HEAD_PART,
    HELD_FROM,
    LOGITS_AT_ONCE,
    READ_AT_ONCE,
    DecodeTable,
    Halves,
    Table,
    Wave,
    Workload,
    backward_moment,
    decode_buffers,
    decode_moment,
    kept_by_layer,
    last_queries,
    layer_moment,
    pack_tables,
    shared_moment,
    waves_of,
)
from twig.planner.ledger import Ledger, Phase
from twig.runtime.memory_use import CUDA_CONTEXT, MIB

MEASURED = ("cpu", "cuda")  # the kinds of device whose constants were measured: see docs/performance.md
# Memory that the first calls of the libraries take and keep, beside all tensors: code that is mapped when it
# is first used, thread pools, workspaces; the backward pass adds more.
LIBRARIES = {"cpu": 45 * MIB, "mps": 300 * MIB}
BACKWARD_LIBRARIES = {"cpu": 15 * MIB, "mps": 0}

ONEDNN_CODE = 20 * MIB  # products compiled by oneDNN: see `engine.kernels`

CUDA_GRAPH = 48 * MIB  # outside torch: the nodes of a captured decode step
CUDA_WORKSPACE = 32 * MIB  # cuBLAS's, allocated by torch for each thread and stream; 8 MiB before Hopper
CUDA_RESERVE = 0.04  # of the tensors: holes in the segments that torch's allocator cuts them from
# Memory that a process takes on a CUDA device outside torch's allocator, whose limit has to be lower by it.
CUDA_OUTSIDE = CUDA_CONTEXT + CUDA_GRAPH
# The items that torch does not count as allocated; a graph's memory is not allocated between two replays.
OUTSIDE = ("context", "captured graph", "allocator's reserve")
# Rows of logits alive at once while a model's layers are checked at loading (`Decoder.check`).
_CHECK_ROWS = 94
# Of what the backward pass needs of a mixer, the share that is alive while it reads a prompt.
_READING = 0.8
# If gradients are compared there: both paths of `decoder.LONG`, their gradient, and a random one of its tree.
_GRADIENT_ROWS, _LONG_PATH = 2 * 2 * 136 + 139, 136
_INT, _BOOL = 8, 1


def _largest_matrix(work: Workload) -> int:
    """Returns the bytes of a layer's largest matrix, not quantised."""
    return work.element * max(linear.weights for linear in work.shape.linear().values())


# ---- phases ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """The phases of `work` in pieces of `sizes`; with `tensors`, without the items in `OUTSIDE`."""

    work: Workload
    sizes: Sizes
    tensors: bool = False
    base: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        work = self.work
        base: dict[str, float] = {"base weights": work.shape.weight_bytes(work.element, work.quantised)}
        if work.kind == "cuda":
            base |= {"context": CUDA_CONTEXT, "workspaces": CUDA_WORKSPACE}
        else:
            base["libraries"] = LIBRARIES[work.kind]
        if work.packable:
            base["libraries"] += ONEDNN_CODE
        base["adapter"] = work.adapter_bytes
        object.__setattr__(self, "base", self._counted(base))

    def _counted(self, items: dict[str, float]) -> dict[str, float]:
        return {name: size for name, size in items.items() if not (self.tensors and name in OUTSIDE)}

    def _phase(self, ledger: Ledger, name: str) -> Phase:
        """Returns the phase at its peak, with the allocator's reserve."""
        if self.work.kind == "cuda" and not self.tensors:
            own = sum(size for item, size in ledger.highest.items() if item not in OUTSIDE)
            ledger.highest["allocator's reserve"] = CUDA_RESERVE * own
        return ledger.phase(name)

    def phases(self) -> tuple[Phase, ...]:
        """Returns the phases in their order: loading, sampling, update and evaluation."""
        return self.loading(), self.sampling(), self.update(), self.evaluation()

    def loading(self) -> Phase:
        """Predicts loading the weights.

        Files are mapped, not read: weights that keep their dtype stay pages of the file, others are a copy
        beside it. Weights for a GPU are read into the machine's memory first, which is not counted; a matrix
        to quantise is alive beside its quantised form.
        """
        work = self.work
        ledger = Ledger(self.base)
        if work.kind == "cuda" and work.quantised is not None:
            ledger.moment("weights as stored", 2 * _largest_matrix(work))
        copied = work.stored != work.element if work.kind == "cpu" else work.kind == "mps"
        if copied:
            ledger.moment("weights as stored", work.shape.weight_bytes(work.stored))
        ledger.moment("check of the layers", self._check())
        return self._phase(ledger, "loading")

    def _check(self) -> float:
        """Counts the bytes of the check of the layers; gradients are compared if any keeps a state."""
        work, shape = self.work, self.work.shape
        if shape.mixing is None or work.plain:
            return _CHECK_ROWS * shape.vocabulary * work.element
        table = Table(2, _LONG_PATH, 0, 0, 0)
        kept = sum(self._kept(table, i).both for i in range(work.cut, shape.layers))
        return _GRADIENT_ROWS * shape.vocabulary * work.wide + kept + self._mixer_bytes(table, True)

    def _trained(self) -> Ledger:
        """Returns the memory that is alive from the first step on."""
        work = self.work
        ledger = Ledger(self.base)
        if work.kind == "cuda":
            ledger.take("workspaces", CUDA_WORKSPACE)  # the thread of the backward pass has its own
            if work.quantised == "nf4":
                ledger.take("a matrix, unpacked", _largest_matrix(work))
        else:
            ledger.take("libraries", BACKWARD_LIBRARIES[work.kind])
        ledger.take("gradients", work.adapter_bytes)
        ledger.take("optimizer", work.moments * work.adapter_bytes)
        return ledger

    def _boundary(self, ledger: Ledger) -> None:
        work = self.work
        tokens = work.prompts * (work.prompt + work.generations * work.length)
        if work.recorded:
            ledger.take("trunk's output, recorded", tokens * work.shape.boundary(work.cut) * work.element)

    def _packed(self, ledger: Ledger) -> None:
        if self.sizes.packed_weights:
            ledger.take("packed weights", self.work.packed_bytes)

    def sampling(self) -> Phase:
        """Predicts sampling: a wave from its prompts to its last token."""
        work = self.work
        ledger = self._trained()
        self._boundary(ledger)
        total = work.prompts * work.generations
        rows = min(self.sizes.wave_size, total)
        ledger.take("sampled tokens", total * work.length * 36)
        width = work.sampled_prompt
        if work.plain:
            self._packed(ledger)
            self._plain_wave(ledger, rows, self._prompts_of(rows), width)
        elif work.static_decode:
            largest = waves_of(work.prompts, work.generations, self.sizes.wave_size)[0]
            self._decode_wave(ledger, self._decode_tables(), largest.prompts, width)
        else:
            self._packed(ledger)
            self._wave(ledger, rows, self._prompts_of(rows), width, work.filled)
        return self._phase(ledger, "sampling")

    def _prompts_of(self, rows: int) -> int:
        """Returns the most prompts that a wave of `rows` completions can have."""
        exact, rest = divmod(rows, self.work.generations)
        return min(self.work.prompts, exact + 2 * (rest > 0) - (exact == 0))

    def evaluation(self) -> Phase:
        """Predicts one greedy answer a problem, in the largest batch.

        Prompts of similar length are answered together. So the longest of all are in the last batch, which
        may be a small one, and the batch before it has shorter ones.
        """
        lengths, size = self.work.questions, max(self.sizes.eval_batch_size, 1)
        whole = len(lengths) // size * size
        batches = [(size, lengths[whole - 1])] if whole else []
        batches += [(len(lengths) - whole, lengths[-1])] if whole < len(lengths) else []
        phases = [self._batch(rows, width) for rows, width in batches or [(0, self.work.prompt)]]
        return max(phases, key=lambda phase: phase.peak)

    def _batch(self, rows: int, width: int) -> Phase:
        """Predicts a batch of an evaluation; between training steps the last step's is still alive."""
        work = self.work
        ledger = self._trained()
        if work.evaluated_between:
            self._boundary(ledger)
        if work.plain:
            self._packed(ledger)
            self._plain_wave(ledger, rows, rows, width)
        elif work.static_decode:
            table = DecodeTable.of(Wave(rows, 1), width, work.length, False)
            self._decode_wave(ledger, [table], rows, width)
        else:
            self._packed(ledger)
            self._wave(ledger, rows, rows, width)
        return self._phase(ledger, "evaluation")

    def _decode_tables(self) -> list[DecodeTable]:
        """Returns the tables kept for the waves of a step, the largest first: two shapes at most."""
        work = self.work
        width = work.sampled_prompt
        waves = waves_of(work.prompts, work.generations, self.sizes.wave_size)
        tables = [DecodeTable.of(wave, width, work.length, True) for wave in waves]
        return list(dict.fromkeys(tables))[:2]

    def _keep_steps(self, ledger: Ledger, tables: list[DecodeTable]) -> None:
        """Takes what captured decode steps hold from the first wave on: buffers, and memory of each graph."""
        work = self.work
        ledger.take("decode buffers", sum(decode_buffers(work, table) for table in tables))
        ledger.take("workspaces", CUDA_WORKSPACE)  # of the stream that captures
        if not self.tensors:
            graphs = sum(decode_moment(work, table) + CUDA_GRAPH for table in tables)
            ledger.take("captured graph", graphs)

    def _decode_wave(self, ledger: Ledger, tables: list[DecodeTable], prompts: int, width: int) -> None:
        """Predicts a wave by captured steps: prompts of `width` tokens, then steps over permanent buffers.

        In the first wave of its shape a step runs uncaptured beside the prompts and is then captured.
        """
        work, shape, e, wide = self.work, self.work.shape, self.work.element, self.work.wide
        table, hidden, prompt_tokens = tables[0], shape.hidden * e, prompts * width
        self._keep_steps(ledger, tables)
        # The noise is alive twice: as drawn and as copied.
        ledger.take("sampled tokens", table.rows * work.length * (2 * table.sampled + 2) * wide)
        masks = self._masks(ledger, prompts, width, set(shape.windows))
        ledger.take("key-value cache", prompt_tokens * shape.attending * 2 * shape.key * e)
        ledger.take("activations", 2 * prompt_tokens * hidden)  # the trunk's output and the top's
        ledger.moment("activations", layer_moment(work, prompts, width))
        ledger.drop("masks", masks)
        ledger.take("logits", prompts * shape.vocabulary * wide)
        spread = table.rows * shape.vocabulary * wide  # the prompts' logits for each of their rows
        ledger.moment("logits", max(spread, decode_moment(work, table)) if self.tensors else spread)
        for name in ("logits", "activations", "key-value cache"):
            ledger.drop(name)
        if table.sampled and work.recorded:  # recorded rows, and then those in use
            ledger.moment("activations", 2 * table.rows * work.length * hidden)

    def _wave(self, ledger: Ledger, rows: int, prompts: int, width: int, filled: int | None = None) -> None:
        """Predicts a wave of `rows` completions of `prompts` prompts of up to `width` tokens.

        A prompt is held once, but a short one with each completion. The completions use `filled` slots for
        their own tokens (None: all).
        """
        work, shape, e, wide = self.work, self.work.shape, self.work.element, self.work.wide
        row = shape.attending * 2 * shape.key * e  # keys and values of a token
        hidden, prompt_tokens = shape.hidden * e, prompts * width
        together = min(prompts, max(READ_AT_ONCE // max(width, 1), 1)) if work.kind == "cpu" else prompts
        read = together * width
        on_host = 2 * _INT if work.kind == "cpu" else 0  # ids and noise
        ledger.take("sampled tokens", rows * work.length * (2 * wide + on_host))

        masks = self._masks(ledger, together, width, set(shape.windows))
        self._inputs(ledger, read)
        ledger.take("key-value cache", prompt_tokens * row)
        ledger.take("activations", (prompt_tokens + read) * hidden)  # the trunk's output and the top's
        ledger.take("states", prompts * shape.states * wide)
        # Of some prompts at a time, their own output is beside that of all.
        beside = read * hidden if together < prompts else 0
        ledger.moment("activations", self._reading(together, width) + beside)
        for name in ("inputs of layers", "states"):
            ledger.drop(name)
        ledger.drop("masks", masks)
        self._logits(ledger, prompts)
        ledger.drop("activations")
        ledger.drop("logits")
        self._states(ledger, rows, prompts)
        # All buffers are allocated at once; on a CPU, pages count once they are written to.
        filled = rows * work.length if filled is None or work.kind != "cpu" else filled
        copied = width if width < HELD_FROM else 0
        ledger.take("key-value cache", (filled + rows * copied) * row)

        kinds = 2 if shape.per_type_rotary else 1
        ledger.take("masks", prompts * work.length * (_INT + 2 * kinds * shape.head_dim * e))
        # A branch that splits is copied, one buffer after another.
        ledger.moment("key-value cache", rows * (copied + work.length) * shape.key * e)
        inner = max(layer_moment(work, rows, 1, 0), shared_moment(work, rows, prompts, width))
        ledger.moment("activations", rows * hidden + inner)
        self._logits(ledger, rows)

    def _reading(self, prompts: int, width: int) -> float:
        """Counts the bytes alive within a layer that reads prompts: one that attends, or a mixer."""
        work, mixing = self.work, self.work.shape.mixing
        mixed = 0 if mixing is None else _READING * prompts * width * mixing.kept * work.wide
        return max(layer_moment(work, prompts, width), mixed)

    def _inputs(self, ledger: Ledger, tokens: int) -> None:
        """Takes what each layer gets of the tokens; for a moment its two parts are beside it."""
        size = tokens * self.work.shape.layers * self.work.shape.inputs * self.work.element
        ledger.take("inputs of layers", size)
        ledger.moment("inputs of layers", 2 * size)

    def _states(self, ledger: Ledger, rows: int, prompts: int) -> None:
        """Takes the states of a wave: those of its completions, and its prompts'."""
        size = self.work.shape.states * self.work.wide
        if size:
            ledger.take("states", (rows + prompts) * size)
            ledger.moment("states", rows * size / self.work.shape.layers)

    def _kept(self, table: Table, layer: int, queries: int | None = None) -> Halves:
        """Counts what the backward pass needs of a layer, without what `_mixed` takes for its mixer."""
        work, mixing = self.work, self.work.shape.mixing
        halves = kept_by_layer(work, table, layer > work.cut, queries)
        if mixing is None or mixing.attends or not mixing.layers[layer]:
            return halves
        hidden = work.shape.hidden  # the norm's input, and what the mixer reads
        return Halves(table.tokens * (4 * (hidden + 1) + work.wide * hidden), halves.mlp)

    def _mixed(self, ledger: Ledger, table: Table, together: bool) -> None:
        """Takes what the backward pass needs of adapted mixers, `together` or one by one."""
        ledger.take("states", self._mixer_bytes(table, together))

    def _mixer_bytes(self, table: Table, together: bool) -> float:
        work, mixing = self.work, self.work.shape.mixing
        if mixing is None:
            return 0
        adapted = sum(mixing.layers[work.cut :])
        size = work.wide * (table.tokens * mixing.kept + 3 * table.rows * mixing.state)
        return size * (adapted if together else min(adapted, 1))

    def _logits(self, ledger: Ledger, rows: int) -> None:
        """Takes logits of `rows` rows, and what is alive while tokens are drawn from them."""
        work, vocabulary, wide = self.work, self.work.shape.vocabulary, self.work.wide
        capped = rows * vocabulary * wide * self.work.shape.logit_softcap
        inner = max(capped, self._head_product(rows, vocabulary))
        ledger.moment("logits", rows * vocabulary * wide + inner)
        ledger.take("logits", rows * vocabulary * wide)
        at_once = max(LOGITS_AT_ONCE // vocabulary, 1) if work.kind == "cpu" else rows
        # log-probs, probabilities, and their sums or entropies
        ledger.moment("logits", 3 * min(rows, at_once) * vocabulary * wide)

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
        """Predicts an update: the packs of one batch, forward and backward, and the optimizer's step."""
        phases = [self._update(table) for table in pack_tables(self.work, self.sizes.pack_size)]
        return max(phases, key=lambda phase: phase.peak)

    def _update(self, table: Table) -> Phase:
        work, shape = self.work, self.work.shape
        ledger = self._trained()
        self._boundary(ledger)
        if work.static_decode:
            self._keep_steps(ledger, self._decode_tables())
        ledger.take("sampled tokens", work.prompts * work.generations * work.length * (36 + 4 * _INT))
        if work.plain:
            self._plain_pack(ledger, table)
        else:
            stem = 2 * table.stem * shape.key * work.element  # keys and values of a layer
            layers = shape.keyed(work.cut) + shape.taken(work.cut) if work.recorded else shape.keyed(0)
            ledger.take("prompt's keys and values", layers * stem)
            self._pack(ledger, table)
            ledger.take("prompt's keys and values", shape.keyed(work.cut) * stem)  # their gradients
            if table.stem:
                self._stem(ledger, Table(1, table.stem, 0, 0, 0))
        ledger.take("gradients", work.adapter_bytes)  # the pack's, before they are added to the batch's
        ledger.drop("gradients", work.adapter_bytes)
        return self._phase(ledger, "update")

    def _pack(self, ledger: Ledger, table: Table) -> None:
        work, shape, e = self.work, self.work.shape, self.work.element
        hidden, tokens, top = shape.hidden * e, table.tokens, shape.layers - 1
        rows, columns, queries = table.rows, table.columns, last_queries(work, table)
        cells, square = tokens * table.keys, columns**2 * _BOOL
        ledger.take("masks", (1 + (table.stem == 0)) * cells * _BOOL + square)
        ledger.drop("masks", (table.stem == 0) * cells * _BOOL + square)
        masks = self._masks(ledger, rows, columns, set(shape.windows), table.keys)
        ledger.take("activations", tokens * hidden * shape.streams)  # the trunk's output
        self._inputs(ledger, tokens)
        if not work.recorded and work.cut > 0:
            ledger.moment("activations", layer_moment(work, rows, columns, table.keys))

        kept = {i: self._kept(table, i, queries if i == top else None) for i in range(work.cut, shape.layers)}
        padded = cells * e if work.kind == "cuda" and not work.eager and table.keys % 8 else 0
        own = 2 * tokens * shape.key * e * (table.stem > 0)  # keys and values before joining the stem's
        for i, halves in kept.items():
            run = tokens if i < top or queries is None else rows * queries
            inner = layer_moment(work, 1, run, table.keys)
            ledger.take("activations", own)
            if self.sizes.checkpoint_layers and i < top:
                ledger.moment("activations", inner)
                ledger.take("kept for backward", tokens * hidden * (i > work.cut))
            else:
                ledger.take("kept for backward", halves.both)
                ledger.take("masks", padded)
                ledger.moment("activations", run * (3 * hidden + shape.intermediate * e))
        ledger.drop("activations", own * len(kept))
        ledger.drop("masks", cells * _BOOL + (masks if work.eager else 0))
        if not self.sizes.checkpoint_layers:
            ledger.drop("activations", tokens * hidden)

        self._mixed(ledger, table, not self.sizes.checkpoint_layers)
        self._head(ledger, table.head, table.targets)
        ledger.take("activations", tokens * hidden)  # the gradient that comes down
        layers = [top] if queries is None or top == work.cut else [top, top - 1]
        for i in layers:  # the last layer may run at few columns; the one below it then needs more
            again = self.sizes.checkpoint_layers and i < top
            self._layer_backward(ledger, table, kept[i], queries if i == top else None, padded, again)
        ledger.drop("states")
        for name in ("activations", "masks", "kept for backward", "inputs of layers"):
            ledger.drop(name)

    def _layer_backward(
        self, ledger: Ledger, table: Table, kept: Halves, queries: int | None, padded: float, again: bool
    ) -> None:
        """Predicts a layer's backward pass, which runs the layer `again` if it is checkpointed."""
        work = self.work
        gradients = backward_moment(work, table, queries)
        if again:
            ledger.moment("activations", layer_moment(work, 1, table.tokens, table.keys))
            ledger.take("kept for backward", kept.both)
            ledger.take("masks", padded)
        ledger.moment("activations", gradients.mlp)
        ledger.drop("kept for backward", kept.mlp)
        ledger.moment("activations", gradients.attention)
        ledger.drop("kept for backward", kept.attention)
        if again:
            ledger.drop("masks", padded)

    def _stem(self, ledger: Ledger, table: Table) -> None:
        """Predicts the backward pass of a prompt, which runs again once its packs are done."""
        work, shape, e = self.work, self.work.shape, self.work.element
        inputs, below = table.tokens * shape.hidden * e, range(work.cut, shape.layers - 1)
        self._masks(ledger, table.rows, table.columns, set(shape.windows))
        ledger.take("activations", inputs)
        kept = {i: self._kept(table, i) for i in below}
        for i, halves in kept.items():
            size = inputs * (i > work.cut) if self.sizes.checkpoint_layers else halves.both
            ledger.take("kept for backward", size)
        ledger.moment("activations", layer_moment(work, table.rows, table.columns))
        if kept:
            self._layer_backward(ledger, table, kept[max(kept)], None, 0, self.sizes.checkpoint_layers)
        for name in ("activations", "masks", "kept for backward"):
            ledger.drop(name)

    def _head(self, ledger: Ledger, rows: int, targets: int) -> None:
        """Predicts the head: from the last layer's output at `rows` to its gradient."""
        shape, e, wide = self.work.shape, self.work.element, self.work.wide
        width = shape.hidden
        chunk = min(max(self.sizes.head_chunk // rows, 1), shape.vocabulary) * rows
        several = chunk < rows * shape.vocabulary
        ledger.take(
            "head", rows * width * (e + 4 + e + wide)
        )  # rows, the norm's input and output, log Z's gradient
        # One chunk is computed while the one before it is still alive.
        size = wide * (several + 1 + 2 * shape.logit_softcap)
        ledger.moment("head chunk", chunk * size + self._head_product(rows, chunk // rows))
        ledger.moment("head", targets * width * (e + wide + wide * (e != wide)) + rows * width * wide)
        ledger.drop("head")

    def _head_product(self, rows: int, tokens: int) -> float:
        """Counts the bytes alive in a product of the head beside its result in float32 or better."""
        work = self.work
        if work.element == work.wide:
            return 0
        if work.kind == "cpu":  # the rows, and a part of the matrix
            return work.wide * (work.shape.hidden * rows + min(work.shape.hidden * tokens, HEAD_PART))
        return rows * tokens * work.element

    # ---- the plain engine ------------------------------------------------------------------------------

    def _plain_wave(self, ledger: Ledger, rows: int, prompts: int, width: int) -> None:
        """Predicts `rows` completions of prompts of up to `width` tokens by the model's own forward.

        Each prompt is run once. The completions' cache is copied as it grows, one layer after another.
        """
        work, shape, e, wide = self.work, self.work.shape, self.work.element, self.work.wide
        row = shape.attending * 2 * shape.key * e
        ledger.take("key-value cache", prompts * width * row)
        ledger.take("activations", prompts * width * shape.hidden * e)
        ledger.moment("activations", self._reading(prompts, width))
        ledger.moment("logits", prompts * shape.vocabulary * (4 * wide + e))
        ledger.drop("activations")
        self._states(ledger, rows, prompts)
        ledger.take("key-value cache", (rows * (width + work.length) - prompts * width) * row)
        ledger.moment("key-value cache", rows * (width + work.length) * row / shape.layers)
        ledger.moment("logits", rows * shape.vocabulary * (4 * wide + e))

    def _plain_pack(self, ledger: Ledger, table: Table) -> None:
        """Predicts whole rows through the whole model; the head reads the rows that are needed."""
        work, shape, e = self.work, self.work.shape, self.work.element
        tokens = table.tokens
        ledger.take("masks", tokens * table.columns * _BOOL)
        ledger.take("activations", tokens * shape.hidden * e)
        for i in range(work.cut, shape.layers):
            ledger.take("kept for backward", self._kept(table, i).both)
        self._mixed(ledger, table, True)
        self._head(ledger, table.head, table.targets)
        ledger.take("activations", tokens * shape.hidden * e)  # the gradient that comes down
        gradients = backward_moment(work, table)
        ledger.moment("activations", max(gradients.attention, gradients.mlp))
        ledger.drop("states")
