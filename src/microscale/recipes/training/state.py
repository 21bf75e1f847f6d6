"""The state of a run on disk, so that it goes on bit for bit after it was killed at any moment.

`checkpoints/step-N` is a folder of torch.distributed.checkpoint and a `commit.json`: the step, the
settings, the digests of all files. It is written under another name, flushed to the disk and only
then renamed, so a folder of that name is always whole; the one before is kept. What a run needs
besides its settings and data is in it: weights, optimizer, and the random state of each process.
The position in the data is the step.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from microscale.errors import MicroscaleError
from microscale.recipes.training.tokens import digest_file
from microscale.recipes.training.world import World

COMMIT = "commit.json"
KIND = "microscale training checkpoint"
KEPT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: its folder, and what its `commit.json` says."""

    path: Path
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of steps that were done."""
        return int(self.record["step"])

    @property
    def world_size(self) -> int:
        """The number of processes that wrote it."""
        return int(self.record["world_size"])


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, its files checked; None where there is none.

    Raises MicroscaleError for one that is damaged or none of this program's; it is not passed over
    for an older one, since that is the user's choice.
    """
    paths = _paths(folder)
    return _read(paths[-1], paths[:-1]) if paths else None


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _read(path: Path, older: list[Path]) -> Checkpoint:
    advice = f"delete it to go on from {str(older[-1])!r}" if older else "delete it to begin anew"
    try:
        made = Checkpoint(path, json.loads((path / COMMIT).read_text()))
        files = dict(made.record["files"])
        fault = "" if _is_ours(made) else f"it is a {made.record['kind']!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = repr(error)
    if fault:
        raise MicroscaleError(
            f"checkpoint {str(path)!r} is none of this program's, or its {COMMIT} is damaged "
            f"({fault}); {advice}."
        )
    for name, digest in files.items():
        if not (path / name).is_file() or digest_file(path / name) != digest:
            raise MicroscaleError(
                f"checkpoint {str(path)!r} is damaged: {name} is missing or has other bytes than "
                f"were written; {advice}."
            )
    return made


def _is_ours(made: Checkpoint) -> bool:
    needed = {"config", "data", "policy"} <= made.record.keys()
    return needed and made.record["kind"] == KIND and made.step >= 0 < made.world_size


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
    world: World,
) -> None:
    """Write a checkpoint of `record["step"]` steps, and delete all but the last two."""
    target = folder / f"step-{record['step']:08}"
    partial = folder / f".{target.name}.partial"
    with world.in_turn():
        if world.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    state = _state(model, optimizer) | {_generator(world.rank): _random_state(world.device)}
    with _quiet():
        state_dict_saver.save(state, checkpoint_id=partial, no_dist=world.size == 1)
    with world.in_turn():
        if world.first:
            _commit(partial, target, record | {"kind": KIND, "world_size": world.size})
            for old in _paths(folder)[:-KEPT]:
                shutil.rmtree(old)


def restore(
    found: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> None:
    """Set weights, optimizer and random state; raises MicroscaleError where they do not fit.

    Weights and optimizer are sharded anew for another number of processes; a process that was not
    there gets a random state of its own, and the run is then no longer the same bit for bit.
    """
    state = _state(model, optimizer)
    known = world.rank < found.world_size
    if known:
        state[_generator(world.rank)] = torch.empty_like(_random_state(world.device))
    try:
        with _quiet():
            state_dict_loader.load(state, checkpoint_id=found.path, no_dist=world.size == 1)
    except (RuntimeError, ValueError, KeyError, CheckpointException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MicroscaleError(
            f"checkpoint {str(found.path)!r} does not fit this model on {world.size} process(es) "
            f"(it was written by {found.world_size}): {reason}"
        ) from error
    set_state_dict(
        model,
        optimizer,
        model_state_dict=_section(state, "model"),
        optim_state_dict=_section(state, "optimizer"),
    )
    if known:
        _set_random_state(state[_generator(world.rank)], world.device)
    else:
        torch.manual_seed(found.step * 1_000_003 + world.rank)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process is alone, which it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def _section(state: dict[str, Any], name: str) -> dict[str, Any]:
    section: dict[str, Any] = state[name]
    return section


def _generator(rank: int) -> str:
    return f"random-{rank}"


def _random_state(device: torch.device) -> Tensor:
    """The state of the CPU's generator, and the device's after it."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _set_random_state(state: Tensor, device: torch.device) -> None:
    length = len(torch.get_rng_state())
    torch.set_rng_state(state[:length])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[length:], device)


def _commit(partial: Path, target: Path, record: dict[str, Any]) -> None:
    files = sorted(p for p in partial.rglob("*") if p.is_file())
    digests = {str(p.relative_to(partial)): digest_file(p) for p in files}
    text = json.dumps(record | {"files": digests}, indent=2) + "\n"
    (partial / COMMIT).write_text(text)
    for path in (*files, partial / COMMIT, partial):
        _flush(path)
    if target.exists():  # of the same step, from before an interruption
        shutil.rmtree(target)
    partial.rename(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
