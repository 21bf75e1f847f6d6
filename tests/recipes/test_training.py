"""Training from scratch: the rule of steps, tokens, settings, resuming after kills, refusals."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from microscale.cli import app
from microscale.errors import MicroscaleError
from microscale.policy import Policy
from microscale.profiles import policy_files
from microscale.recipes import TrainConfig, train
from microscale.recipes.training.gpt import GPT, SIZES, Block, Size, loss
from microscale.recipes.training.kaplan import reckon
from microscale.recipes.training.policies import training_policy
from microscale.recipes.training.tokens import Source, prepare
from microscale.recipes.training.train import read_model

SMALL = Size(2, 32, 1, 3e-3)
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "sees",
    "geese",
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "0.5M", SMALL)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    chosen = random.Random(0).choices(WORDS, k=3000)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(chosen))
    return path


def settings(text: Path, out: str = "run", **further: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 6, "batch": 4, "context": 32, "warm_up": 2, "save_every": 2, "evaluate_every": 3,
        "evaluate_windows": 5, "sample_tokens": 0,
    }  # fmt: skip
    return TrainConfig(text=text, out=text.with_name(out), **(usual | further))


# ---------------------------------------------------------------- model and rule


@pytest.mark.parametrize("vocabulary", [257, 1024])
def test_counts_of_parameters(vocabulary: int) -> None:
    for size in (SMALL, Size(4, 96, 3, 1e-3), Size(6, 384, 6, 1e-3)):
        model = GPT(size, vocabulary, 64)
        assert sum(p.numel() for p in model.parameters()) == size.parameters(vocabulary, 64)
        blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
        assert blocks == size.block_parameters()


def test_sizes_have_the_parameters_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    units = {"M": 1e6, "B": 1e9}
    for name, size in SIZES.items():
        named = float(name[:-1]) * units[name[-1]]
        assert abs(size.block_parameters() / named - 1) < 0.12, name
        assert size.width % size.heads == 0


@pytest.mark.parametrize(
    ("parameters", "least", "critical"),
    [(20e6, 9349, 5.17e5), (150e6, 11467, 1.08e6), (300e6, 12301, 1.40e6), (1.5e9, 14480, 2.52e6)],
)
def test_steps_by_kaplan(parameters: float, least: int, critical: float) -> None:
    """The figures were worked out apart from this program."""
    found = reckon(int(parameters), int(critical))
    assert round(found.least_steps) == least
    assert found.critical_batch == pytest.approx(critical, rel=0.01)
    assert found.steps == pytest.approx(2 * least, rel=0.01)
    assert str(found.least_steps.__round__())[:2] in str(found).replace(",", "")


def test_blocks_see_nothing_ahead() -> None:
    block, x = Block(SMALL), torch.randn(1, 8, 32)
    y = x.clone()
    y[0, 5:] = 0
    assert torch.equal(block(x)[0, :5], block(y)[0, :5])


def test_recomputing_blocks_changes_no_gradient() -> None:
    windows = torch.randint(50, (2, 17))
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = GPT(SMALL, 50, 16, checkpointing=checkpointing)
        loss(model, windows).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


# ---------------------------------------------------------------- tokens


def source(text: Path, **further: Any) -> Source:
    usual: dict[str, Any] = {"validation": None, "held_out": 0.1, "tokenizer": "bytes"}
    return Source(text, **(usual | {"vocabulary": 300} | further))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_tokens_are_the_text(text: Path, tmp_path: Path, tokenizer: str) -> None:
    data = prepare(tmp_path / tokenizer, source(text, tokenizer=tokenizer), 32)
    tokens = [x for part in (data.train, data.valid) for x in part.tolist()]
    end = data.tokenizer.end
    assert tokens.count(end) == 2
    assert data.tokenizer.decode([t for t in tokens if t != end]) == text.read_text()
    again = prepare(tmp_path / tokenizer, source(text, tokenizer=tokenizer), 32)
    assert again.record == data.record


def test_every_window_once_in_an_epoch(text: Path, tmp_path: Path) -> None:
    data = prepare(tmp_path / "data", source(text), 32)
    windows = (len(data.train) - 33) // 32
    batches = [data.batch(step, slice(None), (1, 32), 5) for step in range(2 * windows)]
    for epoch in (batches[:windows], batches[windows:]):
        firsts = {tuple(batch[0, :32].tolist()) for batch in epoch}
        assert len(firsts) == windows
    whole = data.batch(7, slice(None), (4, 32), 5)
    halves = [data.batch(7, slice(i, i + 2), (4, 32), 5) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(halves))
    joined = data.train.astype(np.int64).tolist()
    row = whole[0].tolist()
    assert any(joined[i : i + 33] == row for i in range(len(joined)))


def test_folders_and_packed_texts(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a").mkdir()
    (tmp_path / "a/one.txt").write_text("one " * 100)
    (tmp_path / "a/two.txt.gz").write_bytes(gzip.compress(b"two " * 100))
    data = prepare(tmp_path / "data", source(tmp_path / "a"), 16)
    assert len(data.train) + len(data.valid) == 800 + 4


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a few words")
    with pytest.raises(MicroscaleError, match="too few for windows of 32"):
        prepare(tmp_path / "data", source(path), 32)
    with pytest.raises(MicroscaleError, match="no such file or folder"):
        prepare(tmp_path / "data", source(tmp_path / "none"), 32)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(MicroscaleError, match="cannot be read"):
        prepare(tmp_path / "data", source(tmp_path / "bad.txt"), 32)


# ---------------------------------------------------------------- resuming

DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from microscale.recipes import TrainConfig, train
from microscale.recipes.training.gpt import SIZES, Size
SIZES["0.5M"] = Size(2, 32, 1, 3e-3)
base = TrainConfig.read(Path(sys.argv[1]))
chance = random.Random(int(sys.argv[2]))
seconds, kills = None, 0
from dataclasses import replace
def run(out):
    child = os.fork()
    if child == 0:
        train(replace(base, out=Path(out)))
        os._exit(0)
    return child
for place in ("whole", "killed"):
    while True:
        begin = time.monotonic()
        child = run(sys.argv[3] + "/" + place)
        if place == "killed" and kills < 3:
            time.sleep(chance.uniform(0.05, 0.6) * seconds)
            os.kill(child, signal.SIGKILL)
            kills += 1
        _, status = os.waitpid(child, 0)
        if status == 0:
            seconds = time.monotonic() - begin
            break
        assert os.WIFSIGNALED(status), status
print(kills)
"""


