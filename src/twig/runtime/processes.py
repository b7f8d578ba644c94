"""The processes of one run, and what they do together: gather values, sum gradients, end as one.

`accelerate launch` or `torchrun` starts them; each trains on a part of every step's prompts. Everything else
is the same in all of them. Process 0, the main one, writes the run folder and shows the display. Knows
nothing of what is gathered or summed. Torch is imported only if there are several.

A process that fails writes its reason to the store that torch's process group uses, before its connections
close. The others read it while they wait for a collective, and end with the same exit status. Gloo ends the
wait if a process is killed. A launcher also ends all processes of its machine soon after one has failed
(`torchrun`: SIGTERM at once, SIGKILL 30 seconds later). Without a launcher, a machine that is switched off is
noticed only by the process group's timeout: one day, which has to be longer than the longest wave of samples,
reward or evaluation that one process waits for.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Timer
from typing import TYPE_CHECKING, Any, TypeVar, cast

from twig.common.errors import UserError
from twig.common.text import message_of
from twig.runtime.failures import FAULT, STOPPED, Ended, Failure, as_exception, failure_of

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

TIMEOUT = timedelta(days=1)  # of the process group
_JOINING = timedelta(minutes=10)  # in which the processes find each other
_FAREWELL = 10.0  # seconds in which process 0 reads why another one failed
_POLL, _LOOK = 0.0002, 0.5  # seconds between looks at a collective, and at the store
_FAILURE, _READ, _HERE = "failure", "read by {}", "{} is here"  # keys in the store
_PATIENCE = 60.0  # seconds of waiting for the others, until a line says so
_ALONE = "unset RANK WORLD_SIZE"

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Processes:
    """A run in one process: nothing is shared out, and nothing is waited for."""

    rank, size = 0, 1
    local_size = 1  # processes on this machine
    reported = False  # whether process 0 reports how the run ends, and this one need not

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this process's part: the parts of all, laid end to end in order, are the whole."""
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[slice(*bounds)]

    def gather(self, value: T, *records: type) -> list[T]:
        """Returns what every process passed, in order: the same list in each.

        `value` is what `codec.encode` takes; `records` are the dataclasses in it.
        """
        return [value]

    def from_main(self, value: T | None, *records: type) -> T:
        """Returns what process 0 passed, in process 0 itself the same object; see `gather`."""
        return cast(T, value)

    def sum_gradients(self, parameters: Sequence["torch.Tensor"]) -> None:
        """Makes each parameter's gradient the sum over the processes; None if no process has one."""

    def copy_from_main(self, parameters: Sequence["torch.Tensor"]) -> None:
        """Makes the parameters those of process 0."""

    def check_device(self, device: "torch.device") -> None:
        """Raises UserError if two processes work on one GPU."""

    def interrupted(self) -> None:
        """Tells the others to stop too, after a KeyboardInterrupt; raises Ended if one of them failed."""


ALONE = Processes()


