"""Tables and plots of docs/benchmarks.md and docs/performance.md, made from the files in benchmarks/results/.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, where NAME is the file's; the line above it says
which command, commit and device gave it. A page without a name's marks does not show that file. The README's
table, between the marks of `results`, is made of several files.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from common import AS_IT_COMES, RESULTS, ROOT, SAME_KERNEL
from gpu_tables import gpu_tables, whole_step

README = ROOT / "README.md"
PAGES = [ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "performance.md"]
IMAGES = ROOT / "docs" / "images"
COLOURS = {"grpo": "#0072b2", "s-grpo": "#009e73", "t-spmo": "#d55e00", "TRL": "#666666", "Twig": "#d55e00"}


def refresh() -> None:
    """Puts every result into the pages, and draws the plots."""
    records = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))
    }
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, made in TABLES.items():
            if name in records and f"<!-- {name} -->" in text:
                text = put(text, name, [source(records[name]), "", *made(records[name])])
        page.write_text(text, encoding="utf-8")
    text = put(README.read_text(encoding="utf-8"), "results", summary(records))
    README.write_text(text, encoding="utf-8")


def put(text: str, name: str, lines: list[str]) -> str:
    """Returns a page with other lines between the marks of `name`."""
    mark = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    return mark.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text)


def source(record: dict[str, Any]) -> str:
    """Where the figures are from."""
    versions = record["versions"]
    packages = f"torch {versions['torch']}, transformers {versions['transformers']}, TRL {versions['trl']}"
    return f"`{record['command']}`, commit {record['commit']}, {record['device']}, {packages}."


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, body)]
    return [f"| {' | '.join(line)} |" for line in lines]


def spread(figure: dict[str, float]) -> str:
    """A ratio: the median, and the range where it has one."""
    text = f"**{figure['median']:.2f}**"
    if figure["low"] < figure["high"]:
        text += f" ({figure['low']:.2f} to {figure['high']:.2f})"
    return text


def step(record: dict[str, Any]) -> list[str]:
    names = {"twig": "Twig", "trl": "TRL", "trl-same-kernel": "TRL, same kernel"}
    body = [
        [
            names[side],
            f"{row['seconds_per_step']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['above_loaded_mib']:.0f} MiB",
        ]
        for side, row in record["medians"].items()
    ]
    twig, sides = record["medians"]["twig"], record.get("trl_sides", {AS_IT_COMES: "trl"})
    seconds = step_ratios(record)
    one = len(set(sides.values())) == 1  # TRL as it comes has Twig's products
    for column in [AS_IT_COMES] if one else sides:
        trl = record["medians"][sides[column]]
        body.append(
            [
                "TRL / Twig" if one else f"TRL / Twig, {column}",
                spread(seconds[column]),
                f"{trl['tokens_per_second'] / twig['tokens_per_second']:.2f}",
                f"{trl['above_loaded_mib'] / twig['above_loaded_mib']:.1f}",
            ]
        )
    return rows(["", "seconds per step", "sampled tokens per second", "memory above the loaded model"], body)


def step_ratios(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """TRL's seconds over Twig's, by column; a record from before there were columns has TRL as it comes."""
    seconds = record["trl_over_twig_seconds"]
    return {AS_IT_COMES: seconds} if "median" in seconds else seconds


def sampling(record: dict[str, Any]) -> list[str]:
    body = []
    for case, found in record["cases"].items():
        middle, ratios = found["medians"], found["twig_over_generate"]
        same = middle.get("generate-same-kernel", middle["generate"])
        speeds = [each["tokens_per_second"] for each in (middle["twig"], same, middle["generate"])]
        columns = [spread(ratios[column]) for column in (SAME_KERNEL, AS_IT_COMES)]
        body.append([case, found["kernels"], *(f"{speed:,.0f}" for speed in speeds), *columns])
    head = ["model", "Twig's products", "Twig, tokens per second", f"generate, {SAME_KERNEL}"]
    head += [f"generate, {AS_IT_COMES}", f"Twig / generate, {SAME_KERNEL}", AS_IT_COMES]
    return rows(head, body)


def prompts(record: dict[str, Any]) -> list[str]:
    """Prompts held once against copied ones, and what they begin with run once or by each group."""
    body, updates = [], []
    for case, figures in record["cases"].items():
        if "each over shared" in figures:
            once, ratio = figures["shared"], figures["each over shared"]
            cells = [f"{once[key]:,.0f} ({ratio[key]:.2f})" for key in ("tokens", "peak_mib")]
            updates.append([case, *cells, f"{once['seconds']:.2f} ({ratio['seconds']:.2f})"])
            continue
        once, ratio = figures["held once"], figures["copied over held once"]
        cells = [f"{once[key]:,.0f} ({ratio[key]:.2f})" for key in ("cache_mib", "peak_mib")]
        body.append([case, *cells, f"{once['seconds']:.2f} ({ratio['seconds']:.2f})"])
    head = ["prompts held once (copied: times)", "keys and values, MiB", "peak, MiB", "seconds"]
    run = ["what prompts begin with run once (by each group: times)", "tokens", "peak, MiB", "seconds"]
    return [*rows(head, body), "", *rows(run, updates)]


def update(record: dict[str, Any]) -> list[str]:
    columns, body = update_columns(record), []
    for name, row in record["medians"].items():
        body.append([name, f"{row['seconds']:.2f} s", f"{row['mib']:.0f} MiB"])
        for ratios in (columns[column]["ratios"].get(name) for column in columns):
            body[-1] += [spread(ratios["seconds"]), spread(ratios["mib"])] if ratios else ["", ""]
    head, said = ["", "seconds", "memory"], []
    for column, each in columns.items():
        named = "" if len(columns) == 1 else f", {column}"
        head += [f"TRL / Twig{named}: seconds", "memory"]
        against = f"econds against {each['fastest']}, memory against {each['smallest']}."
        said.append(f"S{against}" if len(columns) == 1 else f"{column.capitalize()}: s{against}")
    gaps = max(record["gradient_gaps"].values(), default=0.0)
    said.append(
        f"The gradients of the GRPO rows differ from TRL's by at most {gaps:.1e} of their largest entry."
    )
    return [*rows(head, body), "", " ".join(said)]


def update_columns(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each column compares with, and its ratios; see `step_ratios` for older records."""
    keys = {"fastest": "trl_fastest", "smallest": "trl_smallest", "ratios": "trl_over_twig"}
    if isinstance(record["trl_fastest"], str):
        return {AS_IT_COMES: {name: record[key] for name, key in keys.items()}}
    return {c: {name: record[key][c] for name, key in keys.items()} for c in record["trl_fastest"]}


