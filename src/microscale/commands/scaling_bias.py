"""`microscale scaling-bias`: constant scaling biases of FP8 that hold a model's score."""

from pathlib import Path

from microscale.commands.outcome import Outcome
from microscale.report.progress import bars
from microscale.report.scaling_bias import draw, table
from microscale.report.table import WIDTH
from microscale.suite.registry import plan
from microscale.suite.scaling_bias import check_element, scaling_bias
from microscale.suite.setting import Setting


def run_scaling_bias(
    model: str,
    *,
    element: str,
    text: Path | None,
    limit: int | None,
    batch_size: int | None,
    seed: int,
    device: str,
    dtype: str,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Try constants on a model, and show which keep its score.

    Everything is checked first; files are written whole, after all the work.
    """
    setting = Setting.parse(
        limit=limit, batch_size=batch_size, seed=seed, device=device, dtype=dtype
    )
    check_element(element)
    outcome = Outcome.checked(json_file, picture)
    (one,) = plan(model, text, setting)
    with bars(one.name) as report:
        report("loading", 0, None)
        subject = one.load()
        sweep = scaling_bias(
            subject.model,
            subject.task,
            element=element,
            name=subject.name,
            seed=setting.seed,
            progress=report,
        )
    terminal = outcome.terminal(WIDTH)
    terminal.print(table(sweep))
    outcome.write({"sweep": sweep.to_dict()}, lambda: draw(sweep), setting, terminal)
