"""ONNX: a graph that decodes every weight with DequantizeLinear, to be joined to a model's.

Codes are initializers of the 4, 6 and 8-bit types, scales E8M0 or float32, blocks along the last
axis. The 6-bit types and E8M0 scales need opset 28. Plain tensors are initializers that are outputs
too. Files of ONNX hold less than 2 GiB.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microscale.checkpoint.layouts.base import (
    Content,
    Item,
    base_name,
    not_along_last,
    outline,
    plain_values,
    put_together,
)
from microscale.errors import MicroscaleError
from microscale.tensor import BlockTensor

OPSET = 28
LARGEST = 2**31 - 2**20
TYPES = {
    "mxfp4": "FLOAT4E2M1",
    "mxfp6_e2m3": "FLOAT6E2M3",
    "mxfp6_e3m2": "FLOAT6E3M2",
    "mxfp8_e4m3": "FLOAT8E4M3FN",
    "mxfp8_e5m2": "FLOAT8E5M2",
    "int8-token": "INT8",
    "int8-channel": "INT8",
}
_PLAIN = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.float64: "DOUBLE",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.int16: "INT16",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.bool: "BOOL",
}


def _package() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MicroscaleError("ONNX needs the package onnx: pip install onnx.") from error
    if onnx.defs.onnx_opset_version() < OPSET:
        raise MicroscaleError(f"onnx {onnx.__version__} lacks opset {OPSET}; take 1.23 or later.")
    return onnx


class Onnx:
    """The layout."""

    name, suffix = "onnx", ".onnx"

    def refusal(self, item: Item) -> str:
        """Why a packed tensor cannot be carried, or ""."""
        return not_along_last(item, *TYPES)

    def write(self, content: Content, carried: Mapping[str, Item], path: Path) -> None:
        """Write all tensors to a file."""
        onnx = _package()
        nodes, held, outputs = [], [], []
        for name, item in content.items.items():
            x = item.load()
            if name not in carried:
                x = plain_values(item, x)
                held.append(_tensor(onnx, name, _PLAIN.get(x.dtype), x, tuple(x.shape)))
                outputs.append(_value(onnx, name, _PLAIN[x.dtype], item.shape))
                continue
            assert isinstance(x, BlockTensor)
            codes, scales, node = _dequantize(onnx, name, x)
            held += [codes, scales]
            nodes.append(node)
            outputs.append(_value(onnx, name, "FLOAT", item.shape))
        graph = onnx.helper.make_graph(nodes, "weights", [], outputs, held)
        imports = [onnx.helper.make_opsetid("", OPSET)]
        model = onnx.helper.make_model(graph, opset_imports=imports, producer_name="microscale")
        model.ir_version = onnx.IR_VERSION
        if model.ByteSize() > LARGEST:
            raise MicroscaleError("ONNX files hold less than 2 GiB; this checkpoint is larger.")
        onnx.checker.check_model(model)
        onnx.save(model, path)

    def read(self, path: Path) -> Content:
        """Open a file. Data outside of it is not read."""
        onnx = _package()
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except Exception as error:
            raise MicroscaleError(f"{path} is not an ONNX file, or damaged.") from error
        held = {tensor.name: tensor for tensor in graph.initializer}
        for tensor in held.values():
            if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
                raise MicroscaleError(
                    f"{path}: tensor {tensor.name!r} lies in another file, which is not opened."
                )
        items: dict[str, Item] = {}
        used: set[str] = set()
        for node in graph.node:
            if node.op_type != "DequantizeLinear" or not set(node.input) <= held.keys():
                raise MicroscaleError(
                    f"{path}: node {node.op_type!r} is no DequantizeLinear of stored tensors."
                )
            item = _packed_item(onnx, node, held, path)
            items[item.name] = item
            used |= set(node.input)
        for name, tensor in held.items():
            if name not in used:
                items[name] = _plain_item(onnx, tensor, path)
        return Content(self.name, path, dict(sorted(items.items())))


def _dequantize(onnx: Any, name: str, q: BlockTensor) -> tuple[Any, Any, Any]:
    fmt = base_name(outline(str(q.format), tuple(q.shape), q.dtype))
    shape = tuple(q.shape)
    codes = _tensor(onnx, f"{name}.codes", TYPES[fmt], q.codes, shape)
    names = [f"{name}.codes", f"{name}.scales"]
    if fmt.startswith("int8"):
        # Our integers are k / 64; theirs k.
        scales = _tensor(onnx, names[1], "FLOAT", q.scales / 64, (shape[0],))
        node = onnx.helper.make_node("DequantizeLinear", names, [name], axis=0)
        if not torch.equal(q.scales / 64 * 64, q.scales) or len(shape) != 2:
            raise MicroscaleError(f"tensor {name!r}: ONNX carries int8 matrices of usual scales.")
        return codes, scales, node
    count = (*shape[:-1], shape[-1] // 32)
    scales = _tensor(onnx, names[1], "FLOAT8E8M0", q.scales, count)
    node = onnx.helper.make_node(
        "DequantizeLinear",
        names,
        [name],
        axis=len(shape) - 1,
        block_size=32,
        output_dtype=onnx.TensorProto.FLOAT,
    )
    return codes, scales, node


def _tensor(onnx: Any, name: str, kind: str | None, x: Tensor, shape: tuple[int, ...]) -> Any:
    if kind is None:
        raise MicroscaleError(f"tensor {name!r} is {x.dtype}, which ONNX is not given here.")
    raw = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
    number = getattr(onnx.TensorProto, kind)
    return onnx.TensorProto(name=name, data_type=number, dims=shape, raw_data=raw)


def _value(onnx: Any, name: str, kind: str, shape: tuple[int, ...]) -> Any:
    return onnx.helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape)


def _packed_item(onnx: Any, node: Any, held: Mapping[str, Any], path: Path) -> Item:
    name = node.output[0] if node.output else ""
    if len(node.input) != 2:
        raise MicroscaleError(f"{path}: tensor {name!r} has a zero point, which is not read here.")
    codes, scales = (held[stored] for stored in node.input)
    kind = onnx.TensorProto.DataType.Name(codes.data_type)
    fmt = next((fmt for fmt, known in TYPES.items() if known == kind), None)
    given = {a.name: a.i for a in node.attribute}
    shape = tuple(codes.dims)
    last = given.get("axis", 1) == (0 if kind == "INT8" else len(shape) - 1)
    if fmt is None or not last or given.get("block_size", 0) != (0 if kind == "INT8" else 32):
        raise MicroscaleError(f"{path}: tensor {name!r} is {kind} in other blocks than are read.")
    packed = outline(fmt, shape, torch.float32)

    def load() -> BlockTensor:
        parts = [
            torch.frombuffer(bytearray(t.raw_data), dtype=torch.uint8) for t in (codes, scales)
        ]
        if kind == "INT8":
            parts[1] = parts[1].view(torch.float32) * 64
        return put_together(packed, *parts)

    return Item(name, "model.safetensors", shape, torch.float32, packed, load)


def _plain_item(onnx: Any, tensor: Any, path: Path) -> Item:
    names = {kind: dtype for dtype, kind in _PLAIN.items()}
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if kind not in names:
        raise MicroscaleError(f"{path}: tensor {tensor.name!r} is {kind}, which is not read here.")
    dtype, shape = names[kind], tuple(tensor.dims)

    def load() -> Tensor:
        if not tensor.raw_data:
            return torch.empty(shape, dtype=dtype)
        data = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8)
        return data.view(dtype).reshape(shape)

    return Item(tensor.name, "model.safetensors", shape, dtype, None, load)