def summary(records: dict[str, dict[str, Any]]) -> list[str]:
    """The README's table: TRL's figures over Twig's, with the same products first."""
    model, step_record = update_columns(records["update"]), records["step"]
    columns = [column for column in (SAME_KERNEL, AS_IT_COMES) if column in model]
    heads = {SAME_KERNEL: "seconds, TRL with Twig's products / Twig", AS_IT_COMES: "seconds, TRL / Twig"}
    seconds, middle = step_ratios(step_record), step_record["medians"]
    side = step_record.get("trl_sides", {}).get(columns[0], "trl")
    times = [short(seconds[c]["median"]) if c in seconds else "-" for c in columns]
    memory = short(middle[side]["above_loaded_mib"] / middle["twig"]["above_loaded_mib"])
    body = [["one step of the quickstart's model, two CPU cores", *times, memory]]
    for case, said in SUMMARY.items():
        each = [model[c]["ratios"][case] for c in columns]
        times = [short(ratios["seconds"]["median"]) for ratios in each]
        body.append([said, *times, short(each[0]["mib"]["median"])])
    said = "one step of a model of Qwen2-1.5B's shape, 8 answers of 256 tokens, one H100 GPU"
    body.append([said, *[whole_step(records["gpu"])] * len(columns), "-"])
    return rows(["", *(heads[column] for column in columns), "memory, TRL / Twig"], body)


# Cases of update.json in the README, and what it calls them.
SUMMARY = {
    "GRPO, layers checkpointed": "one update of a model with 0.5 billion parameters, two CPU cores",
    "T-SPMO, layers checkpointed": "the same with T-SPMO in Twig",
}


