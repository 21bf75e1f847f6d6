"""What `convert` would do with one module, found out without changing it."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

import microscale.nn as quantized
from microscale.conversion import Entry
from microscale.functional.product import UNSET, of_matrices
from microscale.nn.site import Site
from microscale.operands import Operand
from microscale.policy import Policy
from microscale.rotation import rotation_of
from microscale.scope import FUSED_SWITCHES, scoped
from microscale.tensor import BlockTensor

SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: quantized.Linear,
    NonDynamicallyQuantizableLinear: quantized.Linear,
    nn.Conv1d: quantized.Conv1d,
    nn.Conv2d: quantized.Conv2d,
    nn.Conv3d: quantized.Conv3d,
    nn.ConvTranspose1d: quantized.ConvTranspose1d,
    nn.ConvTranspose2d: quantized.ConvTranspose2d,
    nn.ConvTranspose3d: quantized.ConvTranspose3d,
    nn.MultiheadAttention: quantized.MultiheadAttention,
    nn.LSTM: quantized.LSTM,
    nn.GRU: quantized.GRU,
    nn.RNN: quantized.RNN,
    nn.LSTMCell: quantized.LSTMCell,
    nn.GRUCell: quantized.GRUCell,
    nn.RNNCell: quantized.RNNCell,
    nn.Embedding: quantized.Embedding,
    nn.EmbeddingBag: quantized.EmbeddingBag,
    nn.Bilinear: quantized.Bilinear,
}
"""Exactly these classes become the others."""

_TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, slots=True)
class Finding:
    """What is to become of a module: its site, its new class if any, its entry if it gets one."""

    module: nn.Module
    site: Site
    target: type[nn.Module] | None = None
    entry: Entry | None = None
    multiplies: bool = True
    """Whether its own forward may hold products, and not vector operations alone."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of a module: its name there, how it is cast, and along which axis."""

    name: str
    parameter: Tensor
    operand: Operand | None
    axis: int
    span: int = 0
    """Number of values that blocks run along, if not those of the axis."""
    packable: bool = True
    """Whether a packed tensor of its shape has the blocks that its product sees."""
    rotation: int = 0
    """How many values along the axis are turned together before the cast."""

    @property
    def length(self) -> int:
        """Number of values that blocks run along."""
        return self.span or self.parameter.shape[self.axis]

    @property
    def bits(self) -> int:
        """Bits of the weight as it is stored: packed, unless that takes more room.

        Blocks are padded when they are packed, which would multiply the size of depthwise kernels,
        whose blocks hold one value: these are stored as they are. So is what is not `packable`.
        """
        plain = stored_bits(self.parameter)
        if self.operand is None or isinstance(self.parameter, BlockTensor) or not self.packable:
            return plain
        return min(plain, self.operand.format.storage_bits(tuple(self.parameter.shape), self.axis))


def stored_bits(x: Tensor) -> int:
    """Bits that a tensor takes as it is."""
    return 8 * (x.storage_bytes if isinstance(x, BlockTensor) else x.nbytes)


def examine(name: str, module: nn.Module, policy: Policy) -> Finding | None:
    """Find out what becomes of a module; None if it has nothing to do with products."""
    multiplies = _may_multiply(module)
    if not multiplies and not (policy.rounds_vectors and _computes(module)):
        return None
    kind = type(module)
    ignored = "ignored by the policy" if policy.ignores(name) else ""
    if "parametrizations" in name.split("."):
        ignored = ignored or "it makes a weight, which is cast as it comes"
    site = Site(name, _policy_at(name, module, policy), kind, ignored, policy.rounds_vectors)
    known = _holds_products(module)
    if refusal := _refusal(module):
        return Finding(module, site, entry=Entry(name, kind.__name__, "left", refusal))
    if known and not ignored:
        site = replace(site, reason=_unsupported(module) or _unset(module, site.policy))
    target = scoped(kind) if site.reason else SWAPS.get(kind) or scoped(kind)
    entry = _entry(module, site) if known else None
    return Finding(module, site, target, entry, multiplies)