class Several(Processes):
    """One of several processes, in torch's default group or in one of Gloo beside it."""

    def __init__(self, launch: "Launch", store: "Store", group: "ProcessGroup | None") -> None:
        self.rank, self.size, self.local_size = launch.rank, launch.size, launch.local_size
        self.store, self.group = store, group
        self.failure: Failure | None = None  # the first of all processes
        self.reported = launch.rank != 0

    def gather(self, value: T, *records: type) -> list[T]:
        import torch
        import torch.distributed as dist

        from twig.runtime.codec import decode, encode

        data = torch.frombuffer(bytearray(encode(value, records)), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        self._do(dist.all_gather, lengths, torch.tensor([len(data)]), group=self.group)
        longest = max(int(length) for length in lengths)
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
        padded = torch.nn.functional.pad(data, (0, longest - len(data)))
        self._do(dist.all_gather, parts, padded, group=self.group)
        pairs = zip(parts, lengths, strict=True)
        return [decode(part[: int(length)].numpy().tobytes(), records) for part, length in pairs]

    def from_main(self, value: T | None, *records: type) -> T:
        import torch
        import torch.distributed as dist

        from twig.runtime.codec import decode, encode

        encoded = encode(value, records) if self.main else b""
        length = torch.tensor([len(encoded)])
        self._do(dist.broadcast, length, src=0, group=self.group)
        data = torch.empty(int(length), dtype=torch.uint8)
        if self.main:
            data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        self._do(dist.broadcast, data, src=0, group=self.group)
        return cast(T, value) if self.main else decode(data.numpy().tobytes(), records)

    def sum_gradients(self, parameters: Sequence["torch.Tensor"]) -> None:
        import torch
        import torch.distributed as dist

        # One vector: all gradients, then for each parameter in how many processes it has one.
        gradients = [parameter.grad for parameter in parameters]
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        present = [gradient is not None for gradient in gradients]
        counts = torch.tensor(present, dtype=flat[0].dtype, device=flat[0].device)
        total = torch.cat([*(gradient.flatten() for gradient in flat), counts])
        total = self._reduced(dist.all_reduce, total)
        *sums, counts = total.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, gradient, count in zip(parameters, sums, counts.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).clone() if count else None

    def copy_from_main(self, parameters: Sequence["torch.Tensor"]) -> None:
        import torch
        import torch.distributed as dist

        flat = self._reduced(dist.broadcast, torch.cat([p.detach().flatten() for p in parameters]), src=0)
        parts = flat.split([p.numel() for p in parameters])
        with torch.no_grad():
            for parameter, values in zip(parameters, parts, strict=True):
                parameter.copy_(values.view_as(parameter))

    def check_device(self, device: "torch.device") -> None:
        places = self.gather((socket.gethostname(), str(device)))
        others = [rank for rank in range(self.rank) if places[rank] == places[self.rank]]
        if device.type != "cpu" and others:
            raise UserError(
                "model.device",
                f"processes {others[0]} and {self.rank} would share {device}",
                "Set model.device=auto and start as many processes on a machine as it has GPUs",
            )

    def interrupted(self) -> None:
        failure = self.fail(Failure(self.rank, STOPPED, "stopped"))
        if failure.status != STOPPED:
            raise Ended(failure)

    def fail(self, failure: Failure) -> Failure:
        """Tells the others that this process ends, unless another one failed first; returns the first."""
        if self.failure is None:
            try:
                first = self.store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))
                self.failure = Failure(**json.loads(first))
            except RuntimeError:  # the process that holds the store is gone
                self.failure = failure
        return self.failure

    def leave(self) -> None:
        """Waits after a failure until process 0 has read the reason.

        Process 0 itself waits for the others if it holds the store, which ends with it.
        """
        own, others = _READ.format(self.rank), [_READ.format(0)]
        if self.main:
            launcher_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            others = [] if launcher_holds_it else [_READ.format(rank) for rank in range(1, self.size)]
        try:
            self.store.set(own, "")
            end = time.monotonic() + _FAREWELL
            while not (read := all(self.store.check([key]) for key in others)) and time.monotonic() < end:
                time.sleep(0.05)
        except RuntimeError:
            read = False  # the process that holds the store is gone
        if self.failure is not None and self.failure.status != STOPPED:
            self.reported = self.reported and read

    def _raise_failure(self) -> None:
        """Raises what another process's failure means here, if one has failed."""
        try:
            if self.failure is None and self.store.check([_FAILURE]):
                self.failure = Failure(**json.loads(self.store.get(_FAILURE)))
        except RuntimeError:
            pass  # the process that holds the store is gone: the collective will fail
        if self.failure is not None:
            raise as_exception(self.failure)

    def _reduced(self, collective: Callable, flat: "torch.Tensor", **options: Any) -> "torch.Tensor":
        """Returns `flat` after a collective in place: on a GPU by its own links, else through the CPU."""
        device = flat.device
        gpu = device.type == "cuda"
        flat = flat if gpu else flat.cpu()
        self._do(collective, flat, group=None if gpu else self.group, **options)
        return flat.to(device)

    def _do(self, collective: Callable, *arguments: Any, **options: Any) -> None:
        """Runs a collective. It is polled, because a wait inside it could not be interrupted."""
        try:
            work = collective(*arguments, async_op=True, **options)
            look = time.monotonic() + _LOOK
            while not work.is_completed():
                time.sleep(_POLL)
                if time.monotonic() > look:
                    self._raise_failure()
                    look = time.monotonic() + _LOOK
            work.wait()
        except RuntimeError as error:
            self._raise_failure()
            reason = f"lost another process: it may have been killed, or out of memory ({message_of(error)})"
            raise as_exception(self.fail(Failure(self.rank, FAULT, reason))) from error


