"""Tables of what `gpu.py` measured: whole steps, decoding, kernels, the real model, and what follows."""

from collections.abc import Callable, Iterable
from typing import Any

Rows = Callable[[Iterable[str], Iterable[Iterable[str]]], list[str]]


def gpu_tables(record: dict[str, Any], rows: Rows) -> list[str]:
    """The lines of all tables; cases that failed or were not run are left out."""
    cases = _usable(record)
    parts = (_ratios, _steps, _update_sizes, _decoding, _kernels, _svamp)
    lines: list[str] = []
    for part in parts:
        head, body = part(cases)
        if body:
            lines += [*rows(head, body), ""]
    return lines[:-1]


def whole_step(record: dict[str, Any]) -> str:
    """Returns how many times as long TRL takes for a whole step with eight completions."""
    figures = {name: figure for name, figure in _ratios(_usable(record))[1]}
    return figures["whole step, GRPO, G = 8, TRL's seconds over Twig's"]


def _usable(record: dict[str, Any]) -> dict[str, Any]:
    """The cases that did not fail."""
    return _one_by_one({name: case for name, case in record["cases"].items() if "failed" not in case})


def _one_by_one(cases: dict[str, Any]) -> dict[str, Any]:
    """The cases, with one of its own for each step that was measured on a model loaded once."""
    found: dict[str, Any] = {}
    for name, case in cases.items():
        if case["case"]["kind"] != "many":
            found[name] = case
            continue
        for key, step in case["steps"].items():
            algorithm, number = key.removesuffix("-late").rsplit("-", 1)
            changed = {"kind": "twig", "algorithm": algorithm, "generations": int(number)}
            changed |= {"late": key.endswith("-late")}
            peak = {"allocated": max(phase["allocated"] for phase in step["memory"].values())}
            found[f"{name} {key}"] = step | {"case": case["case"] | changed, "peak": peak}
    return found


def label_of(case: dict[str, Any], found: dict[str, Any]) -> str:
    """What a case measured, in the field's words."""
    if case["kind"] == "generate":
        return "generate, static cache, compiled" if case["static"] else "generate"
    if case["kind"] == "trl":
        return f"TRL GRPO, {case['micro']} at once" + (", autocast" if case["autocast"] else "")
    words = ["Twig" if case["kind"] == "decode" else case["algorithm"].upper()]
    words += [case["quantization"].upper()] if case["quantization"] else []
    words += ["late forks"] if case["late"] else []
    words += [f"memory.budget={case['budget']}"] if case["budget"] else []
    words += [f"decode={found['decode']}"] if found.get("decode") else []
    return ", ".join(words)


def _gib(mib: float) -> str:
    return f"{mib / 1024:.2f} GiB"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _ratios(cases: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The comparisons that say most; each with the fastest or the smallest side of the other library."""
    body: list[list[str]] = []

    def best(kind: str, key: Callable[[dict[str, Any]], float], generations: int, **wanted: Any) -> Any:
        chosen = [
            found
            for found in cases.values()
            if found["case"]["kind"] == kind
            and found["case"]["generations"] == generations
            and all(found["case"][name] == value for name, value in wanted.items())
        ]
        return min(chosen, key=key, default=None)

    def step(found: dict[str, Any]) -> float:
        return found["step_seconds"]["median"]

    for number in (8, 16, 50):
        ours = best("twig", step, number, algorithm="grpo", quantization=None, budget=None)
        theirs = best("trl", step, number)
        if ours and theirs:
            ratio = step(theirs) / step(ours)
            body.append([f"whole step, GRPO, G = {number}, TRL's seconds over Twig's", f"{ratio:.1f}"])
        ours = best("decode", lambda found: found["step_ms"], number, quantization=None)
        theirs = best("generate", lambda found: found["seconds"]["median"], number, static=False)
        if ours and theirs:
            ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
            body.append([f"sampling, G = {number}, Twig's tokens per second over generate's", f"{ratio:.1f}"])
        if ours and "share_of_bandwidth" in ours:
            shares = ours["share_of_bandwidth"]
            text = f"{_percent(shares['copy'])} of a copy's bandwidth"
            if "datasheet" in shares:
                text += f", {_percent(shares['datasheet'])} of the data sheet's"
            body.append([f"weights read once a decode step, G = {number}", text])
    return ["comparison", ""], body


def _steps(cases: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["step", "G", "sampling", "update", "step", "tokens per second", "torch's peak", "device's peak"]
    body = []
    for found in cases.values():
        case, peak = found["case"], found["peak"]
        if case["kind"] not in ("twig", "trl"):
            continue
        seconds = [f"{found[f'{key}_seconds']['median']:.3f} s" for key in ("sampling", "update", "step")]
        row = [label_of(case, found), str(case["generations"]), *seconds]
        row += [
            f"{found['step_tokens_per_second']:,.0f}",
            _gib(peak.get("allocated", peak.get("resident", 0))),
        ]
        row += [_gib(peak["device"]) if "device" in peak else ""]
        off = found.get("off_percent")
        row += [f"{off['tensors']:+.1f} % / {off['peak']:+.1f} %" if off else ""]
        body.append(row)
    return [*head, "predicted, off by"], body


def _update_sizes(cases: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    body = []
    for found in cases.values():
        for each in found.get("update sizes", []):
            label = f"{label_of(found['case'], found)}, G = {found['case']['generations']}"
            row = [label, f"{each['pack_size']:,}", f"{each['head_chunk']:,}"]
            row += [f"{1000 * each['seconds']['median']:.0f} ms", _gib(each["memory"]["allocated"])]
            body.append(row)
    return ["the same update", "train.pack_size", "train.head_chunk", "time", "torch's peak"], body


def _decoding(cases: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["sampling alone", "G", "tokens per second", "ms a step", "of a copy's bandwidth", "first call"]
    body = []
    for found in cases.values():
        case = found["case"]
        if case["kind"] not in ("decode", "generate"):
            continue
        share = found.get("share_of_bandwidth", {}).get("copy")
        body.append(
            [
                label_of(case, found),
                str(case["generations"]),
                f"{found['tokens_per_second']:,.0f}",
                f"{found['step_ms']:.2f}",
                "" if share is None else _percent(share),
                f"{found['first_seconds']:.1f} s",
            ]
        )
    return head, body


def _kernels(cases: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    body = []
    for found in cases.values():
        if found["case"]["kind"] != "profile":
            continue
        label = label_of(found["case"], found)
        for part, profile in found["profiles"].items():
            kinds = ", ".join(
                f"{kind} {_percent(entry['share'])}" for kind, entry in list(profile["kinds"].items())[:5]
            )
            wall = found["unprofiled_ms"].get(part, sum(found["unprofiled_ms"].values()))
            body.append([f"{label}: {part}", f"{profile['kernels']:,}", f"{profile['device_ms']:.0f} ms"])
            body[-1] += [f"{wall:.0f} ms", kinds]
    return ["profile", "kernels", "their time", "the part's time", "shares"], body


def _svamp(cases: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    body = []
    for found in cases.values():
        if found["case"]["kind"] != "svamp":
            continue
        before, after = found["before"], found["after"]
        label = f"SmolLM2-135M-Instruct, {found['dtype']}, {found['device']}"
        shares = [f"{_percent(figures['found'])}" for figures in (before, after)]
        rights = [f"{_percent(figures['value'])}" for figures in (before, after)]
        body.append([label, str(before["n"]), *shares, *rights])
    head = ["SVAMP, greedy", "problems", "answered before", "after training", "right before", "after"]
    return head, body
