"""`microscale compare`: formats side by side on a model, as a table, JSON and a picture."""

from pathlib import Path

from rich.console import Console

from microscale.commands.outcome import Outcome
from microscale.errors import MicroscaleError
from microscale.report.progress import bars
from microscale.report.quality import draw
from microscale.report.table import WIDTH
from microscale.suite.compare import DEFAULT_FORMATS, compare, read_formats
from microscale.suite.comparison import Comparison
from microscale.suite.registry import Plan, plan
from microscale.suite.setting import Setting


def run_compare(
    model: str | None,
    *,
    formats: str | None,
    text: Path | None,
    limit: int | None,
    batch_size: int | None,
    seed: int,
    device: str,
    dtype: str,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Compare `formats` (separated by commas) on a model, or on the embedded ones if None.

    Everything is checked first; files are written whole, after all the work. With `json_file`
    "-" the JSON is all that stands on standard output, and the table goes to standard error.
    """
    setting = Setting.parse(
        limit=limit, batch_size=batch_size, seed=seed, device=device, dtype=dtype
    )
    names = DEFAULT_FORMATS if formats is None else split(formats)
    read_formats(names)
    outcome = Outcome.checked(json_file, picture)
    plans = plan(model, text, setting)
    terminal = outcome.terminal(WIDTH)
    comparisons = [_show(_compare(one, names, setting), terminal) for one in plans]
    record = {"comparisons": [comparison.to_dict() for comparison in comparisons]}
    outcome.write(record, lambda: draw(comparisons), setting, terminal)


def split(formats: str) -> tuple[str, ...]:
    """The names in a list separated by commas; MicroscaleError for an empty one."""
    names = tuple(name.strip() for name in formats.split(","))
    if not all(names):
        raise MicroscaleError(
            f"--formats {formats!r} has an empty name; separate names by single commas."
        )
    return names


def _compare(one: Plan, names: tuple[str, ...], setting: Setting) -> Comparison:
    with bars(one.name) as report:
        report("loading", 0, None)
        subject = one.load()
        return compare(
            subject.model,
            subject.task,
            names,
            name=subject.name,
            seed=setting.seed,
            progress=report,
        )


def _show(comparison: Comparison, terminal: Console) -> Comparison:
    terminal.print(comparison)
    terminal.print()
    return comparison
