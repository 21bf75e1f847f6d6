"""Keys and values of a generating model, kept as codes and scales.

Every token is packed for itself, along features, when it enters the cache, so that nothing that is
kept depends on later tokens; attention is given decoded values.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.operands import Operand
from microscale.scope import site_of
from microscale.tensor import BlockTensor, quantize


def packed_cache(model: nn.Module) -> Any:
    """An empty cache for `model.generate(..., past_key_values=packed_cache(model))`.

    Args:
        model: of Hugging Face's transformers, converted with a policy that sets `cache`.

    Returns:
        A `transformers.DynamicCache` whose layers hold BlockTensors.

    Raises:
        MicroscaleError: a model that was not converted, a policy without `cache` or with one whose
            tokens share scales, a model whose layers keep something else than all tokens.
    """
    from transformers import DynamicCache

    operand = _operand(model)
    config: Any = getattr(model, "config", None)
    if config is None:
        raise MicroscaleError(f"model {type(model).__name__} has no config of transformers.")
    made = DynamicCache(config=config)
    plain = _layer_class().__mro__[1]
    for i, layer in enumerate(made.layers):
        if type(layer) is not plain:
            raise MicroscaleError(
                f"layer {i} of the model keeps a {type(layer).__name__}; only caches of all "
                "tokens are packed. Generate with the model's own cache."
            )
        made.layers[i] = _layer_class()(operand)
    return made


def _operand(model: nn.Module) -> Operand:
    site = site_of(model)
    operand = None if site is None else site.policy.cache
    if operand is None:
        raise MicroscaleError(
            "model was not converted with a policy that sets cache; convert it with "
            "Policy.of(..., cache='mxfp8_e4m3')."
        )
    fmt = operand.format
    if fmt.tensor_scale is not None or not (isinstance(fmt.block, int) or fmt.block == "token"):
        raise MicroscaleError(
            f"policy cache is {fmt}, whose tokens share a scale that later tokens would change; "
            "give a format with blocks along features."
        )
    return operand


@cache
def _layer_class() -> Any:
    from transformers import cache_utils

    base: Any = cache_utils.DynamicLayer  # (transformers annotates a part)

    class PackedLayer(base):  # type: ignore[misc]
        """One layer's keys and values, packed."""

        def __init__(self, operand: Operand) -> None:
            super().__init__()
            self.operand = operand
            self.keys: Any = None
            self.values: Any = None
            self.is_initialized: bool = False

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            """Add tokens [N, heads, T, features]; return all keys and values, decoded."""
            new = _packed(key_states, self.operand), _packed(value_states, self.operand)
            if self.is_initialized:
                new = _joined(self.keys, new[0]), _joined(self.values, new[1])
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self.keys, self.values = new
            return new[0].dequantize(), new[1].dequantize()

    return PackedLayer


def _packed(x: Tensor, operand: Operand) -> BlockTensor:
    return quantize(x.detach(), operand.format, -1, **operand.laws)


def _joined(old: BlockTensor, new: BlockTensor) -> BlockTensor:
    """Put tokens behind each other; packed parts have the dimensions of the whole."""
    kept = {0, 1, 3} if new.format.zero_point else {0, 1}
    pairs = enumerate(zip(old.stored, new.stored, strict=True))
    codes, scales, tensor_scale, zero_point = (
        torch.cat(pair, -2) if i in kept else pair[1] for i, pair in pairs
    )
    shape = torch.Size((*old.shape[:-2], old.shape[-2] + new.shape[-2], old.shape[-1]))
    return BlockTensor((codes, scales, tensor_scale, zero_point), new.packing, shape, new.dtype)