def weights(module: nn.Module, policy: Policy) -> Iterator[Weight]:
    """Each weight that is a factor of the module's products, with the cast that it gets."""
    operand = policy.forward.weight
    if isinstance(module, _TABLES):
        yield Weight("weight", module.weight, policy.storage, 1)
    elif isinstance(module, _ConvTransposeNd):
        yield _transposed(module, operand)
    elif isinstance(module, _ConvNd) and policy.convolution == "window":
        yield _window(module, operand)
    elif isinstance(module, (_ConvNd, nn.Linear, nn.Bilinear)):
        axis = 2 if isinstance(module, nn.Bilinear) else 1
        rotation = rotation_of(policy) if isinstance(module, nn.Linear) else 0
        yield Weight("weight", module.weight, operand, axis, rotation=rotation)
    elif _is_hugging_face_conv1d(module):
        yield Weight("weight", module.get_parameter("weight"), operand, 0)
    elif _is_hugging_face_experts(module):
        yield from _experts(module, of_matrices(operand))
    elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2:
                yield Weight(name, parameter, operand, 1)


def _experts(module: nn.Module, operand: Operand | None) -> Iterator[Weight]:
    """The fused weights [experts, out, in] or, transposed, [experts, in, out]."""
    # A tensor scale of all experts is not that of each.
    each = operand and operand.format.block != "tensor" and operand.format.tensor_scale is None
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3:
            axis = 1 if getattr(module, "is_transposed", False) else 2
            yield Weight(name, parameter, operand, axis, packable=bool(each))


def _transposed(module: _ConvTransposeNd, operand: Operand | None) -> Weight:
    """The weight [in, out / groups, ...] of a transposed convolution, blocks along its group."""
    groups, block = module.groups, operand and operand.format.block
    span = module.in_channels // groups
    within = isinstance(block, int) and span % block == 0
    # Along dimension 0 a "channel" is something else, and blocks do not stop where groups do.
    counted = isinstance(block, int) or (isinstance(block, tuple) and module.weight.dim() > 3)
    packable = block == "tensor" or within or (groups == 1 and counted)
    return Weight("weight", module.weight, operand, 0, span, packable)


def _window(module: _ConvNd, operand: Operand | None) -> Weight:
    """The weight [out, in / groups, ...] of a convolution, blocks along all but its first axis."""
    whole = operand is not None and operand.format.block in ("channel", "tensor")
    # The tiles of a kernel of three dimensions are not those of the matrix it is flattened to.
    tiled = operand is not None and isinstance(operand.format.block, tuple)
    matrix = module.weight[0, 0].numel() == 1 and not (tiled and module.weight.dim() == 3)
    packable = whole or matrix
    return Weight("weight", module.weight, operand, 1, module.weight[0].numel(), packable)


def _may_multiply(module: nn.Module) -> bool:
    """Whether a module's own forward may hold products: PyTorch's own are known, others may."""
    kind = type(module)
    special = (*FUSED_SWITCHES, LazyModuleMixin, ScriptModule)
    if isinstance(module, (*special, ParametrizationList)) or kind in SWAPS:
        return True
    product_free = kind.__module__.startswith("torch.") and not is_parametrized(module)
    return not product_free and kind.forward is not nn.Module.forward