def test_killed_at_any_moment_the_result_is_the_same(text: Path, tmp_path: Path) -> None:
    """Stochastic rounding of every operand; up to three kills at any moment."""
    config = tmp_path / "config.toml"
    policy = tmp_path / "policy.toml"
    policy.write_text(stochastic().to_toml())
    config.write_text(
        f'text = "{text.name}"\nout = "unused"\npolicy = "policy.toml"\nsteps = 16\nbatch = 4\n'
        "context = 32\nsave_every = 2\nevaluate_every = 5\nevaluate_windows = 4\n"
        "sample_tokens = 3\nsample_every = 7\nwarm_up = 4\naccumulate = 2\n"
    )
    command = [sys.executable, "-c", DRIVER, str(config), "2", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) >= 1
    for name in ("model.safetensors", "losses.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert len((tmp_path / "killed/losses.csv").read_text().splitlines()) == 1 + 16


def stochastic() -> Policy:
    """Stochastic rounding of all six operands."""
    operand = {"format": "mxfp4", "rounding": "stochastic"}
    return Policy.of(operand, operand, operand)


@pytest.mark.parametrize("policy", ["mxfp4", "stochastic.toml"])
def test_a_run_goes_on_bit_for_bit(text: Path, policy: str) -> None:
    """The same in one process, from a checkpoint that was written after an evaluation."""
    if policy.endswith(".toml"):
        policy = str(text.with_name(policy))
        Path(policy).write_text(stochastic().to_toml())
    train(settings(text, "whole", policy=policy, evaluate_every=2))
    part = settings(text, "part", policy=policy, evaluate_every=2)
    stopped = Stopping(4)
    with pytest.raises(KeyboardInterrupt):
        train(part, stopped)
    train(part)
    a, b = (text.with_name(n) / "model.safetensors" for n in ("whole", "part"))
    assert a.read_bytes() == b.read_bytes()
    assert train(part).resumed == 6  # done: nothing is trained, all is written again
    assert a.read_bytes() == b.read_bytes()
    assert len(list((part.out / "checkpoints").iterdir())) == 2


class Stopping:
    """Interrupt a run after that many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, label: str, done: int, total: int | None) -> None:  # noqa: ARG002
        """Count."""
        if label.startswith("loss") and done == self.after:
            raise KeyboardInterrupt


def test_what_a_run_leaves(text: Path) -> None:
    trained = train(settings(text, sample_tokens=8))
    model, tokenizer = read_model(text.with_name("run"))
    assert [step for step, _ in trained.losses] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in trained.validation] == [3, 6]
    assert trained.losses[-1][1] < trained.losses[0][1]
    data = prepare(text.with_name("run") / "data", settings(text).source(), 32)
    with torch.no_grad():
        value = loss(model.eval(), data.windows(32, 5)).item()
    assert value == pytest.approx(trained.validation[-1][1], abs=1e-5)
    assert "--- step 6" in (text.with_name("run") / "samples.txt").read_text()
    assert tokenizer.size == 257
    json.dumps(trained.to_dict(), allow_nan=False)
    assert "nats a token" in str(trained)


def test_parts_of_a_batch_give_the_same_weights_to_rounding(text: Path) -> None:
    found = []
    for parts in (1, 2):
        train(settings(text, f"of{parts}", accumulate=parts))
        found.append(read_model(text.with_name(f"of{parts}"))[0])
    for a, b in zip(*(m.parameters() for m in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_bfloat16_and_recomputed_blocks(text: Path) -> None:
    config = settings(text, policy="mxfp6_e3m2", dtype="bfloat16", checkpointing=True, steps=3)
    assert train(config).losses[-1][1] < 6


def test_tensorboard(text: Path) -> None:
    pytest.importorskip("tensorboard")
    train(settings(text, tensorboard=True))
    assert list((text.with_name("run") / "tensorboard").glob("events*"))


# ---------------------------------------------------------------- policies


def test_named_policies() -> None:
    assert set(policy_files()) >= {"mxfp8", "nvfp4", "mxfp4"}
    for name, path in policy_files().items():
        policy = Policy.named(name)
        assert policy == Policy.read(path)
        assert Policy.from_toml(policy.to_toml()) == policy
    with pytest.raises(MicroscaleError, match="says all formats itself"):
        Policy.named("mxfp8", "mxfp4")


@pytest.mark.parametrize(
    ("spelling", "operands"),
    [
        ("mxfp6_e3m2", ("mxfp6_e3m2",) * 3),
        ("mxfp4/mxfp6_e3m2", ("mxfp4", "mxfp6_e3m2", "mxfp6_e3m2")),
        ("mxfp4/mxfp6_e2m3/mxfp8_e5m2", ("mxfp4", "mxfp6_e2m3", "mxfp8_e5m2")),
        ("mxfp4/mxfp6_e2m3/fp32", ("mxfp4", "mxfp6_e2m3", None)),
        ("fp32", (None, None, None)),
    ],
)
def test_spellings(spelling: str, operands: tuple[str | None, ...]) -> None:
    p = training_policy(spelling)
    weight, activation, grad = operands
    found = (p.forward.weight, p.forward.input, p.dgrad.grad, p.wgrad.grad)
    assert [x and str(x.format) for x in found] == [weight, activation, grad, grad]
    both = (p.dgrad.weight, p.wgrad.input) if grad else (p.forward.weight, p.forward.input)
    assert [x and str(x.format) for x in both] == [weight, activation]
    assert Policy.parse(str(p)) == p


@pytest.mark.parametrize("policy", ["mxfp8", "nvfp4", "mxfp4", "paper:mxfp6_e2m3"])
def test_policies_train(text: Path, policy: str) -> None:
    plain = train(settings(text, "plain")).losses[-1][1]
    assert abs(train(settings(text, policy=policy)).losses[-1][1] - plain) < 0.2


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("stepz = 4", "unknown key 'stepz'. Did you mean steps"),
        ('size = "7B"', "size = '7B' is not known"),
        ("batch = 0", "must be above 0"),
        ('batch = "4"', "is not a int"),
        ("batch = 5\naccumulate = 2", "cannot be cut"),
        ('steps = "many"', 'a number or "auto"'),
        ('policy = "mxfp99"', "not known"),
        ('policy = "none.toml"', "cannot be read"),
        ("held_out = 1", "not between 0 and 1"),
        ("text = 3", "write a path"),
        ("batch = = 3", "cannot be read"),
        ('ignore = "head"', "not a list of names"),
    ],
)
def test_settings_that_are_refused(text: Path, line: str, words: str) -> None:
    path = text.with_name("config.toml")
    path.write_text(f'out = "run"\n{line}\n' + ("" if "text" in line else 'text = "text.txt"\n'))
    with pytest.raises(MicroscaleError) as caught:
        TrainConfig.read(path)
    assert words in str(caught.value)
    assert "config.toml" in str(caught.value)
    assert not text.with_name("run").exists()


def test_a_missing_setting(text: Path) -> None:
    with pytest.raises(MicroscaleError, match="no 'out'"):
        TrainConfig.from_dict({"text": str(text)})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def foreign(out: Path) -> None:
    path = out / "checkpoints/step-00000009"
    path.mkdir()
    (path / "commit.json").write_text('{"kind": "something else"}')


def no_record(out: Path) -> None:
    (out / "checkpoints/step-00000004/commit.json").unlink()


def flipped(out: Path) -> None:
    path = next((out / "checkpoints/step-00000004").glob("*.distcp"))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def text_changed(out: Path) -> None:
    path = out.with_name("text.txt")
    path.write_text(path.read_text() + " more")


def tokens_changed(out: Path) -> None:
    path = out / "data/train.bin"
    path.write_bytes(path.read_bytes()[:-2])


def record_damaged(out: Path) -> None:
    (out / "data/data.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (foreign, "none of this program's"),
        (no_record, "delete it to go on from"),
        (flipped, "other bytes than were written"),
        (text_changed, "has changed since its tokens"),
        (tokens_changed, "is missing or has changed"),
        (record_damaged, "is damaged"),
    ],
)
def test_a_damaged_run_is_refused_and_left_alone(
    text: Path, damage: Callable[[Path], None], words: str
) -> None:
    train(settings(text, steps=4))
    out = text.with_name("run")
    damage(out)
    before = snapshot(out)
    with pytest.raises(MicroscaleError, match=words):
        train(settings(text, steps=8))
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "mxfp4"}, "config policy = 'mxfp4'"),
        ({"batch": 8}, "config batch = 8"),
        ({"tokenizer": "bpe", "vocabulary": 300}, "another tokenizer"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    text: Path, change: dict[str, Any], words: str
) -> None:
    config = settings(text, steps=4)
    train(config)
    before = snapshot(config.out)
    with pytest.raises(MicroscaleError, match=words):
        train(replace(config, **change))
    assert snapshot(config.out) == before


def test_an_edited_policy_file_is_another_policy(text: Path) -> None:
    path = text.with_name("policy.toml")
    path.write_text(Policy.parse("mxfp8").to_toml())
    config = settings(text, steps=2, policy=str(path))
    train(config)
    path.write_text(Policy.parse("mxfp4").to_toml())
    with pytest.raises(MicroscaleError, match="has changed since checkpoint"):
        train(config)


def test_a_loss_that_is_not_finite_stops_with_its_place(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microscale.recipes.training import train as module

    class Overflowing(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Overflow in the perceptron once the run is at step 5."""
            grown = x * (1e38 if run["step"] == 5 else 1)
            return super().forward(grown * (1e38 if run["step"] == 5 else 1))

    run = {"step": 0}
    config = settings(text)
    usual = module._Run._one_step

    def counted(self: Any) -> Any:
        run["step"] = self.step + 1
        return usual(self)

    monkeypatch.setattr(module._Run, "_one_step", counted)
    monkeypatch.setattr("microscale.recipes.training.gpt.Block", Overflowing)
    with pytest.raises(MicroscaleError) as caught:
        train(config)
    message = str(caught.value)
    assert "step 5: the loss is nan" in message
    assert "of 'blocks.0" in message
    assert "step-00000004" in message


def test_a_gradient_that_is_not_finite_is_named(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microscale.recipes.training import train as module

    class Broken(GPT):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.blocks[1].get_parameter("up.weight").register_hook(lambda g: g * torch.inf)

    monkeypatch.setattr(module, "GPT", Broken)
    with pytest.raises(
        MicroscaleError, match=r"gradient of 'blocks\.1\.up\.weight'.*no checkpoint"
    ):
        train(settings(text))


# ---------------------------------------------------------------- the command


def test_the_command(text: Path) -> None:
    config = text.with_name("config.toml")
    config.write_text(
        'text = "text.txt"\nout = "run"\nbatch = 4\ncontext = 32\nwarm_up = 2\nsample_tokens = 0\n'
    )
    picture, record = text.with_name("curve.png"), text.with_name("run.json")
    arguments = ["train", "--config", str(config), "--steps", "3", "--policy", "mxfp6_e3m2"]
    arguments += ["--picture", str(picture), "--json", str(record)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "validation loss" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(record.read_text())["losses"]) == 3
    result = CliRunner().invoke(app, [*arguments[:3], "--steps", "few"])
    assert result.exit_code == 2
    assert "must be a number" in result.output


def test_auto_prints_the_reckoning(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from microscale.commands import train as command

    def stopped(*_: object) -> None:
        raise MicroscaleError("far enough")

    monkeypatch.setattr(command, "train", stopped)
    config = text.with_name("config.toml")
    config.write_text('text = "text.txt"\nout = "run"\n')
    result = CliRunner().invoke(app, ["train", "--config", str(config), "--steps", "auto"])
    assert "Bcrit" in result.output
    assert "far enough" in result.output


# ---------------------------------------------------------------- what the casts lose


def test_the_monitor_sees_every_operand_and_changes_nothing(text: Path) -> None:
    policy = "mxfp4/mxfp6_e2m3/mxfp8_e5m2"
    train(settings(text, "plain", policy=policy))
    trained = train(settings(text, "seen", policy=policy, monitor_every=3))
    files = [text.with_name(n) / "model.safetensors" for n in ("plain", "seen")]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = {(r["step"], r["module"], r["operand"]): r for r in trained.monitored}
    assert {step for step, _, _ in rows} == {1, 4}
    for module in ("blocks.0.up", "blocks.1.query_key_value", "head"):
        for operand, fmt in (
            ("input", "mxfp6_e2m3"),
            ("weight", "mxfp4"),
            ("linear dgrad grad", "mxfp8_e5m2"),
            ("linear dgrad weight", "mxfp4"),
            ("linear wgrad input", "mxfp6_e2m3"),
            ("linear wgrad grad", "mxfp8_e5m2"),
        ):
            row = rows[4, module, operand]
            assert row["format"] == fmt
            assert 5 < row["sqnr"] < 60
    for factor in ("query", "key", "probabilities", "value", "scores dgrad grad"):
        assert (1, "blocks.0", factor) in rows
    gradient = rows[4, "blocks.0.up.weight", "gradient"]
    assert 0.5 < gradient["cosine"] < 0.9999
    assert 0.7 < gradient["norm_ratio"] < 1.4


def test_what_the_monitor_finds_is_what_was_cast(text: Path) -> None:
    """The noise of a weight, computed beside it."""
    from microscale.cast import cast

    torch.manual_seed(0)
    trained = train(settings(text, policy="mxfp4", monitor_every=1, steps=1))
    model = GPT(SMALL, 257, 32)
    torch.manual_seed(0)
    model = GPT(SMALL, 257, 32)
    w = model.get_parameter("blocks.0.up.weight").detach().double()
    noise = (w - cast(w.float(), "mxfp4").double()).square().sum()
    row = next(
        r for r in trained.monitored if (r["module"], r["operand"]) == ("blocks.0.up", "weight")
    )
    assert row["sqnr"] == pytest.approx(10 * float((w.square().sum() / noise).log10()), abs=1e-3)


def test_the_monitor_warns_of_gradients_that_went_astray(text: Path) -> None:
    policy = text.with_name("coarse.toml")
    policy.write_text('[wgrad]\ngrad = "int2-tensor"\ninput = "int2-tensor"\n')
    said: list[str] = []
    train(settings(text, policy=str(policy), monitor_every=2), say=said.append)
    assert any("has a cosine of" in line and "blocks." in line for line in said)


def test_a_spike_is_told_with_its_layer() -> None:
    from microscale.recipes.training.monitor import Monitor
    from microscale.recipes.training.world import World

    model = GPT(SMALL, 50, 16)
    monitor = Monitor(Path(), model, World(0, 1, torch.device("cpu")))
    loss(model, torch.randint(50, (2, 17))).backward()
    assert not any(monitor.warn_of_norm(step, 1.0 + step / 100) for step in range(30))
    gradient = model.get_parameter("blocks.1.down.weight").grad
    assert gradient is not None
    gradient *= 1e4
    assert "most of it is of 'blocks.1.down.weight'" in monitor.warn_of_norm(31, 20.0)


def test_a_run_that_goes_on_keeps_what_was_seen(text: Path) -> None:
    config = settings(text, policy="mxfp4", monitor_every=2)
    whole = train(replace(config, out=text.with_name("whole"))).monitored
    train(replace(config, steps=4, final_rate=1.0))
    steps = {int(row["step"]) for row in whole}
    assert steps == {1, 3, 5}
    again = train(replace(config, steps=6, final_rate=1.0)).monitored
    assert {int(row["step"]) for row in again} == steps
    assert len(again) == len(whole)
