"""Small models of other people: their loaders, and the accuracy that each README states."""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.suite import registry
from microscale.suite.compare import compare
from microscale.suite.entry import DATA_VARIABLE, Subject
from microscale.suite.measure import Measured, evaluating, measure_reference
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
from microscale.suite.models.checkpoint import expect
from microscale.suite.models.recurrent import lstm_state
from microscale.suite.pictures import FASHION, read_images
from microscale.suite.setting import Setting
from microscale.suite.statistics import mean
from microscale.suite.zoo import ZOO
from suite.tiny import batches

DATA = os.environ.get(DATA_VARIABLE)
needs_data = pytest.mark.skipif(DATA is None, reason=f"{DATA_VARIABLE} is not set")

LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    "ar2en_1layer": partial(bilstm.load, name="ar2en_1layer"),
    "gru_l": keyword_rnn.load_gru,
    "lstm_l": keyword_rnn.load_lstm,
    "resnet20": partial(resnet.load, depth=20),
    "resnet8": partial(resnet8.load, name="resnet8"),
    **{
        f"model/{module.__name__.rpartition('.')[2]}": module.load
        for module in (char_lstm, darknet, perceptron, pitch, ranking, speller, translator)
    },
}
"""Loaders by the name of their file (after the slash: of their module)."""


@pytest.mark.parametrize("name", LOADERS)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"{name.partition('/')[0]}.safetensors"
    with pytest.raises(MicroscaleError, match=r"safetensors' does not exist"):
        LOADERS[name](tmp_path)
    save_file({"stem.bias": torch.zeros(16), "foreign": torch.zeros(2)}, path)
    with pytest.raises(MicroscaleError, match=r"does not fit \w+: [\w.]+ is missing"):
        LOADERS[name](tmp_path)


def test_every_fault_of_a_tensor_is_said() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.int32), "d": torch.ones(1)}
    wanted: dict[str, tuple[int, ...]] = {"a": (3, 2), "b": (2,), "c": (1,)}
    with pytest.raises(MicroscaleError) as error:
        expect(tensors, wanted, Path("file"), "Model")
    for words in ("c is missing", "d has no place in Model", "a has shape (2, 3), not (3, 2)"):
        assert words in str(error.value)
    assert "(and 1 more)" in str(error.value)
    with pytest.raises(MicroscaleError, match=r"b is torch.int32, not a floating type"):
        expect({"b": tensors["b"]}, {"b": (2,)}, Path("file"), "Model")


def test_a_wrong_shape_is_said_in_the_words_of_the_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: torch.zeros(shape) for name, shape in char_lstm.SHAPES.items()}
    tensors["lstm.1.weight"] = torch.zeros(512, 255)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MicroscaleError, match=r"lstm\.1\.weight has shape \(512, 255\), not"):
        char_lstm.load(tmp_path)


def test_gates_are_brought_into_order() -> None:
    weight, bias = torch.randn(4 * 3, 2 + 3), torch.randn(4 * 3)
    layer = nn.LSTM(2, 3)
    layer.load_state_dict(lstm_state("l0", weight, bias, 2, "igfo"))
    x, h, c = torch.randn(5, 1, 2), torch.zeros(1, 3), torch.zeros(1, 3)
    with torch.no_grad():
        found, _ = layer(x)
        for step in range(5):
            i, g, f, o = (torch.cat([x[step], h], 1) @ weight.T + bias).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            torch.testing.assert_close(found[step], h)


def test_positions_begin_at_one() -> None:
    table = translator.positions(3)
    assert table.shape == (3, 32)
    assert float(table[0, 0]) == pytest.approx(math.sin(1))
    assert float(table[2, 31]) == pytest.approx(math.cos(3 / 10000), abs=1e-6)