def _computes(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _holds_products(module: nn.Module) -> bool:
    known = (*SWAPS, *FUSED_SWITCHES)
    own = _is_hugging_face_conv1d(module) or _is_hugging_face_experts(module)
    return isinstance(module, known) or own


def _is_hugging_face_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer with a transposed weight (not a convolution)."""
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and isinstance(module, home.Conv1D)


def _is_hugging_face_experts(module: nn.Module) -> bool:
    """Whether this is a mixture of experts with fused weights, as transformers 5 has them."""
    kind = type(module)
    fused = hasattr(kind, "_apply_gate") and hasattr(module, "is_transposed")
    return kind.__module__.startswith("transformers.") and fused


def _policy_at(name: str, module: nn.Module, policy: Policy) -> Policy:
    """The policy of one module, as its kind understands it."""
    policy = policy.at(name)
    if isinstance(module, NonDynamicallyQuantizableLinear) and policy.rotation != "off":
        # Its product is that of the attention around it, which is not rotated.
        policy = replace(policy, rotation="off")
    operand = policy.forward.weight
    if operand is None or operand.format.block != "token" or not isinstance(module, _ConvNd):
        return policy
    # What one token is to an activation, one output channel is to a convolution's weight.
    channel = replace(operand, format=replace(operand.format, block="channel"))
    return replace(policy, forward=replace(policy.forward, weight=channel))


def _refusal(module: nn.Module) -> str:
    """Why a module's class cannot be swapped at all, or ""."""
    if isinstance(module, ScriptModule):
        return "TorchScript cannot be looked into"
    if isinstance(module, LazyModuleMixin):
        return "it has no shape yet; run a batch through the model before it is converted"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance; convert before that is done"
    try:
        scoped(type(module))
    except TypeError as error:
        return f"its class cannot be subclassed: {error}"
    return ""


def _unsupported(module: nn.Module) -> str:
    if isinstance(module, _TABLES) and module.max_norm is not None:
        return "max_norm rescales the table while it is read"
    return ""


def _unset(module: nn.Module, policy: Policy) -> str:
    """Whether the policy leaves everything in a module in the wider type."""
    if isinstance(module, tuple(FUSED_SWITCHES)) or any(_operands(module, policy).values()):
        return ""
    if policy.vector != "float32" and not isinstance(module, _TABLES):
        return ""
    return UNSET


def _operands(module: nn.Module, policy: Policy) -> dict[str, Operand | None]:
    """The operands of a module's own products by role."""
    if isinstance(module, tuple(FUSED_SWITCHES)):
        return {}
    if isinstance(module, _TABLES):
        return {"table": policy.storage}
    roles = {"weight": policy.forward.weight, "input": policy.forward.input}
    backward = {path: policy.setting(path) for path in policy.backward_operands}
    roles |= {path: operand for path, operand in backward.items() if isinstance(operand, Operand)}
    matmul = policy.matmul
    if isinstance(module, nn.Bilinear):
        roles |= {"halfway": matmul.left, "first input": matmul.right}
    if isinstance(module, nn.MultiheadAttention):
        if matmul.scores:
            roles |= {"query": matmul.left, "key": matmul.right}
        if matmul.values:
            roles |= {"probabilities": matmul.left, "value": matmul.right}
    return roles


def _entry(module: nn.Module, site: Site) -> Entry:
    kind = SWAPS.get(type(module), type(module)).__name__
    if site.reason:
        return Entry(site.name, kind, "left", site.reason)
    found = list(weights(module, site.policy))
    return Entry(
        site.name,
        kind,
        "quantized",
        formats={role: str(op) for role, op in _operands(module, site.policy).items() if op},
        weights=sum(weight.parameter.numel() for weight in found),
        weight_bits=sum(weight.bits for weight in found),
        notes=tuple(_notes(module, found, site.policy)),
    )


def _notes(module: nn.Module, found: list[Weight], policy: Policy) -> Iterator[str]:
    vector = policy.vector
    if policy.rotation != "off" and found:
        sizes = {w.rotation for w in found}
        yield f"rotated by {max(sizes)}" if any(sizes) else "not rotated"
    if vector != "float32" and not isinstance(module, (*FUSED_SWITCHES, *_TABLES)):
        yield f"delivers {vector}"
    if isinstance(module, (*FUSED_SWITCHES, nn.MultiheadAttention)):
        yield "fused fast path off"
    if type(module) not in (*SWAPS, *FUSED_SWITCHES):
        yield "as its forward calls them"
    if not all(w.packable for w in found):
        yield "stored as it is"
    blocks = {(w.length, w.operand.format.counted) for w in found if w.operand}
    for length, block in sorted(blocks):
        if block and length < block:
            yield f"blocks of {length}"
        elif block and length % block:
            yield f"last block of {length % block}"
