"""`save` and `load`: whole models as one safetensors file, weights packed as the model runs them.

docs/checkpoint.md describes the file. Saving writes beside the final name and renames, so that an
interrupted save leaves the old file or the new one.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from microscale.checkpoint.folder import open_folder
from microscale.checkpoint.header import DTYPES, KEY, Header, Packed, read_header, stored_parts
from microscale.checkpoint.state import packed_weights, policy_of
from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.files import check_output
from microscale.kernels.storage import PARTS
from microscale.nn.site import LEARNED
from microscale.policy import Policy
from microscale.rotation import rotated
from microscale.survey import Weight
from microscale.tensor import BlockTensor, quantize

Tensors = dict[str, Tensor]


def save(source: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write a model, or a dictionary of tensors, to one safetensors file.

    Weights of a model that `convert` has changed are stored packed, by the operands of its
    policy: the codes are those that its products use. BlockTensors are stored as they are,
    everything else unchanged; tied tensors once.

    Raises MicroscaleError, before anything is written, if the path cannot be written to.
    """
    target = check_output(Path(path), "path")
    if isinstance(source, nn.Module):
        tensors, aliases, policy = _packed_state(source)
    else:
        tensors, aliases = _without_aliases(dict(source), {})
        policy = None
    packed = {name: _entry(x) for name, x in tensors.items() if isinstance(x, BlockTensor)}
    header = Header(packed, aliases, None if policy is None else policy.to_dict())
    temporary = target.with_name(f".{target.name}.partial")
    try:
        safetensors.torch.save_file(_parts(tensors), temporary, {KEY: header.to_json()})
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, model: nn.Module | None = None, *, device: str = "cpu") -> Tensors:
    """Read a file that `save` wrote, or a folder that `microscale quantize` wrote.

    Without a model: a dictionary of tensors by name, BlockTensors for the packed ones. With a
    model of the architecture that was saved: it is converted by the stored policy, if there is
    one, its parameters and buffers are replaced by the stored ones (the packed ones stay packed
    and are decoded for each product), and the same dictionary is returned.

    Raises MicroscaleError for a file that is missing, damaged, not of this kind, or of another
    model, naming the tensor; the model is then left as it was.
    """
    where = str(path)
    read = _load_folder if Path(path).is_dir() else _load_file
    header, tensors = read(Path(path), device)
    for alias, name in header.aliases.items():
        if name not in tensors:
            raise MicroscaleError(f"{where}: {alias!r} shares {name!r}, which is not in the file.")
        tensors[alias] = tensors[name]
    if model is not None:
        _check_fit(model, tensors, where)
        if header.policy is not None:
            convert(model, Policy.from_dict(header.policy), verbose=False)
        _put(model, tensors)
    return tensors


# ---------------------------------------------------------------- saving


def _packed_state(model: nn.Module) -> tuple[Tensors, dict[str, str], Policy | None]:
    for name, module in model.named_modules():
        if any(hasattr(module, place) for place in LEARNED):
            raise MicroscaleError(
                f"module {name!r} is still learning its ranges; call microscale.recipes.settle on "
                "the model before it is saved."
            )
    state = model.state_dict()
    weights = packed_weights(model)
    kinds = {name: (weight.operand, weight.axis) for name, weight in weights.items()}
    tensors, aliases = _without_aliases(state, kinds)
    for name in weights.keys() & tensors.keys():
        tensors[name] = _quantized(tensors[name], weights[name])
    return tensors, aliases, policy_of(model)


def _quantized(x: Tensor, weight: Weight) -> Tensor:
    operand = weight.operand
    if operand is None or isinstance(x, BlockTensor):
        return x
    turned = rotated(x.detach(), weight.rotation, weight.axis)
    return quantize(turned, operand.format, weight.axis, **operand.laws)


def _without_aliases(
    tensors: Tensors, kinds: Mapping[str, object]
) -> tuple[Tensors, dict[str, str]]:
    """Keep one name for each tensor that is stored the same way under several names."""
    first: dict[object, str] = {}
    kept, aliases = {}, {}
    for name, x in tensors.items():
        codes = x.codes if isinstance(x, BlockTensor) else x
        layout = (tuple(x.shape), codes.stride(), codes.dtype, codes.storage_offset())
        key = (codes.untyped_storage().data_ptr(), layout, kinds.get(name)) if x.numel() else name
        if first.setdefault(key, name) == name:
            kept[name] = x
        else:
            aliases[name] = first[key]
    return kept, aliases


