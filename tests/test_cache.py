"""Keys and values of generating models, kept as codes and scales."""

from typing import Any

import pytest
import torch
from torch import nn

from microscale.cache import packed_cache
from microscale.cast import cast
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.policy import Policy
from microscale.tensor import BlockTensor

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.randint(3, 100, (2, 9))


def llama(policy: Policy) -> Any:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    convert(model, policy, verbose=False)
    return model


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp6_e2m3", "int8-token"])
def test_tokens_are_packed_one_by_one(fmt: str) -> None:
    cache = packed_cache(llama(Policy.of(cache=fmt)))
    keys, values = torch.randn(2, 2, 9, 32), torch.randn(2, 2, 9, 32)
    for part in (slice(0, 5), slice(5, 6), slice(6, 9)):
        got = cache.update(keys[:, :, part], values[:, :, part], 0)
    assert torch.equal(got[0], cast(keys, fmt))
    assert torch.equal(got[1], cast(values, fmt))
    held = cache.layers[0].keys
    assert isinstance(held, BlockTensor)
    assert held.format.name == fmt
    assert cache.get_seq_length() == 9
    cache.crop(-2)
    assert torch.equal(cache.layers[0].values.dequantize(), cast(values[:, :, :7], fmt))


def test_what_is_kept_takes_the_room_of_its_format() -> None:
    model = llama(Policy.of("mxint8", "mxint8", cache="mxfp4"))
    cache = packed_cache(model)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
    held = cache.layers[1].keys
    assert held.storage_bytes * 8 == held.numel() * 4.25


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_models_generate(options: dict[str, Any]) -> None:
    model = llama(Policy.of(cache="int8-token"))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    plain = model.generate(input_ids=IDS, **settings)
    got = model.generate(input_ids=IDS, past_key_values=packed_cache(model), **settings)
    assert got.shape == plain.shape


def test_steps_see_the_tokens_that_were_kept() -> None:
    # In float64 the order of a sum moves no value across a rounding boundary of the format.
    model = llama(Policy.of(cache="mxint8")).double()
    cache = packed_cache(model)
    with torch.no_grad():
        whole = model(input_ids=IDS, past_key_values=packed_cache(model)).logits
        for i in range(IDS.shape[1]):
            one = model(input_ids=IDS[:, i : i + 1], past_key_values=cache).logits
            torch.testing.assert_close(one[:, 0], whole[:, i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Policy.of("mxfp4"), "not converted with a policy that sets cache"),
        (Policy.of(cache="nvfp4"), "policy cache is nvfp4, whose tokens share a scale"),
        (Policy.of(cache="int8-tensor"), "policy cache is int8-tensor, whose tokens share"),
    ],
)
def test_what_cannot_be_kept_is_refused(policy: Policy, says: str) -> None:
    with pytest.raises(MicroscaleError, match=says):
        packed_cache(llama(policy))


def test_other_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(MicroscaleError, match="not converted"):
        packed_cache(model)
    config = transformers.MistralConfig(**SIZES, sliding_window=4)
    other = transformers.MistralForCausalLM(config)
    convert(other, Policy.of(cache="mxfp4"), verbose=False)
    with pytest.raises(MicroscaleError, match="layer 0 of the model keeps a DynamicSliding"):
        packed_cache(other)
