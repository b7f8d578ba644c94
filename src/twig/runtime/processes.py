"""The processes of one run, and the few things they do together: gather values, sum gradients, end as one.

`accelerate launch` or `torchrun` starts them; each has a part of every step's prompts. Everything that is not
a share is the same in all of them. Process 0, the main one, writes the run folder and shows the display.
Knows nothing of what is gathered or summed. Torch is imported where there are several, and nowhere else.
"""

import os
import pickle
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from twig.common.errors import UserError
from twig.runtime.lifeline import (
    FAULT,
    LOOPBACK,
    STOPPED,
    USAGE_ERROR,
    Ended,
    Failure,
    Lifeline,
    Listener,
    connect,
)

_LONGEST_WAIT = timedelta(days=1)  # for a slower process; that one died is heard of by the lifeline
_BREAK = 5.0  # seconds in which the cause of a broken connection is heard of
_POLL = 0.0002


class Processes:
    """A run in one process: nothing is shared out, and nothing is waited for."""

    rank, size, local_size = 0, 1, 1  # the last is how many there are on this machine

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """This process's part: the shares of all, laid end to end in order, are the whole."""
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[slice(*bounds)]

    def gather(self, value: Any) -> list[Any]:
        """What every process passed, in order: the same list in each."""
        return [value]

    def from_main(self, value: Any) -> Any:
        """What process 0 passed."""
        return value

    def sum_gradients(self, parameters: Sequence[Any]) -> None:
        """Makes each parameter's gradient the sum over the processes; None where no process has one."""

    def copy_from_main(self, parameters: Sequence[Any]) -> None:
        """Makes the parameters those of process 0."""

    def check_device(self, device: Any) -> None:
        """Raises UserError where two processes work on one GPU."""

    def interrupted(self) -> None:
        """To be called where KeyboardInterrupt is caught: the others are to stop too, and one that failed
        ends this one."""


ALONE = Processes()


class Several(Processes):
    """One of several processes, in torch's default group or in one of Gloo beside it."""

    def __init__(self, launch: "Launch", lifeline: Lifeline, group: Any) -> None:
        self.rank, self.size, self.local_size = launch.rank, launch.size, launch.local_size
        self.lifeline, self.group = lifeline, group

    def gather(self, value: Any) -> list[Any]:
        import torch
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        self._do(dist.all_gather, sizes, torch.tensor([len(data)]), group=self.group)
        longest = int(max(sizes))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        padded = torch.nn.functional.pad(data, (0, longest - len(data)))
        self._do(dist.all_gather, parts, padded, group=self.group)
        return [pickle.loads(part.numpy()[: int(n)]) for part, n in zip(parts, sizes, strict=True)]

    def from_main(self, value: Any) -> Any:
        import torch
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(pickle.dumps(value if self.main else None)), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self._do(dist.broadcast, size, src=0, group=self.group)
        data = data if self.main else torch.empty(int(size), dtype=torch.uint8)
        self._do(dist.broadcast, data, src=0, group=self.group)
        return value if self.main else pickle.loads(data.numpy())

    def sum_gradients(self, parameters: Sequence[Any]) -> None:
        import torch
        import torch.distributed as dist

        # One vector: all gradients, then for each parameter in how many processes it has one.
        known = [parameter.grad is not None for parameter in parameters]
        flat = [p.grad if has else torch.zeros_like(p) for p, has in zip(parameters, known, strict=True)]
        counts = torch.tensor(known, dtype=flat[0].dtype, device=flat[0].device)
        total = torch.cat([*(gradient.flatten() for gradient in flat), counts])
        total = self._reduced(dist.all_reduce, total)
        *sums, counts = total.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, found, count in zip(parameters, sums, counts.tolist(), strict=True):
            parameter.grad = found.view_as(parameter).clone() if count else None

    def copy_from_main(self, parameters: Sequence[Any]) -> None:
        import torch
        import torch.distributed as dist

        flat = self._reduced(dist.broadcast, torch.cat([p.detach().flatten() for p in parameters]), src=0)
        with torch.no_grad():
            for parameter, found in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.copy_(found.view_as(parameter))

    def check_device(self, device: Any) -> None:
        places = self.gather((socket.gethostname(), str(device)))
        others = [rank for rank in range(self.rank) if places[rank] == places[self.rank]]
        if device.type != "cpu" and others:
            raise UserError(
                f"model.device: processes {others[0]} and {self.rank} would share {device}; write "
                "model.device=auto and start as many processes on a machine as it has GPUs"
            )

    def interrupted(self) -> None:
        if self.lifeline.failure is None:
            self.lifeline.tell(Failure(self.rank, STOPPED, "stopped"))
        elif self.lifeline.failure.status != STOPPED:
            raise _as_exception(self.lifeline.failure)

    def _reduced(self, collective: Any, flat: Any, **options: Any) -> Any:
        """`flat` after a collective in place: on a GPU by its own links, else through the CPU."""
        device = flat.device
        gpu = device.type == "cuda"
        flat = flat if gpu else flat.cpu()
        self._do(collective, flat, group=None if gpu else self.group, **options)
        return flat.to(device)

    def _do(self, collective: Any, *arguments: Any, **options: Any) -> None:
        """Runs a collective. It is polled, because a wait inside it could not be interrupted."""
        try:
            work = collective(*arguments, async_op=True, **options)
            while not work.is_completed():
                time.sleep(_POLL)
            work.wait()
        except RuntimeError as error:
            failure = self.lifeline.wait(_BREAK)
            reason = " ".join(str(error).split())[:200]
            lost = Failure(self.rank, FAULT, f"lost its connection to the other processes ({reason})")
            raise _as_exception(failure or lost) from error


