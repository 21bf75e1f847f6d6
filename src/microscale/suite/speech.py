"""Keyword spotting on stored features: which of 12 words a clip holds."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.suite.models.checkpoint import fit, named, read_tensors
from microscale.suite.models.ds_cnn import DSCNN, Shape
from microscale.suite.models.kwt import KeywordTransformer
from microscale.suite.predictions import Predictions
from microscale.suite.sampling import sample
from microscale.suite.setting import Setting
from microscale.suite.task import Task

BATCH = 64


def load_kwt(folder: Path) -> nn.Module:
    """KWT-1 with the weights of `folder` (kwt1-speech-commands)."""
    path = folder / "model.safetensors"
    model = KeywordTransformer()
    fit(model, read_tensors(path), path)
    return model.eval()


def load_ds_cnn(folder: Path, name: str = "ds_cnn_l") -> nn.Module:
    """DS-CNN S, M or L with the weights and strides of `folder` (arm-kws)."""
    path = folder / f"{name}.safetensors"
    tensors = read_tensors(path)
    model = DSCNN(_shape(folder / "config.json", name, tensors))
    fit(model, tensors, path)
    return model.eval()


def clip_task(folder: Path, setting: Setting, limit: int | None, about: str) -> Task:
    """Classify the clips whose features lie in `folder`; `limit` where the setting names none."""
    features, labels = load_clips(folder)
    chosen = sample(range(len(labels)), setting.limit or limit, setting.seed)
    told = f"{about}: {len(chosen)} of {len(labels)} clips"
    return score_clips(features[chosen], labels[chosen], setting, told)


def load_clips(folder: Path) -> tuple[Tensor, Tensor]:
    """Features [clips, ...] and labels [clips] of the clips in `folder`."""
    path = folder / "eval_features.safetensors"
    features, labels = named(read_tensors(path), ("features", "labels"), path)
    return features, labels.long()


def score_clips(features: Tensor, labels: Tensor, setting: Setting, about: str) -> Task:
    """Classify these clips."""
    return Task(
        evaluate=partial(_classify, features, labels, setting),
        metric="accuracy",
        unit="clip",
        units=len(labels),
        about=about,
    )


def _classify(
    features: Tensor, labels: Tensor, setting: Setting, model: nn.Module
) -> Iterator[Predictions]:
    size = setting.batch_size or BATCH
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        batch = features[rows].to(device=setting.device, dtype=setting.dtype)
        yield Predictions(model(batch), labels[rows].to(setting.device))


def _shape(path: Path, name: str, tensors: dict[str, Tensor]) -> Shape:
    try:
        config = json.loads(path.read_bytes())[name]
        return Shape(
            channels=tensors["conv_1.weight"].shape[0],
            blocks=int(config["blocks"]),
            strides={layer: (int(t), int(f)) for layer, (t, f) in config["strides"].items()},
            epsilon=float(config["bn_eps"]),
        )
    except (OSError, ValueError, KeyError) as error:
        raise MicroscaleError(
            f"{name}: its strides are read from {str(path)!r} and its width from conv_1.weight, "
            f"and {error!r} was met; fetch the folder again."
        ) from error
