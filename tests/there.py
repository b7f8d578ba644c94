"""A device of its own without a GPU: tensors that say they are on `there`, and compute on the CPU.

It finds what a CPU cannot show: a tensor that was made without `device=`, or moved by numpy alone. Any
operation that would mix the two raises, as it would on CUDA, but for what CUDA allows: numbers (tensors of no
dimension), indices, and copies. `TWIG_TEST_DEVICE=there` runs `tests/gpu/` on it.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "there"
_PUT = {"aten::index_put_", "aten::index_put"}
_FREE = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::_unsafe_index"} | _PUT
waits: Counter[str] = Counter()  # operations whose result the host has to wait for, by name


class There(torch.Tensor):
    """A tensor on the device, whose values are in `inner`, a CPU tensor."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    def __init__(self, inner):
        pass

    def __repr__(self):
        return f"There({self.inner!r})"

    def tolist(self):
        waits["tolist"] += 1
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert a tensor on {self.device} to numpy; use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = There(self.inner.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]


def _run(func, args, kwargs):
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in flat if isinstance(x, There)]
    name = func._schema.name
    device = kwargs.get("device")
    on = bool(there) if device is None else torch.device(device).type == NAME
    left = [x for x in flat if not isinstance(x, There) and x.dim() > 0]
    if there and left and name not in _FREE:
        shapes = [(type(x).__name__, tuple(x.shape), x.dtype) for x in flat]
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, of {shapes}")
    if there and left and name in _PUT and args[2].dim() > 0 and not isinstance(args[2], There):
        raise RuntimeError(f"{name}: values on another device")
    if not there and not on:
        return func(*args, **kwargs)
    if there and _waits_for_values(func, args, on):
        waits[name] += 1
    moved = dict(kwargs)
    if device is not None:
        moved["device"] = torch.device("cpu")
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, There) else x, (args, moved))
    out = func(*inner_args, **inner_kwargs)
    if name == "aten::copy_" and not isinstance(args[0], There):
        return args[0]
    if name == "aten::_local_scalar_dense":
        return out
    if not on:
        # to the CPU: a copy, even where the values are there already
        return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, out)
    wrapped = tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, out)
    if not there:
        return wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _waits_for_values(func, args, on) -> bool:
    """Whether the host needs values of the device to go on: as a number, a shape, or a copy."""
    name = func._schema.name
    if name == "aten::copy_":
        return isinstance(args[1], There) and not isinstance(args[0], There)
    if name.startswith(("aten::index.", "aten::index_put", "aten::_unsafe_index")) or name == "aten::index":
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return not on or any(tag in func.tags for tag in tags)


class Device(TorchDispatchMode):
    """Inside, `there` is a device like any other."""

    def __enter__(self):
        self.before = [*getattr(self, "before", []), torch._C._only_lift_cpu_tensors()]
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=) is a copy like others
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.before.pop())
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode torch leaves this to us
                return func.decompose(*args, **kwargs or {})
        return _run(func, args, kwargs or {})


def cannot_run(test):
    """Whether a test is one of few that need more of its tensors: to change their dtype in place, to be
    viewed in inference mode, or to be run again by autograd's own thread."""
    words = ("checkpointed", "float32_gradient", "mamba", "recurrent_gemma", "qwen3_next")
    return any(word in test for word in words)


def register():
    """Makes the name known to torch; once in a process."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)
        # asked for when checkpointed layers run again
        getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