def test_the_decoder_does_not_see_what_comes_later() -> None:
    model = translator.Translator().eval()
    source, target = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 7, 8, 9]])
    with torch.no_grad():
        full, part = model(source, target), model(source, target[:, :2])
    torch.testing.assert_close(full[:, :2], part)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"plain", "no gzipped IDX file"), (None, "needs data/fashion_mnist too")],
)
def test_pictures_that_are_none(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "images.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MicroscaleError, match=words):
        read_images(path)


def test_names_are_told_apart() -> None:
    assert len(registry.ENTRIES) == len({entry.name for entry in registry.ENTRIES.values()})
    assert {entry.name for entry in ZOO} <= set(registry.ENTRIES)
    with pytest.raises(MicroscaleError, match="Did you mean resnet20-cifar10"):
        registry.plan("resnet20-cifar", None, Setting.parse())


def load(name: str, limit: int | None = None) -> Subject:
    (plan,) = registry.plan(name, None, Setting.parse(limit=limit))
    return plan.load()


def measured(name: str, limit: int | None = None) -> Measured:
    subject = load(name, limit)
    with evaluating(subject.model, 0):
        return measure_reference(subject.model, subject.task, lambda _: None)[0]


ALL = 10**6


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(
    ("name", "metric", "units", "stated"),
    [
        ("arm-kws-ds-cnn-s", "accuracy", 4890, "88.88%"),
        ("arm-kws-ds-cnn-m", "accuracy", 4890, "90.08%"),
        ("arm-kws-lstm-l", "accuracy", 4890, "88.85%"),
        ("arm-kws-gru-l", "accuracy", 4890, "88.59%"),
        ("ar2en-bilstm-ctc", "character error rate", 1590, "22.37%"),
        ("ar2en-bilstm-ctc-1layer", "character error rate", 1590, "22.80%"),
        ("aren-transformer", "character error rate", 1590, "22.59%"),
        ("mnist-mlp", "accuracy", 50, "92.00%"),
    ],
)
def test_models_reach_what_they_state(name: str, metric: str, units: int, stated: str) -> None:
    found = measured(name, ALL)
    assert (found.metric, found.units) == (metric, units)
    assert f"{found.headline().value:.2%}" == stated


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(
    ("name", "stated"),
    [
        ("ar2en-bilstm-ctc", "77.80%"),
        ("ar2en-bilstm-ctc-1layer", "79.25%"),
        ("aren-transformer", "77.92%"),
        ("g2p-gru", "30.50%"),
    ],
)
def test_word_error_rates_are_as_stated(name: str, stated: str) -> None:
    assert f"{(measured(name, ALL).values > 0).double().mean():.2%}" == stated


@pytest.mark.data
@needs_data
def test_the_speller_reaches_the_error_rate_it_states() -> None:
    found = measured("g2p-gru", ALL)
    assert found.units == 4000
    # Stated: 9.73 %, over the length of the nearest pronunciation; here, of the first one.
    assert f"{found.headline().value:.2%}" == "9.72%"


@pytest.mark.data
@needs_data
def test_the_character_model_reaches_the_loss_it_states() -> None:
    found = measured("charrnn-bronte-lstm")
    assert (found.units, found.positions) == (64, 64 * 480)
    assert found.loss is not None
    assert f"{mean(found.loss, found.weight).value:.4f}" == "1.3712"


@pytest.mark.data
@needs_data
def test_the_pitch_detector_reaches_the_accuracy_it_states() -> None:
    found = measured("crepe-tiny-pitch", 2000)
    # Stated: 99.6 % of 2,000 other tones of the same kind.
    assert found.headline().value == pytest.approx(0.996, abs=0.004)


@pytest.mark.data
@needs_data
def test_residual_networks_agree_with_each_other() -> None:
    """Without CIFAR-10's pictures: four networks that read right say the same of strange ones."""
    answers = [_answers(f"resnet{depth}-cifar10", 200) for depth in (20, 32, 44, 56)]
    shares = [(a == b).double().mean() for a in answers for b in answers if a is not b]
    assert min(shares) > 0.3
    assert all(len(answer.unique()) > 3 for answer in answers)


def _answers(name: str, limit: int) -> Tensor:
    subject = load(name, limit)
    return torch.cat([p.logits.argmax(-1) for p in batches(subject.task, subject.model)])


@pytest.mark.data
@needs_data
def test_darknet_knows_two_photographs() -> None:
    """scikit-learn's photographs: a Chinese palace, a flower."""
    from sklearn.datasets import load_sample_images

    folder = Path(str(DATA)) / "models/tiny-darknet-imagenet"
    model = darknet.load(folder)
    names = (folder / "class_names.txt").read_text(encoding="utf-8").splitlines()
    for photograph, right in zip(load_sample_images().images, ("palace", "daisy"), strict=True):
        rgb = torch.tensor(photograph).permute(2, 0, 1).unsqueeze(0).float() / 255
        size = [round(224 * side / min(rgb.shape[2:])) for side in rgb.shape[2:]]
        rgb = nn.functional.interpolate(rgb, size, mode="bilinear", antialias=True)
        top, left = ((side - 224) // 2 for side in size)
        with torch.no_grad():
            best = model(rgb[:, :, top : top + 224, left : left + 224]).topk(5).indices[0]
        assert right in [names[index] for index in best.tolist()]


@pytest.mark.data
@needs_data
def test_fashion_pictures_are_there() -> None:
    assert read_images(Path(str(DATA)) / "data" / FASHION).shape == (10_000, 28, 28)


@pytest.mark.data
@needs_data
@pytest.mark.parametrize("name", [entry.name for entry in ZOO])
def test_every_product_of_a_model_is_quantized(name: str) -> None:
    subject = load(name, 4)
    comparison = compare(subject.model, subject.task, ["mxint8"], name=name)
    coverage = comparison.rows[1].coverage
    assert coverage is not None
    assert coverage.products
    assert {product.how for product in coverage.products} == {"emulated"}
    assert coverage.left == ()
    assert comparison.rows[1].figures.divergence is not None
