"""`microscale quantize`: a model written packed, rounded with calibration data or cast directly."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from microscale.checkpoint.direct import BESIDES, POLICY
from microscale.checkpoint.native import save
from microscale.commands.console import console
from microscale.commands.direct import cast_directly
from microscale.errors import MicroscaleError, near_names
from microscale.files import write_file
from microscale.policy import Policy
from microscale.ranges import Estimator
from microscale.recipes.calibration import Calibration
from microscale.recipes.diffusion import error_diffusion
from microscale.recipes.ranges import Ranging, ranges
from microscale.recipes.solve import Solver
from microscale.report.progress import bars
from microscale.suite.calibration import read_calibration
from microscale.suite.setting import Setting

WEIGHTS = "model.safetensors"
REPORT = "calibration.json"
PROGRESS = ".progress"
RANGES = "ranges"
USUAL_METHOD = "error_diffusion"
RANGE_OPTIONS = ("--weight-range", "--input-range", "--batch-norm", "--exponents")
USUAL = {
    "scales": "mse",
    "settle": "entered",
    "order": False,
    "sweeps": None,
    "correction": None,
}
"""The options of methods that solve, as they are when none is given."""


def run_quantize(  # noqa: PLR0913  (the command's options)
    model: str,
    *,
    fmt: str | None,
    policy: Path | None,
    method: Any,
    data: Path | None,
    out: Path,
    scales: Any,
    settle: Any,
    order: bool,
    sweeps: int | None,
    correction: float | None,
    rotation: str,
    weight_range: str | None,
    input_range: str | None,
    batch_norm: bool,
    exponents: bool,
    limit: int | None,
    batch_size: int | None,
    seed: int,
    device: str,
    dtype: str,
) -> None:
    """Quantize a model by `method` and write it to the folder `out`.

    Everything is checked first. The folder is made when the first weights are solved; it keeps
    them until the end, so that the same command goes on where it was killed. Without data the
    weights are cast directly, tensor by tensor, which needs no memory for the model.
    """
    setting = Setting.parse(
        limit=limit, batch_size=batch_size, seed=seed, device=device, dtype=dtype
    )
    ranging: dict[str, Any] = {"weights": weight_range, "inputs": input_range}
    ranging |= {"batch_norm": batch_norm, "exponents": exponents}
    options = scales, settle, order, sweeps, correction
    solving: dict[str, Any] = dict(zip(USUAL, options, strict=True))
    chosen = read_policy(fmt, policy)
    if rotation != "off":
        chosen = replace(chosen, rotation=rotation)
    if data is None:
        others = {"method": method, "limit": limit, "batch_size": batch_size}
        _check_direct(others | solving, ranging)
        cast_directly(model, chosen, out)
        return
    method = method or USUAL_METHOD
    _check_method(method, ranging, solving)
    check_folder(out)
    with bars(model) as report:
        report("loading", 0, None)
        found = read_calibration(model, data, setting)
        calibration: Calibration | Ranging
        if method == RANGES:
            given: Any = {name: value for name, value in ranging.items() if value is not None}
            report("ranges", 0, None)
            calibration = ranges(
                found.model, chosen, found.batches, **given, progress=out / PROGRESS
            )
            chosen = calibration.conversion.policy
        else:
            calibration = error_diffusion(
                found.model,
                chosen,
                found.batches,
                method=method,
                **solving,
                progress=out / PROGRESS,
                report=report,
            )
    out.mkdir(parents=True, exist_ok=True)
    if found.folder is not None:
        copy_besides(found.folder, out)
    save(found.model, out / WEIGHTS)
    write_file(out / POLICY, chosen.to_toml())
    record = {"model": model, "data": found.about, "seed": seed, **calibration.to_dict()}
    write_file(out / REPORT, json.dumps(record, indent=2) + "\n")
    terminal = console()
    terminal.print(str(calibration), markup=False)
    terminal.print(
        f"{out / WEIGHTS}: {calibration.conversion.bits_per_weight:.3f} bits per weight, "
        f"calibrated with {found.about}.",
        markup=False,
    )


def _check_direct(given: dict[str, Any], ranging: dict[str, Any]) -> None:
    """Refuse options that need data."""
    unusual = [f"--{name}" for name, value in given.items() if value != USUAL.get(name)]
    unusual += [o for o, v in zip(RANGE_OPTIONS, ranging.values(), strict=True) if v]
    if unusual:
        raise MicroscaleError(
            f"{unusual[0].replace('_', '-')} needs calibration data; give --data FILE, or leave it "
            "away to cast the weights directly."
        )


def _check_method(method: Any, ranging: dict[str, Any], solving: dict[str, Any]) -> None:
    """Refuse options of the other methods, and values that the method does not know."""
    if method != RANGES:
        for name, option in zip(ranging, RANGE_OPTIONS, strict=True):
            if ranging[name]:
                raise MicroscaleError(f"{option} is for --method ranges, not {method!r}.")
        further = solving["sweeps"], solving["correction"]
        Solver(method, solving["settle"], solving["order"], None, *further)
        return
    for name, usual in USUAL.items():
        if solving[name] != usual:
            raise MicroscaleError(f"--{name} is for methods that solve, not for {RANGES!r}.")
    for option, value in zip(RANGE_OPTIONS, ranging.values(), strict=True):
        if isinstance(value, str) and value not in list(Estimator):
            near = near_names(value, [str(e) for e in Estimator])
            raise MicroscaleError(f"{option} {value!r} is not known.{near}")


def copy_besides(folder: Path, out: Path) -> None:
    """Copy configuration and tokenizer of a model directory."""
    for pattern in BESIDES:
        for path in sorted(folder.glob(pattern)):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, out / path.name)


def read_policy(fmt: str | None, path: Path | None) -> Policy:
    """The policy of `--format` or `--policy`, of which one is given."""
    if (fmt is None) == (path is None):
        raise MicroscaleError("give either --format or --policy.")
    if fmt is not None:
        return Policy.parse(fmt)
    assert path is not None
    return Policy.read(path)


def check_folder(out: Path) -> None:
    """Refuse an `--out` that holds something else than the progress of a run."""
    if out.exists() and not out.is_dir():
        raise MicroscaleError(f"--out {str(out)!r} is a file; name a new folder.")
    others = [path.name for path in out.iterdir() if path.name != PROGRESS] if out.is_dir() else []
    if others:
        raise MicroscaleError(
            f"--out {str(out)!r} holds {min(others)!r} already; name a new or empty folder."
        )
    if not out.resolve().parent.is_dir():
        raise MicroscaleError(
            f"--out {str(out)!r}: there is no folder {str(out.resolve().parent)!r}; make it first."
        )
