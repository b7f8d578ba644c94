"""Tells which linear modules of a model get an adapter, and of which rank, from their names alone.

The rules are PEFT's. Needs no torch, so that the planner counts what the engine attaches.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from twig.common.errors import UserError
from twig.config.schema import Lora

ALL_LINEAR = "all-linear"
DEFAULT_MODULES: list[str] = Lora.model_fields["target_modules"].default
_READS = re.compile(r"in_proj(_\w+)?")  # what mixers that keep a state read through


def layer_numbers(layers: str | Sequence[int], count: int) -> list[int]:
    """Returns the numbers of the layers that get an adapter, of a model that has `count`.

    >>> layer_numbers("last_third", 7), layer_numbers([2, 0], 3)
    ([4, 5, 6], [0, 2])
    """
    if isinstance(layers, str):
        return list(range(0 if layers == "all" else count - -(-count // 3), count))
    outside = [i for i in layers if not 0 <= i < count]
    if outside:
        problem = f"{outside[0]} is not a layer of this model"
        raise UserError("lora.layers", problem, f"Set numbers from 0 to {count - 1}")
    return sorted(set(layers))


def adapted_modules(lora: Lora, layer_of: Mapping[str, int], count: int) -> dict[str, int]:
    """Returns the rank of each module that gets an adapter, of a model that has `count` layers.

    `layer_of` has the layer of each linear module in one. Raises UserError for a name that a layer
    lacks, and for an expression that selects nothing or that `lora.layers` cuts short.

    >>> layer_of = {f"model.layers.{i}.mlp.{name}": i for i in (0, 1, 2) for name in ("up", "down")}
    >>> adapted_modules(Lora(r=4, target_modules="all-linear", rank_pattern={"down": 2}), layer_of, 3)
    {'model.layers.2.mlp.up': 4, 'model.layers.2.mlp.down': 2}
    """
    layers = layer_numbers(lora.layers, count)
    names = _selected(lora, layer_of, layers)
    names = [name for name in names if not _matches(lora.exclude_modules or [], name)]
    if not names:
        problem = "no linear module of lora.layers is left"
        raise UserError("lora.exclude_modules", problem, "Exclude fewer modules")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, key):
            if not any(_by_pattern([pattern], name) for name in names):
                fix = f"Leave it out, or write a name such as {names[0].rpartition('.')[2]}"
                raise UserError(f"lora.{key}", f"{pattern!r} matches no adapted module", fix)
    return {name: lora.rank_pattern.get(_by_pattern(lora.rank_pattern, name) or "", lora.r) for name in names}


def _selected(lora: Lora, layer_of: Mapping[str, int], layers: Sequence[int]) -> list[str]:
    inside = [name for name, layer in layer_of.items() if layer in layers]
    asked = lora.target_modules
    if isinstance(asked, list):
        chosen = [name for name in inside if _matches(asked, name)]
        if asked == DEFAULT_MODULES:
            chosen = [name for name in inside if name in chosen or _READS.fullmatch(_short(name))]
        for layer in layers:
            of_layer = [name for name in inside if layer_of[name] == layer]
            if asked != DEFAULT_MODULES or not _is_special({_short(name) for name in of_layer}):
                _check_names(layer, of_layer, asked)
        return chosen
    if asked == ALL_LINEAR:
        return inside
    everywhere = [name for name in layer_of if re.fullmatch(asked, name)]
    if not everywhere:
        short = sorted({name.rpartition(".")[2] for name in inside})
        fix = f"Write [{asked}]" if asked in short else f"It has to match a whole name, such as {inside[0]}"
        raise UserError("lora.target_modules", f"the expression {asked!r} matches no linear module", fix)
    matched = {layer_of[name] for name in everywhere}
    if matched != set(layer_of.values()) and not matched <= set(layers):
        problem = f"the expression matches layer {min(matched - set(layers))}, which is not in lora.layers"
        raise UserError("lora.target_modules", problem, "Set lora.layers=all")
    return [name for name in everywhere if layer_of[name] in layers]


def _check_names(layer: int, names: Sequence[str], asked: Sequence[str]) -> None:
    for each in asked:
        if not any(_matches([each], name) for name in names):
            there = sorted({name.rpartition(".")[2] for name in names})
            fix = f"Set some of {', '.join(there)}" if there else "Leave that layer out"
            raise UserError("lora.target_modules", f"layer {layer} has no linear module '{each}'", fix)


def _is_special(names: set[str]) -> bool:
    """Tells whether a layer keeps a state, or takes its keys and values from another layer."""
    own_keys = any(name.startswith(("k", "v")) for name in names)
    return any(map(_READS.fullmatch, names)) or ("q_proj" in names and not own_keys)


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _matches(asked: str | Sequence[str], name: str) -> bool:
    if isinstance(asked, str):
        return re.fullmatch(asked, name) is not None
    return any(f".{name}".endswith(f".{each}") for each in asked)


def _by_pattern(patterns: Iterable[str], name: str) -> str | None:
    """Returns the first pattern for a module, as PEFT looks it up."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)