def _entry(x: BlockTensor) -> Packed:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return Packed(str(x.format), x.axis, names[x.packing.compute], tuple(x.shape), names[x.dtype])


def _parts(tensors: Tensors) -> Tensors:
    parts: Tensors = {}
    for name, x in tensors.items():
        if isinstance(x, BlockTensor):
            kept = stored_parts(x.format)
            new = {f"{name}.{part}": x.stored[i].contiguous() for part, i in kept.items()}
        else:
            new = {name: x.detach().contiguous().clone()}
        if taken := parts.keys() & new.keys():
            raise MicroscaleError(f"two tensors would be stored as {min(taken)!r}; rename one.")
        parts |= new
    return parts


# ---------------------------------------------------------------- loading


def _load_folder(path: Path, device: str) -> tuple[Header, Tensors]:
    """The shards of a folder together."""
    whole = Header()
    tensors: Tensors = {}
    for name, shard in open_folder(path).shards.items():
        header, found = _load_file(shard.path, device)
        if taken := tensors.keys() & found.keys():
            raise MicroscaleError(f"{path}: tensor {min(taken)!r} stands in {name!r} and before.")
        tensors |= found
        whole = Header(
            {**whole.packed, **header.packed}, {**whole.aliases, **header.aliases}, header.policy
        )
    return whole, tensors


def _load_file(path: Path, device: str) -> tuple[Header, Tensors]:
    """The header of one file and its tensors, the packed ones put together."""
    header, stored = _read(path, device)
    packed = {n: assemble(n, entry, stored, str(path)) for n, entry in header.packed.items()}
    return header, packed | stored


def _read(path: Path, device: str) -> tuple[Header, Tensors]:
    if not path.is_file():
        raise MicroscaleError(f"{path}: there is no such file.")
    try:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise MicroscaleError(f"{path} is not a safetensors file, or damaged: {error}.") from error
    if text is None:
        raise MicroscaleError(
            f"{path} has no microscale header; read it with safetensors.torch.load_file."
        )
    return read_header(text, str(path)), tensors


def assemble(name: str, entry: Packed, stored: Tensors, where: str) -> Tensor:
    """Take a packed tensor's parts out of `stored` and join them."""
    wanted, parts = entry.expected(), {}
    for part, place in entry.parts.items():
        expected = wanted[place]
        found = stored.pop(f"{name}.{part}", None)
        if found is None:
            raise MicroscaleError(f"{where}: tensor {name!r} lacks its part {part!r}.")
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise MicroscaleError(
                f"{where}: {name}.{part} is {found.dtype} {tuple(found.shape)}; {entry.format} of "
                f"shape {entry.shape} has {expected.dtype} {tuple(expected.shape)}."
            )
        parts[part] = found
    device = parts["codes"].device
    codes, scales, tensor_scale, zero_point = (
        parts.get(part, torch.empty(0, dtype=empty.dtype, device=device))
        for part, empty in zip(PARTS, wanted, strict=True)
    )
    whole = (codes, scales, tensor_scale, zero_point)
    return BlockTensor(whole, entry.layout, entry.shape, DTYPES[entry.dtype])


def _check_fit(model: nn.Module, tensors: Tensors, where: str) -> None:
    state = model.state_dict()
    for problem, names in (
        ("lacks", state.keys() - tensors.keys()),
        ("holds, besides what the model has,", tensors.keys() - state.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise MicroscaleError(f"{where} {problem} the tensor {min(names)!r}{more}.")
    for name, x in state.items():
        if x.shape != tensors[name].shape:
            raise MicroscaleError(
                f"{where}: tensor {name!r} has shape {tuple(tensors[name].shape)}, "
                f"the model's has {tuple(x.shape)}."
            )


def _put(model: nn.Module, tensors: Tensors) -> None:
    """Replace parameters by packed ones where they are packed; copy the rest into place."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        own = {**module._parameters, **module._buffers}  # noqa: SLF001 (as state_dict does)
        for name, present in own.items():
            x = tensors.get(f"{prefix}.{name}" if prefix else name)
            if present is None or x is None:
                continue
            if isinstance(x, BlockTensor):
                made.setdefault(id(x), nn.Parameter(x, requires_grad=False))
                setattr(module, name, made[id(x)])
            else:
                with torch.no_grad():
                    present.copy_(x)
