"""Run as a program: `quantize_folder` in forked processes that are stopped at every step.

    python stops.py kill SOURCE OUT FIRST STEP     SIGKILL at each FIRST + n STEP of its steps
    python stops.py limit SOURCE OUT BYTES         no file may be longer (a full disk)

A step is a write, a rename or an fsync. Prints one line of JSON. Forking keeps it fast: what
takes long is to import torch.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from microscale.checkpoint import direct
from microscale.policy import Policy

POLICY = Policy.parse("mxfp4/fp32")
STEPS = ("write", "pwrite", "fsync", "ftruncate", "rename")


def child(work: Callable[[], None]) -> int:
    """The wait status of a process that does `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except Exception as error:  # noqa: BLE001  (the parent reads it)
            print(type(error).__name__, error, flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def killed_at(step: int, source: Path, out: Path) -> None:
    """Quantize, and be killed before the step of that number."""
    left = step

    def counted(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return original(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    direct.quantize_folder(source, POLICY, out)


def quantized(source: Path, out: Path) -> None:
    direct.quantize_folder(source, POLICY, out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kill(source: Path, out: Path, first: int, stride: int) -> dict[str, Any]:
    """Kill at every step, go on, and compare."""
    assert child(lambda: quantized(source, out)) == 0
    wanted = content(out)
    shutil.rmtree(out)
    partial = out.with_name(f".{out.name}.partial")
    kept, faults, step = 0, [], first
    while True:
        status = child(lambda at=step: killed_at(at, source, out))  # type: ignore[misc]
        if status == 0:
            break
        assert status == signal.SIGKILL, status
        if out.exists() and content(out) != wanted:
            faults.append(f"step {step}: half a folder")
        whole = {p.name: p.stat().st_ino for p in partial.glob("model*.safetensors")}
        # Killed after the last rename nothing is left to be done.
        if not out.exists() and child(lambda: quantized(source, out)):
            faults.append(f"step {step}: does not go on")
        elif content(out) != wanted:
            faults.append(f"step {step}: other bytes")
        elif any((out / name).stat().st_ino != node for name, node in whole.items()):
            faults.append(f"step {step}: a finished shard was written again")
        kept += bool(whole)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        step += stride
    return {"steps": step, "kept": kept, "faults": faults}


def limit(source: Path, out: Path, size: int) -> dict[str, Any]:
    """Quantize where no file may be longer than `size`, then without the limit."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        direct.quantize_folder(source, POLICY, out)

    status = os.waitstatus_to_exitcode(child(limited))
    there = out.exists()
    again = child(lambda: quantized(source, out))
    return {"status": status, "there": there, "again": again}


if __name__ == "__main__":
    torch.set_num_threads(1)
    direct.SLICE = 1024
    source, out = map(Path, sys.argv[2:4])
    numbers = list(map(int, sys.argv[4:]))
    result = kill(source, out, *numbers) if sys.argv[1] == "kill" else limit(source, out, *numbers)
    print(json.dumps(result))
