"""Measures a GPU: seconds and peak memory by phase, its bandwidth, and the kernels that its time goes to.

Without CUDA the same works on a CPU with resident memory, so that everything can be tried there.
"""

import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from memory import Peaks

MIB = 2**20
# bytes per second of the data sheets, by a word of the device's name
DATASHEET = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}
# kernels by a part of their name, the first that fits
KINDS = {
    "attention": ("flash", "fmha", "attention", "attn"),
    "matrix product": ("gemm", "gemv", "xmma", "nvjet", "cutlass", "cublas", "splitk", "_mm_", "dot_kernel"),
    "dequantisation": ("dequant", "kdequantize", "kgemm_4bit"),
    "softmax": ("softmax",),
    "search and scan": ("scan", "searchsorted", "sort", "topk", "cub::"),
    "reduction": ("reduce", "layer_norm", "rms_norm", "triton_red", "triton_per"),
    "copy": ("memcpy", "memset", "copy", "catarray", "fill"),
    "index": ("index", "gather", "scatter", "embedding"),
    "pointwise": ("elementwise", "pointwise", "triton_poi", "fused", "multi_tensor"),
}


def device_bytes() -> int | None:
    """The bytes in use on the GPU, by its driver: everybody's, contexts included; None if nobody tells.

    Creates no CUDA context, so it can be called before there is one.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    except Exception:  # not installed, or no such device: the tool may be there all the same
        pass
    try:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        return int(printed.split()[0]) * MIB
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


class Meter:
    """Seconds and peak memory of one phase after another. Make it before CUDA is used in the process.

    On a GPU a phase has `allocated` and `reserved`, the peaks of torch's allocator, and `device`, what the
    driver counts beyond what was there before: the context and the libraries too. All in MiB.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.before = (device_bytes() or 0) if self.cuda else 0
        self.resident = None if self.cuda else Peaks()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.memory: dict[str, dict[str, float]] = {}
        self.began = time.perf_counter()

    def note(self, phase: str) -> float:
        """Ends a phase: waits for the device, keeps the phase's figures, returns its seconds."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        self.seconds[phase].append(seconds)
        before = self.memory.get(phase, {})
        self.memory[phase] = {k: max(v, before.get(k, 0.0)) for k, v in self._peaks(phase).items()}
        self.began = time.perf_counter()
        return seconds

    def _peaks(self, phase: str) -> dict[str, float]:
        if self.resident is not None:
            self.resident.note(phase)
            return {"resident": self.resident.found[phase]}
        reserved, most = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
        used = device_bytes()
        if used is None:
            free, total = torch.cuda.mem_get_info()
            used = total - free
        found = {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": most,
            # what was given back within the phase was there too
            "device": used - self.before + most - reserved,
            "outside_torch": used - self.before - reserved,
        }
        torch.cuda.reset_peak_memory_stats()
        return {key: round(value / MIB, 1) for key, value in found.items()}

    def peaks(self) -> dict[str, float]:
        """The highest figures over all phases."""
        found: dict[str, float] = {}
        for figures in self.memory.values():
            found |= {key: max(value, found.get(key, 0.0)) for key, value in figures.items()}
        return found


def spread(values: list[float]) -> dict[str, float]:
    """The median of some measurements and their range."""
    return {
        "median": round(median(values), 5),
        "low": round(min(values), 5),
        "high": round(max(values), 5),
        "n": len(values),
    }


def weight_bytes(model: torch.nn.Module) -> int:
    """The bytes of a model's own weights, tied ones once and adapters left out."""
    kept = {id(p): p for name, p in model.named_parameters() if "lora_" not in name}
    return sum(p.numel() * p.element_size() for p in kept.values())


def bandwidth() -> dict[str, Any]:
    """Bytes per second of the device's memory: of a copy (read and written), of a read, by its data sheet."""
    name = torch.cuda.get_device_name()
    found: dict[str, Any] = {
        "device": name,
        "datasheet": next((value for word, value in DATASHEET.items() if word in name), None),
    }
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").fill_(1.0)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    found["copy"] = 2 * size / _seconds(lambda: target.copy_(source))
    found["read"] = size / _seconds(lambda: source.amax())
    return found


def _seconds(call: Callable[[], Any], rounds: int = 10) -> float:
    """The median seconds of a call, by the device's own clock."""
    for _ in range(3):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)) / 1000


def profiled(call: Callable[[], Any], top: int = 15) -> dict[str, Any]:
    """Where a call's time goes on the device: kernels by time and by kind, and how busy the device is.

    On a CPU the operations take the place of the kernels; there one lies within another.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    if cuda:
        torch.cuda.synchronize()
    with profile(activities=[activity]) as trace:
        began = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    spans = []
    for event in trace.profiler.kineto_results.events():
        if cuda and event.device_type() != torch.autograd.DeviceType.CUDA:
            continue
        entry = by_name[event.name()]
        entry[0] += 1
        entry[1] += event.duration_ns() / 1e6
        spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    return {"wall_ms": round(1000 * wall, 3), **_summary(by_name, spans, top)}


def _summary(by_name: dict[str, list[float]], spans: list[tuple[int, int]], top: int) -> dict[str, Any]:
    kinds: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, (count, milliseconds) in by_name.items():
        entry = kinds[_kind(name)]
        entry[0] += count
        entry[1] += milliseconds
    total = sum(entry[1] for entry in by_name.values())
    order = sorted(by_name.items(), key=lambda item: -item[1][1])[:top]
    return {
        "kernels": sum(int(entry[0]) for entry in by_name.values()),
        "device_ms": round(total, 3),
        # from the first kernel's beginning to the last one's end, and how much of it some kernel ran
        "span_ms": round((max(b for _, b in spans) - min(a for a, _ in spans)) / 1e6, 3) if spans else 0.0,
        "busy_ms": round(_covered(spans) / 1e6, 3),
        "kinds": {
            kind: {"kernels": int(count), "ms": round(ms, 3), "share": round(ms / max(total, 1e-9), 4)}
            for kind, (count, ms) in sorted(kinds.items(), key=lambda item: -item[1][1])
        },
        "top": [
            {"name": name[:160], "kernels": int(count), "ms": round(ms, 3), "share": round(ms / total, 4)}
            for name, (count, ms) in order
        ],
    }


def _kind(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lowered for part in parts)), "other")


def _covered(spans: list[tuple[int, int]]) -> int:
    """The length of the union of some spans."""
    covered, reached = 0, 0
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return covered
