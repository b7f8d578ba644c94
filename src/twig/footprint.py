"""The memory of each phase of a run, item by item: what the code holds, walked through in its order.

A phase is a `Ledger`: what is taken is added, what is given back is subtracted, and the peak is the largest
sum at any one time, with the items that were alive then. Lengths are the longest that the settings allow and
completions share nothing, so a prediction is a bound, reached where nothing ends early.

No torch.
"""

from dataclasses import dataclass, field

from twig.workload import (
    Sizes,
    Work,
    backward_moment,
    head_rows,
    kept_by_layer,
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
            self._wave(ledger, rows, min(work.prompts, exact + 2 * (rest > 0) - (exact == 0)))
        return ledger.phase("sampling")

    def evaluation(self) -> Phase:
        """One greedy answer a problem; between steps the last batch is still there."""
        work = self.work
        ledger = self._trained() if work.evaluated_between else Ledger(self.base)
        if work.evaluated_between:
            self._boundary(ledger)
        if work.plain:
            self._plain_wave(ledger, 1)
        else:
            self._wave(ledger, self.sizes.eval_batch_size, self.sizes.eval_batch_size)
        return ledger.phase("evaluation")

    def _wave(self, ledger: Ledger, rows: int, prompts: int) -> None:
        work, shape, e, wide = self.work, self.work.shape, self.work.element, self.work.wide
        slots = work.prompt + work.length
        row = shape.layers * 2 * shape.key * e  # keys and values of a token
        hidden, prompt_tokens = shape.hidden * e, prompts * work.prompt
        ledger.take("sampled tokens", rows * work.length * (3 * wide + 2 * _INT))

        masks = self._masks(ledger, prompts, work.prompt, set(shape.windows))
        ledger.take("key-value cache", prompt_tokens * row)
        ledger.take("activations", 2 * prompt_tokens * hidden)  # the trunk's output and what goes on
        ledger.moment("activations", layer_moment(work, prompts, work.prompt))
        ledger.drop("masks", masks)
        ledger.take("logits", (2 * prompts + rows) * shape.vocabulary * wide)
        ledger.drop("logits", 2 * prompts * shape.vocabulary * wide)
        # The buffers of the whole wave are made at once; a CPU gives their pages as they are written to.
        first = work.prompt if work.kind == "cpu" else slots
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

    def _masks(self, ledger: Ledger, rows: int, columns: int, windows: set[int | None]) -> float:
        """Takes the masks and rotary embeddings of a table; returns their bytes."""
        shape, e = self.work.shape, self.work.element
        cells = rows * columns**2
        if any(window is not None for window in windows):
            ledger.moment("masks", cells * (_INT + 2 * _BOOL))
        rotary = 2 * rows * columns * shape.head_dim * e * (2 if shape.per_type_rotary else 1)
        size = len(windows) * cells * e + rotary
        ledger.take("masks", size)
        ledger.moment("masks", cells * _BOOL)
        return size

    def update(self) -> Phase:
        """The packs of one batch, forward and backward, and the optimizer's step."""
        work = self.work
        ledger = self._trained()
        self._boundary(ledger)
        ledger.take("sampled tokens", work.prompts * work.generations * work.length * (36 + 4 * _INT))
        rows, columns = pack_table(work, self.sizes.pack_size)
        head, targets = head_rows(work, rows, columns)
        if work.plain:
            self._plain_pack(ledger, rows, columns, head)
        else:
            self._pack(ledger, rows, columns, head, targets)
        ledger.take("gradients", work.adapter_bytes)  # the pack's, before they are added to the batch's
        ledger.drop("gradients", work.adapter_bytes)
        return ledger.phase("update")

    def _pack(self, ledger: Ledger, rows: int, columns: int, head: int, targets: int) -> None:
        work, shape, e = self.work, self.work.shape, self.work.element
        hidden = shape.hidden * e
        tokens, cells = rows * columns, rows * columns**2
        ledger.take("masks", 2 * cells * _BOOL + columns**2 * _BOOL)
        ledger.drop("masks", cells * _BOOL + columns**2 * _BOOL)
        masks = self._masks(ledger, rows, columns, set(shape.windows))
        ledger.take("activations", tokens * hidden)  # the trunk's output
        if not work.recorded and work.cut > 0:
            ledger.moment("activations", layer_moment(work, rows, columns))

        upper = range(work.cut, shape.layers)
        kept = {i: kept_by_layer(work, rows, columns, i > work.cut) for i in upper}
        inputs = tokens * hidden
        padded = cells * e if work.kind == "cuda" and not work.eager and columns % 8 else 0
        for i in upper:
            if self.sizes.checkpoint_layers:
                ledger.moment("activations", layer_moment(work, rows, columns))
                ledger.take("kept for backward", inputs * (i > work.cut))
            else:
                ledger.take("kept for backward", sum(kept[i]))
                ledger.take("masks", padded)
                ledger.moment("activations", tokens * (3 * hidden + shape.intermediate * e))
        ledger.drop("masks", cells * _BOOL + (masks if work.eager else 0))
        if not self.sizes.checkpoint_layers:
            ledger.drop("activations", inputs)

        self._head(ledger, head, targets)
        ledger.take("activations", tokens * hidden)  # the gradient that comes down
        top = shape.layers - 1
        attention, mlp = backward_moment(work, rows, columns)
        if self.sizes.checkpoint_layers:
            ledger.moment("activations", layer_moment(work, rows, columns))
            ledger.take("kept for backward", sum(kept[top]))
            ledger.take("masks", padded)
        ledger.moment("activations", mlp)
        ledger.drop("kept for backward", kept[top][1])
        ledger.moment("activations", attention)
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

    def _plain_pack(self, ledger: Ledger, rows: int, columns: int, head: int) -> None:
        """Whole rows through the whole model, logits of every token among them."""
        work, shape, e, wide = self.work, self.work.shape, self.work.element, self.work.wide
        tokens = rows * columns
        ledger.take("masks", rows * columns**2 * _BOOL)
        ledger.take("activations", tokens * shape.hidden * e)
        for i in range(work.cut, shape.layers):
            ledger.take("kept for backward", sum(kept_by_layer(work, rows, columns, i > work.cut)))
        ledger.take("logits", tokens * shape.vocabulary * e)
        ledger.take("logits", head * shape.vocabulary * wide * (1 + (e != wide)))
        ledger.moment("logits", (head * wide + tokens * e) * shape.vocabulary)
        ledger.drop("logits")
        ledger.moment("activations", max(backward_moment(work, rows, columns)))
