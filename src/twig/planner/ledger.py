"""Keeps a ledger of memory: what is taken, what is given back, and what was alive at the peak.

Knows nothing about the items. No torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One thing that takes memory: its name and bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Phase:
    """A phase of a run at its peak: `items` are alive then, the largest first, and add up to `peak`."""

    name: str
    items: tuple[Item, ...]

    @property
    def peak(self) -> int:
        """Bytes alive at the peak."""
        return sum(item.size for item in self.items)


class Ledger:
    """The bytes alive now, by name, and those at the peak so far."""

    def __init__(self, live: dict[str, float] | None = None) -> None:
        self.live = dict(live or {})
        self.highest, self.peak = dict(self.live), sum(self.live.values())

    def take(self, name: str, size: float) -> None:
        """Adds `size` bytes under `name`."""
        self.live[name] = self.live.get(name, 0) + size
        total = sum(self.live.values())
        if total > self.peak:
            self.highest, self.peak = dict(self.live), total

    def drop(self, name: str, size: float | None = None) -> None:
        """Subtracts `size` bytes of `name`, by default all."""
        self.live[name] = 0 if size is None else self.live[name] - size

    def moment(self, name: str, size: float) -> None:
        """Adds `size` bytes for a moment: they count towards the peak and are gone again."""
        self.take(name, size)
        self.drop(name, size)

    def phase(self, name: str) -> Phase:
        """Returns the phase at its peak."""
        items = [Item(key, round(size)) for key, size in self.highest.items() if size > 0]
        return Phase(name, tuple(sorted(items, key=lambda item: -item.size)))
