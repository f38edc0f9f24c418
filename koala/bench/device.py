"""The device under measurement: its name, its rate of multiplication, its peak of memory, and a stopwatch."""

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from koala.generate import device as default_device

_SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices whose product is the peak: large enough to fill the device
_PRODUCTS = 20
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def describe() -> dict[str, Any]:
    """Return the device's name and the versions that the figures belong to."""
    device = default_device()
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    )
    found: dict[str, Any] = {
        "device": name,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30}
    return found


def processor() -> str:
    """Return the CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def matmul_peak(dtype: torch.dtype) -> float:
    """Return FLOP/s of the device's own product of two large square matrices of random numbers, the best of several."""
    device = default_device()
    side = _SIDES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    a @ b
    times = []
    for _ in range(_PRODUCTS):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def synchronize() -> None:
    """Wait until the device has finished its queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory:
    """The peak of memory since `restart`, in bytes: on a GPU all that this process holds, on a CPU what it grew by."""

    def __init__(self) -> None:
        """Remember what this process holds before the measurement."""
        self._cuda = torch.cuda.is_available()
        self._before = _resident("VmRSS")

    def restart(self) -> None:
        """Forget the peak of the preparation."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        except OSError:
            self._before = None

    def bytes(self) -> int | None:
        """Return the peak, or None where the system does not tell."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        most = _resident("VmHWM")
        return None if most is None or self._before is None else most - self._before


def _resident(field: str) -> int | None:
    """Return one of Linux's figures about this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


class Stopwatch:
    """Time split between names: each `mark` gives the time since the last one to a name.

    On a GPU, time is taken with CUDA events, so that timing does not synchronise. Each interval includes the GPU's idle
    time.
    """

    def __init__(self) -> None:
        """Start without marks."""
        self._now: Callable[[], Any] = _event if torch.cuda.is_available() else time.perf_counter
        self._marks: list[tuple[str | None, Any]] = []

    def start(self) -> None:
        """Begin an interval; the time before it belongs to no name."""
        self._marks.append((None, self._now()))

    def mark(self, name: str) -> None:
        """Give the time since the last mark to `name`."""
        self._marks.append((name, self._now()))

    def around(self, module: nn.Module, before: str, name: str) -> None:
        """Mark `before` when the module's forward starts, and `name` when it ends."""
        module.register_forward_pre_hook(lambda *_: self.mark(before))
        module.register_forward_hook(lambda *_: self.mark(name))

    def clear(self) -> None:
        """Forget all marks."""
        self._marks.clear()

    def seconds(self) -> dict[str, float]:
        """Return the sum for each name since the last `clear`, in the order of first marks."""
        synchronize()
        sums: dict[str, float] = {}
        for (_, start), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                spent = start.elapsed_time(end) / 1000 if isinstance(end, torch.cuda.Event) else end - start
                sums[name] = sums.get(name, 0.0) + spent
        return sums


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