def short(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def frontier(record: dict[str, Any]) -> list[str]:
    body = [
        [name, f"{row['seconds']:.2f} s", f"{row['mib']:.0f} MiB"] for name, row in record["medians"].items()
    ]
    name = "frontier" if record["shape"] == "0.5b" else f"frontier-{record['shape']}"
    draw_frontier(name, record["medians"])
    worse = beaten(record["medians"])
    said = "Every point of TRL's has one of Twig's that is both faster and smaller."
    if worse:
        said = f"No point of Twig's is both faster and smaller than: {'; '.join(worse)}."
    return [
        *rows(["", "seconds", "memory"], body),
        "",
        said,
        "",
        f"![Seconds against memory](images/{name}.svg)",
    ]


def beaten(points: dict[str, dict[str, float]]) -> list[str]:
    """TRL's points that no point of Twig's beats in seconds and in memory."""
    ours = [row for name, row in points.items() if name.startswith("Twig")]
    return [
        name
        for name, row in points.items()
        if name.startswith("TRL")
        and not any(our["seconds"] < row["seconds"] and our["mib"] < row["mib"] for our in ours)
    ]


def scaling(record: dict[str, Any]) -> list[str]:
    draw_scaling(record["curves"])
    body = [
        [name, *(f"{figures[algorithm]:.1f}" for algorithm in ("grpo", "s-grpo", "t-spmo"))]
        for name, figures in record["from_8_to_128"].items()
    ]
    return [
        *rows(["times the seconds, from G = 8 to G = 128", "GRPO", "S-GRPO", "T-SPMO"], body),
        "",
        "![Seconds of an update as one size grows](images/scaling.svg)",
    ]


def memory(record: dict[str, Any]) -> list[str]:
    body = []
    for case, found in record["cases"].items():
        phase = max(found["measured"], key=found["measured"].get)
        measured, predicted = found["measured"][phase], found["predicted"][phase]
        worst = max(map(abs, found["off_percent"].values()))
        body.append(
            [case, phase, f"{measured:.0f}", f"{predicted:.0f}", f"{100 * (predicted / measured - 1):+.1f} %"]
            + [f"{worst:.1f} %"]
        )
    return rows(["case", "peak in", "measured, MiB", "predicted", "off", "worst phase off"], body)


def gpu_memory(record: dict[str, Any]) -> list[str]:
    body = []
    for case, found in record["cases"].items():
        if "total" not in found:  # the constants, the budgets, and what failed
            continue
        tensors, phases = found["predicted"]["tensors"], found["measured"]
        phase = max(phases, key=lambda name: phases[name]["allocated"])
        worst = max(map(abs, found["off_percent"].values()))
        body.append([case, phase, f"{phases[phase]['allocated']:.0f}", f"{tensors[phase]:.0f}"])
        body[-1] += [f"{found['off_percent'][phase]:+.1f} %", f"{worst:.1f} %"]
        total = found["total"]
        body[-1] += [f"{total['measured']:.0f}", f"{total['predicted']:.0f}"]
    head = ["case", "peak in", "allocated, MiB", "predicted", "off", "worst phase off"]
    return rows([*head, "taken of the device, MiB", "predicted"], body)


def real_shape(record: dict[str, Any]) -> list[str]:
    names = {"grpo": "GRPO", "t-spmo": "T-SPMO", "t-spmo-late": "T-SPMO, late forks"}
    names |= {"trl-1": "TRL GRPO, 1 at once", "trl-4": "TRL GRPO, 4 at once"}
    body = []
    for side, row in record["medians"].items():
        phases = [
            f"{row[f'{phase}_seconds']:.1f} s / {row[f'{phase}_mib'] / 1024:.2f} GiB"
            for phase in ("loading", "sampling", "update")
        ]
        body.append([names[side], *phases, f"{row['step_seconds']:.1f} s", f"{row['trained_tokens']:.0f}"])
    return rows(["", "loading", "sampling", "update", "step", "tokens trained"], body)


def phases(record: dict[str, Any]) -> list[str]:
    limits = record["limits"]
    parts = [(f"update, {name}", found) for name, found in record["updates"].items()]
    body = []
    for part, found in [*parts, ("sampling", record["sampling"])]:
        for row in found:
            body.append([part, row["phase"], f"{row['gflop']:,.0f}", f"{row['gbytes']:.1f}"])
            body[-1] += [f"{row['limit']:.3f}", f"{row['seconds']:.3f}"]
            body[-1].append(f"{100 * row['limit'] / row['seconds']:.0f} %" if row["gflop"] else "")
    names = {"onednn": "oneDNN", "torch": "PyTorch's library"}
    said = [f"Limits of the device: {limits['gflops']:.0f} GFLOP/s, {limits['gbytes']:.1f} GB/s."]
    if products := limits.get("products"):
        each = ", ".join(f"{names[name]} {speed:.0f} GFLOP/s" for name, speed in products.items())
        said.append(f"Large product: {each}. The phases ran on {names[record['kernels']]}.")
    if speeds := record.get("measured_at_load"):
        each = ", ".join(f"{names[name]} {speed:.0f} GFLOP/s" for name, speed in speeds.items())
        said.append(f"Measurement before a run: {each}, {speeds['onednn'] / speeds['torch']:.2f} times.")
    return [
        " ".join(said),
        "",
        *rows(["", "phase", "GFLOP", "GB of weights", "limit, s", "measured, s", "of the limit"], body),
    ]


def gpu(record: dict[str, Any]) -> list[str]:
    return gpu_tables(record, rows)


def speculation(record: dict[str, Any]) -> list[str]:
    """Drafts of four tokens; the other lengths are in the record."""
    shown, body = ("own text", "siblings", "siblings, tree", "siblings, after an earlier wave, tree"), []
    for model, found in record["models"].items():
        for entry in found["schemes"]:
            if entry["drafts"] == 4 and entry["scheme"] in shown:
                gains = entry["predicted_speedup"]
                row = [model, entry["scheme"], f"{entry['passes_saved']['8']:.2f}"]
                body.append([*row, *(f"{gains[rows]:.2f}" if rows in gains else "" for rows in _ROWS)])
    head = ["model", "drafts of four tokens from", "passes saved, 8 rows"]
    return rows([*head, *(f"speed, {number} rows" for number in _ROWS)], body)


_ROWS = ("1", "8", "32", "128")


def speculation_time(record: dict[str, Any]) -> list[str]:
    found = {(case["rows"], case["columns"]): case["pass_ms"] for case in record["cases"]}
    columns = sorted({column for _, column in found})
    body = [
        [str(number), *(f"{found[number, column]:.2f}" for column in columns)]
        for number in sorted({row for row, _ in found})
    ]
    return rows(["rows", *(f"{column} columns, ms" for column in columns)], body)


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "step": step,
    "step-one-thread": step,
    "sampling": sampling,
    "prompts": prompts,
    "update": update,
    "update-0.1b": update,
    "update-2048": update,
    "update-qwen3.5-0.8b": update,
    "update-pythia-160m": update,
    "frontier": frontier,
    "frontier-0.1b": frontier,
    "scaling": scaling,
    "memory": memory,
    "real_shape": real_shape,
    "phases": phases,
    "gpu": gpu,
    "gpu_memory": gpu_memory,
    "speculation": speculation,
    "speculation-time": speculation_time,
}


