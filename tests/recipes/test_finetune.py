"""`finetune`: the loop, the command, Trainer; kills, bad data, states of other runs."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from microscale.checkpoint.native import load, save
from microscale.cli import app
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.ledger import record_products
from microscale.recipes.finetune import Plan, finetune
from microscale.recipes.sweep import sweep
from microscale.scope import site_of


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 5)).eval()


def pairs(count: int = 8, seed: int = 0) -> list[Any]:
    x = draw(16 * count, 32, seed=seed)
    y = (x @ draw(32, 5, seed=99)).argmax(-1)
    return list(zip(x.split(16), y.split(16), strict=True))


@pytest.mark.parametrize("policy", ["mxfp4", "mxfp6_e2m3"])
def test_training_lowers_the_loss_of_data_that_is_held_back(policy: str) -> None:
    model = network()
    done = finetune(
        model, policy, pairs(32), plan=Plan(steps=100, lr=3e-3), development=pairs(4, seed=7)
    )
    assert done.before is not None
    assert done.after is not None
    assert done.after < 0.8 * done.before
    assert len(done.losses) == 100
    assert "100 steps at learning rate 0.003" in str(done)
    assert json.dumps(done.to_dict(), allow_nan=False)
    with record_products() as ledger:
        model(draw(4, 32))
    assert all(row.how == "emulated" for row in ledger)


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Dropout, orders and optimizers go on; the ranges' too."""

    def run(folder: Path | None, report: Any = lambda *_: None) -> tuple[nn.Module, Any]:
        model = network()
        plan = Plan(steps=20, lr=1e-3, learn="ranges")
        batches = pairs()
        policy = "int8-channel/int8-tensor"
        return model, finetune(
            model, policy, batches, plan=plan, progress=folder, every=4, report=report
        )

    def stop(_: str, step: int, __: int | None) -> None:
        if step == 14:
            raise KeyboardInterrupt

    whole, done = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop)
    model, again = run(tmp_path)
    assert again.losses == done.losses
    for kept, x in ((whole, "a"), (model, "b")):
        save(kept, tmp_path / x)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"something else", "no checkpoint of this program"),
        (b"microscale training state 1 0000\nabc", "is damaged"),
        (None, "of another run"),
    ],
)
def test_states_that_do_not_belong_are_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    state = tmp_path / "state.bin"
    if content is None:
        finetune(network(), "mxfp4", pairs(), plan=Plan(steps=2), progress=tmp_path)
        content = state.read_bytes()
    state.write_bytes(content)
    model = network()
    with pytest.raises(MicroscaleError, match=message):
        finetune(model, "mxfp4", pairs(), plan=Plan(steps=3), progress=tmp_path)
    assert state.read_bytes() == content
    assert site_of(model[0]) is None


