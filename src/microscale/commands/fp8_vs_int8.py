"""`microscale fp8-vs-int8`: which format of 8 bits holds distributions and a model best."""

from pathlib import Path

from microscale.commands.outcome import Outcome
from microscale.report.accuracy import LEGEND, distributions
from microscale.report.contest import draw
from microscale.report.progress import bars
from microscale.report.table import WIDTH
from microscale.suite.accuracy import accuracies
from microscale.suite.contest import Contest
from microscale.suite.fp8_vs_int8 import fp8_vs_int8
from microscale.suite.registry import plan
from microscale.suite.setting import Setting


def run_fp8_vs_int8(
    model: str | None,
    *,
    text: Path | None,
    limit: int | None,
    batch_size: int | None,
    seed: int,
    device: str,
    dtype: str,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Show bits of accuracy for known distributions, and what formats do to a model if named.

    Everything is checked first; files are written whole, after all the work.
    """
    setting = Setting.parse(
        limit=limit, batch_size=batch_size, seed=seed, device=device, dtype=dtype
    )
    outcome = Outcome.checked(json_file, picture)
    plans = [] if model is None and text is None else plan(model, text, setting)
    terminal = outcome.terminal(WIDTH)
    found = accuracies()
    terminal.print(distributions(found))
    contest: Contest | None = None
    for one in plans:
        with bars(one.name) as report:
            report("loading", 0, None)
            subject = one.load()
            contest = fp8_vs_int8(
                subject.model,
                subject.task,
                name=subject.name,
                seed=setting.seed,
                progress=report,
            )
        terminal.print()
        terminal.print(contest)
    if contest is None:
        terminal.print(LEGEND)
    record = {
        "distributions": [one.to_dict() for one in found],
        "contest": None if contest is None else contest.to_dict(),
    }
    outcome.write(record, lambda: draw(found, contest), setting, terminal)