# ---- beginning and end


@dataclass(frozen=True)
class Launch:
    """What a launcher says in the environment: this process's number, how many there are, the same on this
    machine alone, and an address of process 0's machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str


def launched() -> Launch | None:
    """What a launcher of several processes says; None where there is none, or only one process."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
    address = os.environ.get("MASTER_ADDR")
    if not address or not all(word.isdigit() for word in found):
        return None
    rank, size, local_rank, _ = map(int, found)
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    address = LOOPBACK if here == str(size) else address
    return Launch(rank, size, local_rank, int(here), address) if size > 1 else None


@contextmanager
def together(given: Processes | None = None) -> Iterator[Processes]:
    """Inside, the processes that a launcher started are one run: where one fails or dies, all end.

    A process that hears of another one's end raises Ended, or KeyboardInterrupt where that was stopped. With
    `given`, that is what is yielded, and its end is up to whoever made it.
    """
    launch = launched()
    if given is not None or launch is None:
        yield given or ALONE
        return
    processes, made = _join(launch)
    lifeline = processes.lifeline
    try:
        yield processes
        if lifeline.failure is None:
            processes.gather(None)  # all have come to the end
    except BaseException as error:
        if lifeline.failure is None:
            lifeline.tell(_failure(processes.rank, error))
            raise
        if isinstance(error, Ended) or lifeline.failure.status == STOPPED == exit_status(error):
            raise
        raise _as_exception(lifeline.failure) from error
    finally:
        lifeline.leave()
    if made and lifeline.failure is None:
        import torch.distributed as dist

        dist.destroy_process_group()


def _join(launch: Launch) -> tuple[Several, bool]:
    """This process as one of several, and whether the process group was made here."""
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
    made, group = not dist.is_initialized(), None
    if made:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_LONGEST_WAIT)
    elif "gloo" not in str(dist.get_backend_config()):
        group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    return Several(launch, _open_line(launch, group), group), made


def _open_line(launch: Launch, group: Any) -> Lifeline:
    import torch.distributed as dist

    door: list[Any] = [None]
    if launch.rank == 0:
        listener = Listener.open(launch.address)
        door = [(listener.port, listener.word)]
    dist.broadcast_object_list(door, src=0, group=group)
    try:
        if launch.rank == 0:
            return listener.accept(launch.size)
        return connect(launch.address, *door[0], launch.rank)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR: process {launch.rank} finds no way between {launch.address} and itself ({error}); "
            "write an address at which all machines reach that of process 0, any port"
        ) from error


def _failure(rank: int, error: BaseException) -> Failure:
    if isinstance(error, Ended):
        return error.failure
    words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return Failure(rank, exit_status(error), words, getattr(error, "traceback_text", None) or "")


def exit_status(error: BaseException) -> int:
    """The exit status that an error of this process or of another one stands for."""
    if isinstance(error, UserError):
        return USAGE_ERROR
    return getattr(error, "status", STOPPED if isinstance(error, KeyboardInterrupt) else FAULT)


def _as_exception(failure: Failure) -> BaseException:
    return KeyboardInterrupt() if failure.status == STOPPED else Ended(failure)