def test_a_damaged_byte_is_found(tmp_path: Path) -> None:
    arguments: Any = ("mxfp4", pairs())
    finetune(network(), *arguments, plan=Plan(steps=2), progress=tmp_path)
    content = bytearray((tmp_path / "state.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "state.bin").write_bytes(content)
    with pytest.raises(MicroscaleError, match="is damaged"):
        finetune(network(), *arguments, plan=Plan(steps=2), progress=tmp_path)


class Exploding(nn.Module):
    """Its second layer is infinite for one of the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out * (math.inf if float(x[0, 0]) == 100 else 1)


def test_a_loss_that_is_not_finite_is_traced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = Exploding(), pairs()
    batches[3][0][0, 0] = 100
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(MicroscaleError) as caught:
        finetune(model, "mxfp4", batches, plan=Plan(steps=20), progress=tmp_path, every=1)
    message = str(caught.value)
    assert "(batch 3)" in message
    assert "began in the output of the model (Exploding)" in message
    assert "the last good state is" in message
    assert (tmp_path / "state.bin").is_file()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert site_of(model.first) is None


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        ([(torch.full((2, 32), math.nan), torch.tensor([0, 1]))], "NaN or infinite"),
        ([(draw(2, 31), torch.tensor([0, 1]))], "batch 0: model or loss failed"),
        ([(draw(2, 32), torch.tensor([0, 9]))], "batch 0: model or loss failed"),
        ([(draw(2, 32), torch.tensor([0, 1, 2]))], r"targets of shape \(3,\)"),
        ([(draw(2, 32), draw(2, 4))], r"targets of shape \(2, 4\)"),
        ([draw(2, 32)], "says no loss"),
    ],
)
def test_bad_data(batches: list[Any], message: str) -> None:
    model = network()
    before = model.state_dict()["0.weight"].clone()
    with pytest.raises(MicroscaleError, match=message):
        finetune(model, "mxfp4", batches, plan=Plan(steps=2))
    assert torch.equal(model.state_dict()["0.weight"], before)
    assert site_of(model[0]) is None
    assert not model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"lr": math.nan}, "lr nan"),
        ({"range_lr": 0.1}, "without ranges to learn"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_plans_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MicroscaleError, match=message):
        Plan(**settings)


def test_a_sweep_chooses_on_development_data(tmp_path: Path) -> None:
    model = network()
    before = model.state_dict()["0.weight"].clone()
    arguments: Any = (model, "mxfp4", pairs(), pairs(2, seed=7))
    settings: Any = {"lrs": (1e-6, 3e-3), "steps": (5, 30), "progress": tmp_path}
    found = sweep(*arguments, **settings)
    assert [t.plan.steps for t in found.trials] == [5, 5, 30, 30]
    assert found.best.plan == Plan(steps=30, lr=3e-3)
    assert found.best.loss == min(t.loss for t in found.trials if t.loss is not None)
    assert "best" in str(found)
    assert torch.equal(model.state_dict()["0.weight"], before)
    assert sweep(*arguments, **settings) == found  # read from the folder
    with pytest.raises(MicroscaleError, match="of another sweep"):
        sweep(*arguments, **{**settings, "lrs": (1e-5,)})


COMMAND = "from microscale.cli import app; app()"


def started(*arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", COMMAND, "finetune", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


@pytest.mark.slow
def test_killed_it_goes_on_and_writes_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    common = ("digits-cnn", "--format", "mxfp4", "--steps", 160)
    assert started(*common, "--out", tmp_path / "a").wait() == 0
    process, state = started(*common, "--out", tmp_path / "b"), tmp_path / "b/.progress/state.bin"
    while not state.is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "b/model.safetensors").exists()
    assert started(*common, "--out", tmp_path / "b").wait() == 0
    for name in ("model.safetensors", "finetuning.json", "policy.toml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not (tmp_path / "b/.progress").exists()


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["finetune", *map(str, arguments)], prog_name="microscale")
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.mark.slow
def test_a_language_model_from_the_command_line(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text, out = tmp_path / "code.py", tmp_path / "out"
    lines = [f"def area_{i}(width, height):\n    return {i} * width * height\n" for i in range(150)]
    text.write_text("\n\n".join(lines))
    output = run(
        *("stdlib-gpt", "--format", "mxfp4", "--data", text, "--out", out, "--steps", 2),
        *("--batch-size", 1),
    )
    assert "finetuned" in output
    record = json.loads((out / "finetuning.json").read_text())
    assert len(record["losses"]) == 2
    models = record["evaluation"]["models"]
    config = transformers.AutoConfig.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    load(out / "model.safetensors", model)
    assert models["finetuned"]["metric"]["value"] != models["cast"]["metric"]["value"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "mxfp3"), "mxfp3"),
        (("--steps", "0"), "steps 0"),
        (("--steps", "many"), "--steps 'many' is not a whole number"),
        (("--lr", "1e-4,1e-3"), "add --sweep"),
        (("--range-lr", "0.1"), "without ranges to learn"),
        (("--learn", "scales"), "learn='scales'"),
        (("--gradient", "soft"), "gradient='soft'"),
        (("--data", "none.txt"), "none.txt"),
    ],
)
def test_bad_options_write_nothing(
    arguments: tuple[str, str], message: str, tmp_path: Path
) -> None:
    text, out = tmp_path / "x.txt", tmp_path / "out"
    text.write_text("hello " * 50)
    given = {"--format": "mxfp4", "--data": text, "--out": out} | {arguments[0]: arguments[1]}
    assert message in run("stdlib-gpt", *(x for pair in given.items() for x in pair), code=2)
    assert not out.exists()


def test_models_that_bring_no_data_need_some(tmp_path: Path) -> None:
    output = run("stdlib-gpt", "--format", "mxfp4", "--out", tmp_path / "out", code=2)
    assert "brings no data to train on" in output


def test_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPT2LMHeadModel(config)
    convert(model, "mxfp6_e2m3", verbose=False)
    rows = [{"input_ids": (torch.arange(16) + i) % 64} for i in range(32)]
    data = [{**row, "labels": row["input_ids"]} for row in rows]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, learning_rate=1e-2, report_to=[], logging_steps=10,
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=data)
    with record_products() as ledger:
        trainer.train()
    ran = {row.how for row in ledger}
    assert "emulated" in ran
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    save(model, tmp_path / "model.safetensors")
    fresh = transformers.GPT2LMHeadModel(config).eval()
    load(tmp_path / "model.safetensors", fresh)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(fresh(ids).logits, model.eval()(ids).logits, atol=1e-4)
