"""`error_diffusion`: a model's weights rounded with calibration data, in one pass, in place."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.operands import Operand, Setting
from microscale.policy import Policy
from microscale.recipes.batch import Batch, read
from microscale.recipes.calibration import Calibration
from microscale.recipes.grid import Search
from microscale.recipes.parallel import all_agree, gathered, rank
from microscale.recipes.progress import Progress, digest
from microscale.recipes.solve import Method, Settle, Solver
from microscale.recipes.walk import Report, Walk

CACHE_BYTES = 2**30


def error_diffusion(  # noqa: PLR0913  (one option each)
    model: nn.Module,
    policy: Policy | str,
    batches: Iterable[Batch],
    *,
    method: Method = "error_diffusion",
    scales: Search = "mse",
    settle: Settle = "entered",
    order: bool = False,
    damping: float | None = None,
    sweeps: int | None = None,
    correction: float | None = None,
    rotation: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    progress: Path | None = None,
    report: Report = lambda *_: None,
) -> Calibration:
    """Convert a model, its weights rounded so that each layer's outputs err least on the data.

    Args:
        model: any module; changed in place as `convert` does, its weights replaced by packed ones.
        policy: or its spelling.
        batches: what the model is called with: tensors, tuples of arguments, dictionaries of named
            ones, or functions of the model. They are run many times.
        method: "error_diffusion", "gptq", "qronos" or "rtn"; see `microscale.recipes.solve`.
        scales: searched for the least squared error ("mse"), or by the format's "rule".
        settle: whether a block's scale is settled when its turn comes ("entered") or before.
        order: whether inputs go by falling energy, block by block.
        damping: of inverses; None: the method's own.
        sweeps: how often the columns of a solved weight are gone over again;
            None: 4 for error_diffusion, else 0.
        correction: how far each layer's aim goes from what its weight gives for the inputs that
            the layer gets (0) to what the float network gives (1); None: 0.5 for error_diffusion,
            else 1. `gptq` has no such aim, except in sweeps.
        rotation: "hadamard" turns inputs and weights of linear layers (`microscale.rotation`);
            None: as the policy says.
        cache_bytes: memory for outputs of finished blocks; what is beyond goes to disk, into the
            temporary folder (TMPDIR).
        progress: a folder for the weights solved so far: the same call, after this one was killed,
            goes on where it was and ends with the same bits. Emptied at the end.
        report: called with what runs, the batches done, and how many there are.

    Returns:
        What was done to each weight, and which weights no data reached.

    Under torch.distributed every process is given its own share of the data, and all of them solve
    the same weights from the sums of all. They must agree on which weights the data reaches.

    Raises:
        MicroscaleError: bad data, a policy that cannot be carried out. The model is then as it
            was, except for weights of blocks that were finished before.
    """
    solver = Solver(method, settle, order, damping, sweeps, correction)
    if scales not in ("rule", "mse"):
        raise MicroscaleError(f"scales {scales!r} is not known; write 'rule' or 'mse'.")
    kept = read(batches)
    policy = Policy.parse(policy) if isinstance(policy, str) else policy
    if rotation is not None:
        policy = replace(policy, rotation=rotation)
    settings = policy, solver, scales
    _check(settings[0])
    # The data of all processes have a part in the result, so all of them make the run what it is.
    run = "" if progress is None else " ".join(gathered(digest(model, kept, settings)))
    conversion = convert(model, policy, verbose=False)
    walk = Walk(model, kept, solver, scales, cache_bytes, report)
    with _evaluating(model), _one_expert_at_a_time(model), _undone(walk):
        units = _units(walk)
        done = None if progress is None else Progress(progress, run, writes=rank() == 0)
        for number, unit in enumerate(units):
            _carry_out(walk, unit, number, done)
        if done is not None:
            done.remove()
    unreached = {
        name: walk.trace.unsolvable.get(name, "no product of the calibration data uses it")
        for name in walk.places.expected
        if name not in walk.known
    }
    return Calibration(conversion, method, tuple(walk.outcomes), unreached)


def _check(policy: Policy) -> None:
    """Refuse weights whose blocks no solver fills column by column."""
    places: list[tuple[str, Setting]] = [(path, policy.setting(path)) for path in _SOLVED]
    for pattern, settings in policy.overrides:
        places += [(f"overrides.{pattern!r}.{p}", s) for p, s in settings if p in _SOLVED]
    for place, setting in places:
        if isinstance(setting, Operand) and (
            isinstance(setting.format.block, tuple) or setting.format.zero_point
        ):
            raise MicroscaleError(
                f"policy {place} is {setting.format}: tiles and zero points are not calibrated; "
                "use blocks along the axis, or `convert` for rounding to nearest."
            )


_SOLVED = ("forward.weight", "storage")
"""The operands that hold weights."""

Unit = tuple[Callable[[], None], Callable[[dict[str, nn.Parameter]], None]]
"""What solves some weights, and what puts them in place where they were solved before."""


def _units(walk: Walk) -> list[Unit]:
    stages = walk.explore()
    tables: Unit = (walk.tables, partial(walk.skip, None))
    return [tables, *((partial(walk.stage, s), partial(walk.skip, s)) for s in stages)]


def _carry_out(walk: Walk, unit: Unit, number: int, progress: Progress | None) -> None:
    solve, skip = unit
    if progress is not None and all_agree(progress.has(number)):
        parameters, outcomes = progress.read(number)
        skip(parameters)
        walk.outcomes.extend(outcomes)
        return
    known, count = set(walk.known), len(walk.outcomes)
    solve()
    if progress is not None:
        new = {name: walk.places.parameter(name) for name in walk.known if name not in known}
        progress.write(number, new, walk.outcomes[count:])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, each module's own afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _one_expert_at_a_time(model: nn.Module) -> Iterator[None]:
    """Have fused experts of transformers run one by one, so that each one's inputs are seen."""
    configs: list[Any] = [
        module.config
        for module in model.modules()
        if hasattr(module, "is_transposed")
        and hasattr(getattr(module, "config", None), "_experts_implementation")
    ]
    ways = [config._experts_implementation for config in configs]  # noqa: SLF001  (no other way)
    for config in configs:
        config._experts_implementation = "eager"  # noqa: SLF001
    try:
        yield
    finally:
        for config, way in zip(configs, ways, strict=True):
            config._experts_implementation = way  # noqa: SLF001


@contextmanager
def _undone(walk: Walk) -> Iterator[None]:
    """Take back what was done if it cannot be finished."""
    try:
        yield
    except BaseException:
        walk.restore()
        revert(walk.model)
        raise
    finally:
        walk.close()
