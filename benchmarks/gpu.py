"""Qwen2-1.5B's exact shape on a GPU: Twig, transformers' generate and TRL; NF4, profiles, a real model.

    python benchmarks/gpu.py                                    # all cases; benchmarks/results/gpu.json
    python benchmarks/gpu.py --cases twig-grpo-8 trl-8 --budget 200
    python benchmarks/gpu.py --shape tiny --device cpu          # does it run?
    python benchmarks/gpu.py --merge a.json b.json              # puts several results together

Random bfloat16 weights are made on the device and saved once; each case loads them in a fresh process, which
prints one JSON object. The result file is written after each case, so what was measured stays if the run is
stopped. Cases run in order of importance; --budget starts none after so many seconds. A case that fails is
recorded with the end of its messages, and the next one runs.

A step is one prompt of 100 tokens and G completions of exactly 256, LoRA r=16 on q_proj and v_proj of the
last third, AdamW, beta 0, temperature 1, no checkpointing of activations. Seconds are medians over the steps
after the first, which warms up and captures. Memory is in MiB: `allocated` and `reserved` are torch's own
peaks, `device` is what the driver counts beyond what was there before the process used the GPU.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import OFFLINE, PACKAGES, RESULTS, ROOT, _commit, _processor
from gpu_cases import Case, Options
from shapes import SHAPES

# In order of importance. What takes seconds a step is timed fewer times.
CASES: dict[str, Case] = {
    "steps": Case("many", decode="compiled", steps=2, limit=200),
    "twig-grpo-8": Case("twig"),
    "decode-8": Case("decode"),
    "generate-8": Case("generate", steps=2),
    "trl-8": Case("trl", micro=8, steps=3),
    "twig-grpo-8-budget": Case("twig", budget="4.5GiB"),
    "profile-grpo-8": Case("profile", limit=120),
    "profile-compiled-grpo-8": Case("profile", decode="compiled", limit=150),
    "twig-nf4-grpo-8-budget": Case("twig", quantization="nf4", budget="2.5GiB", steps=3),
    "twig-s-grpo-8": Case("twig", algorithm="s-grpo"),
    "twig-t-spmo-8": Case("twig", algorithm="t-spmo"),
    "trl-8-micro-1": Case("trl", micro=1, steps=2),
    "decode-compiled-8": Case("decode", decode="compiled", limit=150),
    "twig-grpo-50": Case("twig", generations=50),
    "twig-grpo-16": Case("twig", generations=16),
    "trl-50": Case("trl", generations=50, micro=50, steps=2),
    "trl-16": Case("trl", generations=16, micro=16, steps=2),
    "trl-8-autocast": Case("trl", micro=8, autocast=True, steps=2),
    "twig-t-spmo-late-8": Case("twig", algorithm="t-spmo", late=True),
    "decode-plain-8": Case("decode", decode="plain", steps=2),
    "generate-static-8": Case("generate", static=True, steps=2, limit=150),
    "decode-50": Case("decode", generations=50),
    "decode-16": Case("decode", generations=16),
    "generate-50": Case("generate", generations=50, steps=2),
    "generate-16": Case("generate", generations=16, steps=2),
    "twig-compiled-grpo-8": Case("twig", decode="compiled", limit=150),
    "twig-nf4-grpo-8": Case("twig", quantization="nf4", steps=3),
    "decode-nf4-8": Case("decode", quantization="nf4", steps=3),
    "profile-nf4-grpo-8": Case("profile", quantization="nf4", limit=120),
    "svamp": Case("svamp", limit=3600),
}
GRACE = 30  # seconds past --budget that a case that has begun may take


class Child:
    """A process for one case: it imports what takes long and waits; `run` has it measure.

    So the next case's imports overlap with the present case. The process does not touch the GPU before.
    """

    def __init__(self, name: str, words: list[str]) -> None:
        self.name, self.errors = name, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--case", name, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | OFFLINE,
        )

    def run(self, limit: float) -> dict[str, Any]:
        """What the case found, or why it failed."""
        try:
            printed, _ = self.process.communicate("go\n", timeout=limit)
        except subprocess.TimeoutExpired:
            self.stop()
            return {"failed": f"took more than {limit:.0f} s", "messages": self._messages()}
        if self.process.returncode:
            return {"failed": f"ended with {self.process.returncode}", "messages": self._messages()}
        return json.loads(printed.strip().splitlines()[-1])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _messages(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-3000:]


def measure(name: str, options: Options, changes: dict[str, Any]) -> None:
    """Runs one case in this process and prints its JSON, once there is a line on stdin."""
    # what the libraries print must not get between us and the JSON line
    stdout, sys.stdout = sys.stdout, sys.stderr
    # NOTE: not peft: with it bitsandbytes asks the GPU about itself.
    for module in ("datasets", "transformers.models.qwen2.modeling_qwen2", "transformers.generation"):
        with suppress(ImportError):
            import_module(module)
    import torch

    early = torch.cuda.is_initialized()
    sys.stdin.readline()
    from gpu_cases import run
    from gpu_meter import Meter

    case = Case(**asdict(CASES[name]) | changes)
    options = replace(options, steps=min(case.steps or options.steps, options.steps))
    meter, began = Meter(options.device), time.perf_counter()
    found = run(case, options, meter)
    device = torch.cuda.get_device_name() if options.device == "cuda" else _processor()
    head = {"case": asdict(case), "device": device, "process_seconds": round(time.perf_counter() - began, 1)}
    if early:  # then `device` memory lacks what was there before
        head["cuda_was_in_use"] = True
    print(json.dumps(head | found), file=stdout)


def build_model(options: Options) -> None:
    """Writes the random model to the folder; its weights are made on the device."""
    import torch
    from memory import build

    shape = SHAPES[options.shape] | {"config": "Qwen2Config", "tie_word_embeddings": True}
    with torch.device(options.device):
        build(shape, "bfloat16", Path(options.folder))


def head_of(options: Options) -> dict[str, Any]:
    """Where and with what the results were measured."""
    try:
        commit = os.environ.get("TWIG_COMMIT") or _commit()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {}
    for package in (*PACKAGES, "triton", "bitsandbytes"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": "python " + " ".join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": commit,
        "python": platform.python_version(),
        "versions": versions,
        "shape": options.shape,
        "prompt": options.prompt,
        "length": options.length,
    }


def save(path: Path, head: dict[str, Any], cases: dict[str, Any]) -> None:
    """Writes the cases beside those that the file has, whole or not at all."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    device = next((case["device"] for case in cases.values() if "device" in case), None)
    record = {**head, "device": device or known.get("device")}
    record["cases"] = known.get("cases", {}) | cases
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def merge(paths: list[str], output: Path) -> None:
    """Puts result files together: of a case in several the last one stays, unless it failed."""
    for path in paths:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        known = json.loads(output.read_text(encoding="utf-8"))["cases"] if output.is_file() else {}
        good = {k: v for k, v in record["cases"].items() if "failed" not in v or k not in known}
        save(output, {k: v for k, v in record.items() if k not in ("cases", "device")}, good)
    print(f"written to {output}")


