"""Tasks that need no files of other people: tones, clothes made here, digits, rankings."""

import gzip
import math
import struct
from pathlib import Path

import pytest
import torch

from microscale.errors import MicroscaleError
from microscale.suite import digits as digits_module
from microscale.suite.compare import compare
from microscale.suite.digits import Digits, train
from microscale.suite.models.digits import DigitCNN, DigitViT
from microscale.suite.models.pitch import BIN_CENTS, FIRST_CENTS, PitchNetwork, cents
from microscale.suite.models.ranking import CollaborativeFilter
from microscale.suite.models.resnet import ResNet
from microscale.suite.pictures import FASHION, fashion_task, read_images
from microscale.suite.recommendation import ranking_task
from microscale.suite.setting import Setting
from microscale.suite.tones import tone_task, tones
from suite.tiny import batches

SETTING = Setting.parse()


def write_images(path: Path, magic: int = 2051, count: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = bytes(range(count * 16))
    path.write_bytes(gzip.compress(struct.pack(">4I", magic, count, 4, 4) + pixels))
    return path


def test_pictures_are_read_row_by_row(tmp_path: Path) -> None:
    images = read_images(write_images(tmp_path / "images.gz"))
    assert images.shape == (3, 4, 4)
    assert images[1, 0].tolist() == [16, 17, 18, 19]


def test_labels_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(MicroscaleError, match="begins with 2049, not 2051"):
        read_images(write_images(tmp_path / "images.gz", magic=2049))


def test_clothes_give_agreement_without_a_loss(tmp_path: Path) -> None:
    write_images(tmp_path / FASHION)
    task = fashion_task(tmp_path, SETTING, 2, side=8, scale=lambda rgb: rgb - 0.5)
    comparison = compare(ResNet(1), task, ["mxint8", "mxfp4"])
    base, row = (comparison.rows[i].figures for i in (0, 1))
    assert (comparison.metric, comparison.units) == ("agreement", 2)
    assert base.metric.value == 1
    assert base.loss is None
    assert row.divergence is not None
    assert row.agreement is not None
    assert row.metric.value == row.agreement.value
    assert "no labels" in comparison.findings[0].detail


def test_the_same_seed_gives_the_same_pictures(tmp_path: Path) -> None:
    write_images(tmp_path / FASHION)

    def seen(seed: int, batch_size: int) -> torch.Tensor:
        setting = Setting.parse(seed=seed, batch_size=batch_size)
        task = fashion_task(tmp_path, setting, 3, side=4, scale=lambda rgb: 255 * rgb)
        return torch.cat([one.logits for one in batches(task, torch.nn.Flatten())])

    assert torch.equal(seen(0, 3), seen(0, 2))
    assert not torch.equal(seen(0, 3), seen(1, 3))
    assert seen(0, 3).min() >= 0
    assert 1 < seen(0, 3).max() <= 255


def test_a_pitch_is_read_from_its_bins() -> None:
    logits = torch.full((1, 360), -30.0)
    logits[0, 99:102] = torch.tensor([0.0, 2.0, 0.0])
    assert float(cents(logits)) == pytest.approx(FIRST_CENTS + 100 * BIN_CENTS, abs=1e-6)


def test_tones_have_the_pitch_they_state() -> None:
    frames, pitches = tones(40, 3)
    assert frames.shape == (40, 1024)
    assert 1200 * math.log2(6) <= float(pitches.min())
    assert float(pitches.max()) <= 1200 * math.log2(90)
    # The strongest line of the spectrum is a harmonic of the stated pitch.
    peaks = torch.fft.rfft(frames * torch.hann_window(1024)).abs().argmax(-1) * 16_000 / 1024
    ratio = peaks / (10 * 2 ** (pitches / 1200))
    assert float((ratio - ratio.round()).abs().median()) < 0.1


def test_tones_give_all_measures() -> None:
    comparison = compare(PitchNetwork(), tone_task(Setting.parse(limit=3), 400), ["mxint8"])
    assert (comparison.metric, comparison.units) == ("within 25 cents", 3)
    assert comparison.rows[0].figures.loss is not None
    assert "within 25 cents, %" in str(comparison)


def test_rankings_are_of_items_without_repetition() -> None:
    task = ranking_task(Setting.parse(limit=5), 1000)
    seen: list[torch.Tensor] = []
    model = CollaborativeFilter()
    model.register_forward_pre_hook(lambda _, args: seen.extend(args))
    assert compare(model, task, ["mxint8"]).units == 5
    users, items = seen[:2]
    assert users.shape == items.shape == (5, 100)
    assert all(len(row.unique()) == 100 for row in items)


@pytest.mark.parametrize("kind", [DigitCNN, DigitViT])
def test_digits_are_learned_from_a_seed(
    kind: type[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits_module, "EPOCHS", 3)
    digits = Digits.read()
    state = torch.random.get_rng_state()
    first, second = train(kind, digits, 1), train(kind, digits, 1)
    assert torch.equal(state, torch.random.get_rng_state())
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    comparison = compare(first, digits.task(SETTING), ["mxint8"])
    assert comparison.units == 500
    assert comparison.rows[0].figures.metric.value > 0.25
