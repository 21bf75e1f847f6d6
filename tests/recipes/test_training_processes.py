"""Training in several processes (FSDP2, gloo) against one: the same command, the same numbers."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from microscale.errors import MicroscaleError
from microscale.recipes import TrainConfig, train
from microscale.recipes.training.gpt import SIZES, Size
from microscale.recipes.training.train import read_model
from microscale.recipes.training.world import World

SMALL = Size(2, 32, 1, 3e-3)
pytestmark = pytest.mark.slow
DRIVER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from microscale.errors import MicroscaleError
from microscale.recipes import TrainConfig, train
from microscale.recipes.training.gpt import SIZES, Size
SIZES["0.5M"] = Size(2, 32, 1, 3e-3)
torch.distributed.init_process_group("gloo")
folder = Path(sys.argv[1])
base = TrainConfig.read(folder / "config.toml")
train(replace(base, out=folder / "plain2"))
train(replace(base, out=folder / "narrow2", policy="mxfp6_e3m2"))
train(replace(base, out=folder / "alone", steps=8))
try:
    train(replace(base, out=folder / "uneven", batch=3))
except MicroscaleError as error:
    print("refused:", error)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, and before them one that did four steps."""
    found = tmp_path_factory.mktemp("processes")
    words = [f"word{i}" for i in range(20)]
    (found / "text.txt").write_text(" ".join(random.Random(0).choices(words, k=2000)))
    (found / "config.toml").write_text(
        'text = "text.txt"\nout = "run"\nsteps = 6\nbatch = 4\ncontext = 32\nwarm_up = 2\n'
        "save_every = 4\nevaluate_every = 3\nevaluate_windows = 5\nsample_tokens = 2\n"
    )
    SIZES["0.5M"], usual = SMALL, SIZES["0.5M"]
    try:
        train(replace(read(found), out=found / "alone", steps=4))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-"]
        (found / "driver.py").write_text(DRIVER)
        command[-1:] = [str(found / "driver.py"), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        (found / "printed").write_text(done.stdout)
    finally:
        SIZES["0.5M"] = usual
    return found


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "0.5M", SMALL)


def read(folder: Path) -> TrainConfig:
    return TrainConfig.read(folder / "config.toml")


def table(folder: Path) -> list[list[float]]:
    lines = (folder / "losses.csv").read_text().splitlines()[1:]
    return [[float(cell or "nan") for cell in line.split(",")] for line in lines]


@pytest.mark.parametrize(
    ("name", "further"),
    [("plain", {}), ("narrow", {"policy": "mxfp6_e3m2", "accumulate": 2})],
)
def test_two_processes_train_as_one(folder: Path, name: str, further: dict[str, Any]) -> None:
    """Quantized, one process takes the rows of each in turn: no block has tokens of two."""
    train(replace(read(folder), out=folder / f"{name}1", **further))
    one, two = table(folder / f"{name}1"), table(folder / f"{name}2")
    torch.testing.assert_close(
        torch.tensor(two), torch.tensor(one), rtol=2e-5, atol=2e-5, equal_nan=True
    )
    models = [read_model(folder / f"{name}{n}")[0] for n in (1, 2)]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_a_checkpoint_of_one_process_goes_on_in_two(folder: Path) -> None:
    train(replace(read(folder), out=folder / "eight", steps=4))
    train(replace(read(folder), out=folder / "eight", steps=8))
    one, two = table(folder / "eight"), table(folder / "alone")
    assert len(two) == 8
    torch.testing.assert_close(
        torch.tensor(two), torch.tensor(one), rtol=2e-5, atol=2e-5, equal_nan=True
    )


def test_a_checkpoint_of_two_processes_goes_on_in_one(folder: Path) -> None:
    said: list[str] = []
    config = replace(read(folder), out=folder / "plain2", steps=8)
    assert train(config, say=said.append).resumed == 6
    assert any("written by 2 processes" in line for line in said)
    straight = replace(read(folder), out=folder / "straight")
    train(straight)
    train(replace(straight, steps=8))
    one, two = table(folder / "straight"), table(folder / "plain2")
    torch.testing.assert_close(
        torch.tensor(two), torch.tensor(one), rtol=2e-5, atol=2e-5, equal_nan=True
    )


def test_a_batch_that_cannot_be_shared_is_refused(folder: Path) -> None:
    assert "batch = 3 cannot be shared by 2 processes" in (folder / "printed").read_text()
    assert not (folder / "uneven").exists()


def test_shares_are_the_whole_batch() -> None:
    for size, parts in ((1, 1), (2, 1), (2, 2), (4, 3)):
        shares = [World(r, size, torch.device("cpu")).share(24, parts) for r in range(size)]
        rows = [i for share in shares for part in share for i in range(24)[part]]
        assert rows == list(range(24))
    with pytest.raises(MicroscaleError, match="multiple of 6"):
        World(0, 2, torch.device("cpu")).share(8, 3)