def line_of(name: str, found: dict[str, Any]) -> str:
    """The figures of a case that matter most, on one line."""
    if "failed" in found:
        return f"{name}: FAILED, {found['failed']}: {found['messages'][-700:]}"
    words = [f"{name}:"]
    for key in ("sampling_seconds", "update_seconds", "step_seconds", "seconds"):
        if key in found:
            words.append(f"{key.replace('_seconds', '')} {found[key]['median']:.3f} s")
    for key in ("tokens_per_second", "sampling_tokens_per_second", "step_ms", "share_of_bandwidth", "decode"):
        if key in found:
            words.append(f"{key} {found[key]}")
    for key in ("decode_refusal", "off_percent", "decode_step"):
        if found.get(key):
            words.append(f"{key} {found[key]}")
    if "before" in found:
        for key in ("value", "found"):
            words.append(f"{key} {found['before'][key]:.3f} then {found['after'][key]:.3f}")
    return " ".join([*words, f"peak {found['peak']}", f"({found['process_seconds']} s)"])


def run_cases(names: list[str], words: list[str], options: argparse.Namespace, shared: Options) -> None:
    """Runs the cases in their order, one ahead being prepared, and saves after each."""
    began, head, results = options.began, head_of(shared), {}
    child = Child(names[0], words)
    for number, name in enumerate(names):
        left = options.budget - (time.perf_counter() - began)
        if left < 5:
            print(f"no time for: {' '.join(names[number:])}", flush=True)
            child.stop()
            break
        present = child
        if number + 1 < len(names):
            child = Child(names[number + 1], words)
        results[name + options.suffix] = found = present.run(min(CASES[name].limit, left + GRACE))
        save(Path(options.output), head, results)
        print(f"[{time.perf_counter() - began:.0f} s] {line_of(name + options.suffix, found)}", flush=True)
    print(f"written to {options.output}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Qwen2-1.5B's shape on a GPU: Twig, transformers and TRL.")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help="default: all")
    parser.add_argument("--without", nargs="+", choices=CASES, default=[], metavar="CASE")
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--decode", choices=["auto", "plain", "graph", "compiled"], help="for every case")
    parser.add_argument("--suffix", default="", help="of the cases' names in the result")
    parser.add_argument("--output", help="default: benchmarks/results/gpu.json")
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="put result files together, and end")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prompt", type=int, help="tokens; default 100")
    parser.add_argument("--length", type=int, help="of a completion; default 256")
    parser.add_argument("--steps", type=int, help="timed ones; default 5")
    parser.add_argument("--folder", help="of the model; built there if it has none")
    parser.add_argument("--svamp", help="folder of the real model; without it the case is left out")
    parser.add_argument("--svamp-data", help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--svamp-steps", type=int, default=4)
    parser.add_argument("--svamp-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--problems", type=int, default=60, help="of SVAMP, to evaluate on")
    parser.add_argument("--build", action="store_true", help="write the model to --folder, and end")
    parser.add_argument("--case", choices=CASES, help="measure one case in this process, and end")
    return parser.parse_args()


def shared_of(options: argparse.Namespace, folder: str) -> Options:
    """The options that the cases see."""
    defaults = dict(zip(("prompt", "length", "steps"), (100, 256, 5), strict=True))
    if options.shape == "tiny":
        defaults = dict(zip(defaults, (20, 16, 2), strict=True))
    values = {field.name: getattr(options, field.name, None) for field in fields(Options)}
    values |= {key: values[key] or default for key, default in defaults.items()}
    return Options(**values | {"folder": folder})


def words_of(options: argparse.Namespace, shared: Options) -> list[str]:
    """The command line of a process of one case."""
    values = asdict(shared) | {"decode": options.decode}
    return [
        word
        for key, value in values.items()
        if value is not None
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]


def main() -> None:
    options = parse()
    options.began = time.perf_counter()
    options.output = options.output or str(RESULTS / "gpu.json")
    if options.list:
        print("\n".join(CASES))
    elif options.merge:
        merge(options.merge, Path(options.output))
    elif options.build:
        build_model(shared_of(options, options.folder))
    elif options.case:
        changes = {"decode": options.decode} if options.decode else {}
        measure(options.case, shared_of(options, options.folder), changes)
    else:
        names = [name for name in options.cases or CASES if name not in options.without]
        names = [name for name in names if CASES[name].kind != "svamp" or options.svamp]
        with tempfile.TemporaryDirectory(dir=memory_folder()) as temporary:
            shared = shared_of(options, options.folder or temporary)
            words = words_of(options, shared)
            if not (Path(shared.folder) / "config.json").exists():
                subprocess.run([sys.executable, __file__, "--build", *words], check=True, cwd=ROOT)
                print(f"[{time.perf_counter() - options.began:.0f} s] model written", flush=True)
            run_cases(names, words, options, shared)


def memory_folder() -> str | None:
    """A folder in memory with room for the weights, which load faster from there; None: a temporary one."""
    place = Path("/dev/shm")
    return str(place) if place.is_dir() and shutil.disk_usage(place).free > 2**33 else None


if __name__ == "__main__":
    main()
