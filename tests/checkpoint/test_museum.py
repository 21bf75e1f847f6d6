"""Files that earlier versions wrote are read for ever, with the values that they had then."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from microscale.checkpoint.layouts.base import same_values
from microscale.checkpoint.native import load

MUSEUM = Path(__file__).parent / "museum"
FILES = sorted(MUSEUM.glob("version-?.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_was_written_is_read(path: Path) -> None:
    wanted = load_file(path.with_stem(f"{path.stem}-values"))
    found = load(path)
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        assert same_values(x, wanted[name]), name


def test_there_is_something_to_read() -> None:
    assert FILES
