"""Defines the command `twig env`: versions, device and memory."""

from rich.text import Text

from twig import __version__
from twig.cli.console import result_console, show_row
from twig.runtime.machine import device_words, environment, gpu_warning, has_nvidia_gpu


def env_command() -> None:
    """Show versions, device and memory, and what to change about them."""
    import psutil
    import torch

    record = environment()
    memory = psutil.virtual_memory()
    device = device_words(torch)
    rows = {
        "twig": __version__,
        "python": record["python"],
        **{name: value or "not installed" for name, value in record["versions"].items() if name != "twig-rl"},
        "platform": record["platform"],
        "processor": record["processor"] or "unknown",
        "processors": record["cpu_count"],
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
        "device": device,
        "products": _products(),
    }
    for name, value in rows.items():
        show_row(name, value)
    warning = gpu_warning(torch.version.cuda, torch.version.hip, torch.cuda.is_available(), has_nvidia_gpu())
    if warning:
        result_console().print(Text(f"\nwarning: {warning}"), soft_wrap=True)


def _products() -> str:
    """Returns what `model.kernels=auto` takes on the CPU here for a model of half a billion parameters."""
    from twig.engine.kernels import choose_kernels

    choice = choose_kernels("auto", "cpu", "float32", [(896, 896), (896, 4864), (4864, 896)])
    model = "a float32 model of 0.5 billion parameters on the CPU"
    return f"model.kernels={choice.kernels} for {model} ({choice.why})"
