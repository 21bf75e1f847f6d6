"""Decoder stacks of Hugging Face: every weight is reached, blocks stand still, nothing differs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microscale.checkpoint.native import load, save
from microscale.convert import convert, revert
from microscale.recipes.diffusion import error_diffusion

transformers = pytest.importorskip("transformers")

SMALL: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Gemma2": {"head_dim": 16},
    "Mixtral": {"num_local_experts": 4},
    "GPT2": {},
    "OPT": {"word_embed_proj_dim": 64, "ffn_dim": 96},
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")
    common: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0}
    if name == "GPT2":
        common |= {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
        common |= {"bos_token_id": 1, "eos_token_id": 2}
    else:
        common |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
        common |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        common |= {"max_position_embeddings": 64}
    built = config(**common, **SMALL[name])
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model: nn.Module = getattr(transformers, kind)(built)
    return model.eval()


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[0, 10:] = 0
    return [{"input_ids": torch.randint(3, 96, (4, 16)), "attention_mask": mask} for _ in range(3)]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = [model(**batch).logits[batch["attention_mask"].bool()] for batch in batches()]
    return torch.cat(found)


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_of_a_decoder_is_solved(name: str, tmp_path: Any) -> None:
    model = make(name)
    wide = logits(model)
    convert(model, "mxfp4/fp32", verbose=False)
    nearest = F.mse_loss(logits(model), wide)
    revert(model)
    report = error_diffusion(model, "mxfp4/fp32", batches())
    assert not report.unreached, report
    assert F.mse_loss(logits(model), wide) < nearest
    rows = {o.samples for o in report.outcomes if "experts" not in o.name}
    assert rows <= {0, 3 * 58}  # the padding is left out, tables have no samples
    save(model, tmp_path / "model.safetensors")
    again = make(name)
    load(tmp_path / "model.safetensors", again)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
def test_finished_blocks_are_not_run_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from microscale.recipes import walk as module

    seen: list[int] = []
    original = module.Walk.explore

    def explore(self: Any) -> Any:
        stages = original(self)
        seen.extend(len(stack.blocks) for stack in self.stacks.stacks)
        return stages

    monkeypatch.setattr(module.Walk, "explore", explore)
    error_diffusion(make(name), "mxfp4", batches())
    assert seen == [3]
