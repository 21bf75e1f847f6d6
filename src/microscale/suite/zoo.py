"""Other people's small models, in the folder that MICROSCALE_DATA names, and the digits.

Each entry has the number of units that `compare` uses where no limit is given: enough to tell the
formats apart, few enough for a coffee.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from microscale.suite.characters import stream_task
from microscale.suite.digits import Digits, train
from microscale.suite.entry import Entry, Subject
from microscale.suite.models import (
    bilstm,
    char_lstm,
    darknet,
    keyword_rnn,
    perceptron,
    pitch,
    ranking,
    resnet,
    resnet8,
    speller,
    translator,
)
from microscale.suite.models.digits import DigitCNN, DigitViT
from microscale.suite.pictures import fashion_task, sample_digits_task
from microscale.suite.pronunciation import pronunciation_task
from microscale.suite.recommendation import ranking_task
from microscale.suite.setting import Setting
from microscale.suite.speech import clip_task, load_ds_cnn, load_kwt
from microscale.suite.task import Task
from microscale.suite.tones import tone_task
from microscale.suite.transliteration import ctc_task, translation_task

Load = Callable[[Path], nn.Module]
MakeTask = Callable[[Path, Setting], Task]


def entry(name: str, about: str, load: Load, task: MakeTask, source: str = "") -> Entry:
    """An entry that reads no text; its folder is called as the entry if `source` is empty."""
    return Entry(name, about, partial(_subject, name, load, task), source=source or name)


def _subject(
    name: str, load: Load, task: MakeTask, folder: Path, setting: Setting, text: Path | None
) -> Subject:
    assert text is None
    model = load(folder).to(device=setting.device, dtype=setting.dtype)
    return Subject(name, model, task(folder, setting))


def _digits(
    kind: type[nn.Module], name: str, _: Path, setting: Setting, text: Path | None
) -> Subject:
    assert text is None
    digits = Digits.read()
    model = train(kind, digits, setting.seed).to(device=setting.device, dtype=setting.dtype)
    return Subject(name, model, digits.task(setting))


def _keywords(name: str, about: str, load: Load, limit: int | None = 1200) -> Entry:
    return entry(name, about, load, partial(_clips, limit=limit), "arm-kws")


def _clips(folder: Path, setting: Setting, limit: int | None) -> Task:
    return clip_task(folder, setting, limit, "Speech Commands v2")


def _clothes(
    folder: Path, setting: Setting, *, limit: int, side: int, scale: Callable[[Tensor], Tensor]
) -> Task:
    data = folder.parents[1] / "data"
    return fashion_task(data, setting, limit, side=side, scale=scale)


def _normalised(rgb: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(v).reshape(3, 1, 1) for v in (resnet.MEAN, resnet.DEVIATION))
    return (rgb - mean) / deviation


def _bytes(rgb: Tensor) -> Tensor:
    return 255 * rgb


def _as_it_is(rgb: Tensor) -> Tensor:
    return rgb


def _all() -> Iterator[Entry]:
    yield entry(
        "kwt1-speech-commands", "keyword transformer", load_kwt, partial(_clips, limit=None)
    )
    yield _keywords("arm-kws", "keyword DS-CNN L", load_ds_cnn)
    for size in "sm":
        yield _keywords(
            f"arm-kws-ds-cnn-{size}",
            f"keyword DS-CNN {size.upper()}",
            partial(load_ds_cnn, name=f"ds_cnn_{size}"),
        )
    yield _keywords("arm-kws-lstm-l", "keyword LSTM", keyword_rnn.load_lstm)
    yield _keywords("arm-kws-gru-l", "keyword GRU", keyword_rnn.load_gru)
    yield entry(
        "charrnn-bronte-lstm",
        "character LSTM, novels",
        char_lstm.load,
        partial(stream_task, limit=64),
    )
    yield entry(
        "aren-transformer",
        "transformer, Arabic to English letters",
        translator.load,
        partial(translation_task, limit=400),
    )
    for name, checkpoint in (
        ("ar2en-bilstm-ctc", "ar2en_2layers"),
        ("ar2en-bilstm-ctc-1layer", "ar2en_1layer"),
    ):
        yield entry(
            name,
            "bidirectional LSTM with CTC, Arabic to English letters",
            partial(bilstm.load, name=checkpoint),
            partial(ctc_task, limit=400),
            "ar2en-bilstm-ctc",
        )
    yield entry(
        "g2p-gru",
        "GRU encoder-decoder, spelling to phonemes",
        speller.load,
        partial(pronunciation_task, limit=600),
    )
    yield entry(
        "crepe-tiny-pitch",
        "convolutional pitch detector",
        pitch.load,
        lambda _, setting: tone_task(setting, 400),
    )
    yield entry(
        "ncf-ml1m",
        "collaborative filtering",
        ranking.load,
        lambda _, setting: ranking_task(setting, 1000),
    )
    yield from _classifiers()


def _classifiers() -> Iterator[Entry]:
    colour = partial(_clothes, limit=300, side=32)
    for depth in (20, 32, 44, 56):
        yield entry(
            f"resnet{depth}-cifar10",
            f"ResNet-{depth}, CIFAR-10",
            partial(resnet.load, depth=depth),
            partial(colour, scale=_normalised),
            "resnet-cifar10",
        )
    for name, checkpoint in (
        ("mlperf-tiny-resnet8", "resnet8"),
        ("mlperf-tiny-resnet8-large", "resnet8_large"),
    ):
        yield entry(
            name,
            "ResNet-8, CIFAR-10",
            partial(resnet8.load, name=checkpoint),
            partial(colour, scale=_bytes),
            "mlperf-tiny-resnet8",
        )
    yield entry(
        "tiny-darknet-imagenet",
        "Tiny Darknet, ImageNet",
        darknet.load,
        partial(_clothes, limit=60, side=224, scale=_as_it_is),
    )
    yield entry("mnist-mlp", "perceptron, MNIST", perceptron.load, sample_digits_task)
    for name, kind in (("digits-vit", DigitViT), ("digits-cnn", DigitCNN)):
        about = "trained here on scikit-learn's digits"
        yield Entry(name, about, partial(_digits, kind, name))


ZOO = tuple(_all())
