"""`microscale inspect`: one format, layer by layer, as a table, JSON and a picture."""

from dataclasses import replace
from pathlib import Path

from microscale.commands.outcome import Outcome
from microscale.report.layers import draw
from microscale.report.progress import bars
from microscale.suite.compare import read_formats
from microscale.suite.inspect import inspect
from microscale.suite.layer import check_sort
from microscale.suite.registry import plan
from microscale.suite.setting import Setting

SAMPLES = 16
"""Samples that are used unless `--limit` says otherwise: they run once for every layer."""


def run_inspect(
    model: str,
    *,
    fmt: str,
    sort: str,
    text: Path | None,
    limit: int | None,
    batch_size: int | None,
    seed: int,
    device: str,
    dtype: str,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Inspect what the format `fmt` does to each layer of a model, sorted by `sort`.

    Everything is checked first; files are written whole, after all the work.
    """
    setting = Setting.parse(
        limit=limit, batch_size=batch_size, seed=seed, device=device, dtype=dtype
    )
    setting = replace(setting, limit=setting.limit or SAMPLES)
    read_formats([fmt])
    check_sort(sort)
    outcome = Outcome.checked(json_file, picture)
    (one,) = plan(model, text, setting)
    with bars(one.name) as report:
        report("loading", 0, None)
        subject = one.load()
        inspection = inspect(
            subject.model,
            subject.task,
            fmt,
            batches=None,
            name=subject.name,
            seed=setting.seed,
            progress=report,
        )
    terminal = outcome.terminal(inspection.width)
    terminal.print(inspection.report(sort))
    record = {"inspection": inspection.to_dict()}
    outcome.write(record, lambda: draw(inspection), setting, terminal)