# ---- plots -------------------------------------------------------------------------------------------------


def draw_frontier(name: str, points: dict[str, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    for side in ("TRL", "Twig"):
        for again, style in ((False, "-"), (True, "--")):
            mine = [
                (row["mib"], row["seconds"])
                for case, row in points.items()
                if case.startswith(side) and ("checkpoint" in case) == again
            ]
            label = side + (", layers run twice" if again else "")
            axes.plot(*zip(*mine, strict=True), style, marker="o", color=COLOURS[side], label=label)
    axes.set(xscale="log", xlabel="memory above the weights, MiB", ylabel="seconds", ylim=(0, None))
    largest = max(row["mib"] for row in points.values())
    ticks = [2**n for n in range(6, 16) if 2**n < 1.5 * largest]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    finish(figure, axes, name)


def draw_scaling(curves: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 4, figsize=(12, 5.4), constrained_layout=True)
    for axes, (name, found) in zip(grid.flat, curves.items(), strict=False):
        for algorithm in ("grpo", "s-grpo", "t-spmo"):
            line = [(point["value"], point[algorithm]["seconds"]) for point in found["points"]]
            axes.plot(
                *zip(*line, strict=True), marker="o", ms=3, color=COLOURS[algorithm], label=algorithm.upper()
            )
        axes.set(xscale="log", yscale="log", title=name)
        values = [point["value"] for point in found["points"]]
        shown = values if len(values) < 6 else values[::2]
        axes.set_xticks(shown, [f"{value:g}" for value in shown])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[0].set_ylabel("seconds")
    for axes in grid.flat[len(curves) :]:
        axes.axis("off")
    grid.flat[len(curves)].legend(*grid.flat[0].get_legend_handles_labels(), loc="center", frameon=False)
    save(figure, "scaling")


def finish(figure: Any, axes: Any, name: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    save(figure, name)


def save(figure: Any, name: str) -> None:
    from matplotlib import pyplot

    IMAGES.mkdir(parents=True, exist_ok=True)
    # without a date and with fixed ids, so that the same figures give the same file
    with pyplot.rc_context({"svg.hashsalt": "twig"}):
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)
