"""Direct cast against finetuned, small models, two seeds: one row a run, appended to a CSV.

    MICROSCALE_DATA=... python runs/finetune_table.py [--models digits-cnn,...] [FILE]

Rows that are in the file already are not run again, so a run that was stopped goes on. One setting
for all (120 batches of 32, learning rate 3e-4, chosen beforehand and not tuned), data as
`microscale finetune` splits them; the last state of training is taken.
"""

import argparse
import copy
import csv
import time
from pathlib import Path

from microscale.policy import Policy
from microscale.recipes.finetune import Plan, finetune
from microscale.suite.lessons import read_lesson
from microscale.suite.setting import Setting
from microscale.suite.trained import CAST, FINETUNED, WIDE, report_on

MODELS = "digits-cnn,digits-vit,arm-kws-ds-cnn-s,kwt1-speech-commands"
FORMATS = ("fp32", "mxfp6_e2m3", "mxfp4")
SEEDS = (0, 1)
STEPS, LR = 120, 3e-4
HEAD = ("model", "format", "seed", "metric", "which", "value", "error", "units", "loss", "seconds")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=Path("runs/finetune.csv"))
    parser.add_argument("--models", default=MODELS)
    given = parser.parse_args()
    done = set()
    if given.file.is_file():
        with given.file.open(encoding="utf-8", newline="") as file:
            done = {(row["model"], row["format"], row["seed"]) for row in csv.DictReader(file)}
    else:
        given.file.write_text(",".join(HEAD) + "\n", encoding="utf-8")
    for model in given.models.split(","):
        for seed in SEEDS:
            for fmt in FORMATS:
                if (model, fmt, str(seed)) not in done:
                    _run(model, fmt, seed, given.file)


def _run(model: str, fmt: str, seed: int, path: Path) -> None:
    start = time.perf_counter()
    lesson = read_lesson(model, None, None, Setting.parse(seed=seed))
    original, policy = copy.deepcopy(lesson.model), Policy.parse(fmt)
    finetune(lesson.model, policy, lesson.train, plan=Plan(steps=STEPS, lr=LR, seed=seed))
    report = report_on(original, lesson.model, policy, lesson.task, seed)
    seconds = time.perf_counter() - start
    rows = []
    for which in (WIDE, CAST, FINETUNED):
        figures = report.figures[which]
        metric, loss = figures.metric, figures.loss
        values = f"{metric.value:.5f}", f"{metric.error:.5f}", metric.units
        shown = "" if loss is None else f"{loss.value:.5f}"
        rows.append((model, fmt, seed, report.metric, which, *values, shown, f"{seconds:.0f}"))
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    for row in rows:
        print(*row, flush=True)


if __name__ == "__main__":
    main()