# ---- beginning and end


@dataclass(frozen=True)
class Launch:
    """What a launcher says in the environment: this process's rank, and how many there are.

    `local_rank` and `local_size` are the same on this machine alone.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def address(self) -> str:
        """Where the processes meet."""
        return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def launched() -> Launch | None:
    """Returns what a launcher of several processes says; None if there is none, or only one process."""
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
    if not os.environ.get("MASTER_ADDR") or not all(number.isdigit() for number in numbers):
        return None
    rank, size, local_rank, _ = map(int, numbers)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Launch(rank, size, local_rank, local_size) if size > 1 else None


@contextmanager
def together(given: Processes | None = None) -> Iterator[Processes]:
    """Inside, the processes that a launcher started are one run: if one fails or dies, all end.

    A process whose run another one ended raises Ended, or KeyboardInterrupt if that one was stopped. With
    `given`, that is what is yielded, and its end is up to whoever made it.
    """
    launch = launched()
    if given is not None or launch is None:
        yield given or ALONE
        return
    processes, made = _join(launch)
    try:
        yield processes
        if processes.failure is None:
            processes.gather(None)  # all have come to the end
    except BaseException as error:
        own = failure_of(launch.rank, error)
        first = processes.fail(own)
        if isinstance(error, Ended) or first == own or first.status == STOPPED == own.status:
            raise
        raise as_exception(first) from error
    finally:
        if processes.failure is not None:
            processes.leave()
    if made and processes.failure is None:
        import torch.distributed as dist

        dist.destroy_process_group()


def _join(launch: Launch) -> tuple[Several, bool]:
    """Returns this process as one of several, and whether the process group was made here."""
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    line = (
        f"waiting for the other processes of {launch.size} at {launch.address}, as RANK={launch.rank} and "
        f"WORLD_SIZE={launch.size} are set in the environment; to train in this process alone: {_ALONE}"
    )
    with _said_after(_PATIENCE, line):
        try:
            store = _store()
            _meet(launch, store)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                "MASTER_ADDR",
                f"process {launch.rank} of {launch.size} cannot join the others at {launch.address} "
                f"({message_of(error)})",
                "Start all processes, and set MASTER_ADDR to an address of process 0's machine that all "
                f"reach; to train in one process alone: {_ALONE}",
            ) from error
    made, group = not dist.is_initialized(), None
    if made:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=PrefixStore("group", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=TIMEOUT,
        )
    elif "gloo" not in str(dist.get_backend_config()):
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "every process is in it"
    return Several(launch, store, group), made


@contextmanager
def _said_after(seconds: float, line: str) -> Iterator[None]:
    """Logs the line if what is inside takes longer than that."""
    timer = Timer(seconds, logger.warning, (line,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _store() -> "Store":
    """Returns the store at MASTER_ADDR, which a launcher or process 0 holds."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=_JOINING))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"twig {attempt}", store)


def _meet(launch: Launch, store: "Store") -> None:
    """Waits until all processes are at the store; raises RuntimeError if one does not come."""
    store.set(_HERE.format(launch.rank), "")
    end = time.monotonic() + _JOINING.total_seconds()
    for rank in range(launch.size):
        while not store.check([_HERE.format(rank)]):
            if time.monotonic() > end:
                raise RuntimeError(f"process {rank} does not come")
            time.sleep(0.05)
