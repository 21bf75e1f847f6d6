"""Words spelled in other symbols: distances, groups, decoding, and tasks on files made here."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.suite.characters import stream_task
from microscale.suite.compare import compare
from microscale.suite.models.bilstm import BidirectionalLSTM
from microscale.suite.models.char_lstm import CharacterLSTM
from microscale.suite.models.speller import Speller
from microscale.suite.models.translator import Translator
from microscale.suite.predictions import IGNORE
from microscale.suite.pronunciation import pronunciation_task
from microscale.suite.setting import Setting
from microscale.suite.spelling import (
    UNKNOWN,
    Word,
    by_length,
    edit_distance,
    marks,
    read_pairs,
    until,
)
from microscale.suite.transliteration import Codec, best_path, ctc_loss, ctc_task, translation_task
from suite.tiny import batches

SETTING = Setting.parse()


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "ab", 2),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("abc", "abc", 0),
    ],
)
def test_edit_distance(first: str, second: str, edits: int) -> None:
    codes = [[ord(letter) for letter in word] for word in (first, second)]
    assert edit_distance(*codes) == edits


def test_groups_need_no_padding_and_lose_nothing() -> None:
    words = [Word((1,) * n, ((2,) * (9 - n),)) for n in (1, 3, 2, 3, 3, 1)]
    groups = list(by_length(words, 2))
    assert [len(group[0].source) for group in groups] == [1, 2, 3, 3]
    assert sorted(len(word.source) for group in groups for word in group) == [1, 1, 2, 3, 3, 3]
    assert [len(group) for group in by_length(words, 9, of_target=True)] == [3, 1, 2]


def test_marks_take_the_nearest_target() -> None:
    words = [Word((1,), ((5, 6, 7, 8), (5, 9))), Word((1,), ((3, UNKNOWN),))]
    found = marks(words, [(5, 9, 9), (3, 4)])
    assert found.weight is not None
    assert found.weight.tolist() == [4, 2]
    assert found.values.tolist() == [1 / 4, 1 / 2]


def test_what_follows_the_end_is_cut() -> None:
    assert until([4, 5, 2, 6, 2], 2) == (4, 5)
    assert until([4, 5], 2) == (4, 5)


def test_the_best_of_each_stretch_is_spelled() -> None:
    scores = torch.full((8, 4), -5.0)
    for step, (found, score) in enumerate(
        [(0, 5.0), (1, 1.0), (2, 4.0), (1, 2.0), (0, 1.0), (3, 0.0), (3, 1.0), (0, 3.0)]
    ):
        scores[step, found] = score
    assert best_path(scores) == (2, 3)


def test_the_loss_of_ctc_leaves_unknown_letters_out() -> None:
    scores = torch.randn(1, 9, 40)
    with_unknown = ctc_loss(scores, [Word((1,), ((3, UNKNOWN, 4),))])
    without = ctc_loss(scores, [Word((1,), ((3, 4),))])
    assert float(with_unknown) == pytest.approx(float(without) * 2 / 3)


def test_letters_stand_apart_by_blanks() -> None:
    codec = Codec({97: 1}, {98: 2}, 3)
    steps = codec.steps(torch.tensor([[1, 0]]))
    assert steps.shape == (1, 11, 48)
    assert steps.sum() == 2
    assert steps[0, 3, 1] == 1
    assert steps[0, 7, 0] == 1


@pytest.mark.parametrize("line", ["alone", "\tb", "a\t"])
def test_lines_that_are_no_pairs(line: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text(f"a\tb\n{line}\n")
    with pytest.raises(MicroscaleError, match="line 2"):
        read_pairs(path)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """A folder with names and vocabularies, beside that of the codec."""
    folder = tmp_path / "aren-transformer"
    folder.mkdir()
    (folder / "ar2en-test.txt").write_text("ab\txyz\nba\tzy\nabb\tx\nbb\ty?\n")
    for side, letters in (("source", "ab"), ("target", "xyz")):
        text = "\n".join(["<blank>", "<s>", "</s>", *letters])
        (folder / f"{side}_vocabulary.txt").write_text(text)
    codec = tmp_path / "ar2en-bilstm-ctc"
    codec.mkdir()
    write_json(
        codec / "codec.json",
        {
            "input_codepoints": [0, ord("a"), ord("b")],
            "output_codepoints": [0, *map(ord, "xyz")],
            "blanks_between_characters": 3,
        },
    )
    return tmp_path


def test_transliteration_gives_all_measures(names: Path) -> None:
    for model, task in (
        (Translator(), translation_task(names / "aren-transformer", SETTING, 4)),
        (BidirectionalLSTM((8,)), ctc_task(names / "ar2en-bilstm-ctc", SETTING, 4)),
    ):
        comparison = compare(model, task, ["mxfp4"])
        figures = comparison.rows[1].figures
        assert (comparison.metric, comparison.units) == ("character error rate", 4)
        assert comparison.positions == 3 + 2 + 1 + 2
        assert figures.loss is not None
        assert figures.divergence is not None
        assert figures.agreement is not None
        assert "error rate, %" in str(comparison)


def test_a_codec_that_is_none(names: Path) -> None:
    (names / "ar2en-bilstm-ctc/codec.json").write_text("{}")
    with pytest.raises(MicroscaleError, match=r"codec\.json' is no codec .*input_codepoints"):
        ctc_task(names / "ar2en-bilstm-ctc", SETTING, 4)


def test_pronunciation_gives_all_measures(tmp_path: Path) -> None:
    write_json(tmp_path / "graphemes.json", ["<pad>", "<unk>", "</s>", "a", "b"])
    write_json(tmp_path / "phonemes.json", ["<pad>", "<unk>", "<s>", "</s>", "AA", "B"])
    (tmp_path / "cmudict_4000.tsv").write_text("ab\tAA B\nba\tB AA | B\nb\tB\n")
    comparison = compare(Speller(), pronunciation_task(tmp_path, SETTING, 9), ["mxint8"])
    figures = comparison.rows[0].figures
    assert (comparison.metric, comparison.units) == ("phoneme error rate", 3)
    assert figures.loss is not None
    (tmp_path / "cmudict_4000.tsv").write_text("ab\tAA ZZ\n")
    with pytest.raises(MicroscaleError, match="has the symbol 'ZZ'"):
        pronunciation_task(tmp_path, SETTING, 9)
    (tmp_path / "phonemes.json").write_text("none")
    with pytest.raises(MicroscaleError, match=r"phonemes\.json' is no list of symbols"):
        pronunciation_task(tmp_path, SETTING, 9)


def test_streams_follow_each_other(tmp_path: Path) -> None:
    write_json(tmp_path / "vocab.json", {"a": 0, "b": 1})
    (tmp_path / "bronte_excerpt.txt").write_text("ab" * 700)
    task = stream_task(tmp_path, SETTING, 64)
    seen: list[Tensor] = []
    model = CharacterLSTM()
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    (predictions,) = batches(task, model)
    assert task.units == 2
    assert seen[0].shape == (2, 512)
    assert predictions.targets is not None
    assert predictions.targets.shape == (2, 512)
    assert int((predictions.targets == IGNORE).sum()) == 2 * 32
    (tmp_path / "bronte_excerpt.txt").write_text("abc" * 700)
    with pytest.raises(MicroscaleError, match=r"characters that vocab\.json lacks: 'c'"):
        stream_task(tmp_path, SETTING, 64)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(MicroscaleError, match="does not map characters to numbers"):
        stream_task(tmp_path, SETTING, 64)
