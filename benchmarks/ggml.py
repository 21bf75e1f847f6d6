"""Products by llama.cpp's ggml through its public C interface (ggml.h, ggml-backend.h).

MICROSCALE_GGML is the path of a built `libggml.so` (CMake's target `ggml`, shared). A weight lies
in a buffer of the CPU backend, or in one of its other buffers ("CPU_REPACK", "AMX") where the
backend says that it multiplies from there; the row of results says which.
"""

import ctypes
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

VARIABLE = "MICROSCALE_GGML"
TYPES = {"mxfp4": 39, "q8_0": 8, "bfloat16": 30}
"""enum ggml_type."""
_FLOAT32 = 0
_OVERHEAD = 1 << 20


class Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda _level, _text, _data: None)
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "ggml_init": (_POINTER, [Parameters]),
    "ggml_free": (None, [_POINTER]),
    "ggml_log_set": (None, [_LOG, _POINTER]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _NUMBER, _SIZE, _SIZE]),
    "ggml_mul_mat": (_POINTER, [_POINTER] * 3),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER] * 2),
    "ggml_nbytes": (ctypes.c_size_t, [_POINTER]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t, [_NUMBER, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER],
    ),
    "ggml_backend_cpu_init": (_POINTER, []),
    "ggml_backend_cpu_set_n_threads": (None, [_POINTER, _NUMBER]),
    "ggml_backend_cpu_buffer_type": (_POINTER, []),
    "ggml_backend_get_device": (_POINTER, [_POINTER]),
    "ggml_backend_dev_backend_reg": (_POINTER, [_POINTER]),
    "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [_POINTER]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, [_POINTER] * 2),
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_POINTER] * 2),
    "ggml_backend_tensor_set": (None, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_tensor_get": (None, [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_graph_compute": (_NUMBER, [_POINTER] * 2),
}  # fmt: skip


class Ggml:
    """The library and its CPU backend."""

    def __init__(self, path: Path) -> None:
        """Load it. Raises OSError where that fails, AttributeError where a function is missing."""
        self.library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.library.ggml_log_set(_SILENT, None)
        self.backend = self.library.ggml_backend_cpu_init()
        self.device = self.library.ggml_backend_get_device(self.backend)

    def buffers(self) -> dict[str, int]:
        """The kinds of memory that the CPU backend multiplies from, by name."""
        usual = self.library.ggml_backend_cpu_buffer_type()
        found = {"CPU": usual}
        registry = self.library.ggml_backend_dev_backend_reg(self.device)
        address = self.library.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if address:
            ask = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)
            for buffer in itertools.takewhile(bool, ask(self.device)):
                found[self.library.ggml_backend_buft_name(buffer).decode()] = buffer
        return found

    def context(self) -> int:
        """Room for the descriptions of tensors and a graph."""
        context = self.library.ggml_init(Parameters(_OVERHEAD, None, no_alloc=True))
        assert isinstance(context, int)
        return context

    def packed(self, values: Tensor, kind: str) -> Tensor:
        """The bytes of values [N, K] in a type of ggml."""
        if kind == "bfloat16":
            return values.bfloat16().view(torch.uint8)
        rows, length = values.shape
        packed = torch.empty(values.numel() * 4, dtype=torch.uint8)
        taken = self.library.ggml_quantize_chunk(
            TYPES[kind], values.data_ptr(), packed.data_ptr(), 0, rows, length, None
        )
        return packed[:taken].clone()


class Product:
    """x w^T for one packed w [N, K] and any number of rows of x."""

    def __init__(self, ggml: Ggml, w: Tensor, kind: str, shape: tuple[int, int], x: Tensor,
                 buffer: int) -> None:  # fmt: skip
        """Put w into such memory. Raises ValueError where ggml does not multiply from there."""
        library, (rows, length) = ggml.library, shape
        self.ggml, self.shape = ggml, (x.shape[0], rows)
        self.contexts = holder, graph = ggml.context(), ggml.context()
        weight = library.ggml_new_tensor_2d(holder, TYPES[kind], length, rows)
        self.buffers = [library.ggml_backend_alloc_ctx_tensors_from_buft(holder, buffer)]
        if not self.buffers[0]:
            raise ValueError("no memory of this kind for the weight")
        given = library.ggml_new_tensor_2d(graph, _FLOAT32, length, x.shape[0])
        self.out = library.ggml_mul_mat(graph, weight, given)
        usual = library.ggml_backend_cpu_buffer_type()
        self.graph = library.ggml_new_graph(graph)
        library.ggml_build_forward_expand(self.graph, self.out)
        self.buffers.append(library.ggml_backend_alloc_ctx_tensors_from_buft(graph, usual))
        if not library.ggml_backend_dev_supports_op(ggml.device, self.out):
            raise ValueError("ggml does not multiply from there")
        library.ggml_backend_tensor_set(weight, w.data_ptr(), 0, w.numel())
        wide = x.float().contiguous()
        library.ggml_backend_tensor_set(given, wide.data_ptr(), 0, wide.nbytes)

    def __del__(self) -> None:
        """Give the memory back."""
        for buffer in filter(None, self.buffers):
            self.ggml.library.ggml_backend_buffer_free(buffer)
        for context in self.contexts:
            self.ggml.library.ggml_free(context)

    def run(self) -> None:
        """Multiply. Raises RuntimeError where ggml reports a failure."""
        threads = torch.get_num_threads()
        self.ggml.library.ggml_backend_cpu_set_n_threads(self.ggml.backend, threads)
        if self.ggml.library.ggml_backend_graph_compute(self.ggml.backend, self.graph):
            raise RuntimeError("ggml_backend_graph_compute failed")

    def result(self) -> Tensor:
        """What was computed last, [M, N]."""
        found = torch.empty(self.shape)
        self.ggml.library.ggml_backend_tensor_get(self.out, found.data_ptr(), 0, found.nbytes)
        return found


def load() -> Ggml | str:
    """The library that the environment names, or why there is none."""
    path = os.environ.get(VARIABLE)
    if not path:
        return f"not given: set {VARIABLE} to the path of a libggml.so"
    try:
        return Ggml(Path(path))
    except (OSError, AttributeError) as error:
        return f"{VARIABLE}={path}: {error}"


def products(
    ggml: Ggml, values: Tensor, x: Tensor, cold: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    """A product for each type and kind of memory, over copies of the weight of `cold` bytes."""
    shape = (values.shape[0], values.shape[1])
    for kind, (name, buffer) in itertools.product(TYPES, ggml.buffers().items()):
        packed = ggml.packed(values.float(), kind)
        count = max(2, cold // packed.numel())
        try:
            made = [Product(ggml, packed, kind, shape, x, buffer) for _ in range(count)]
        except ValueError:
            continue
        yield f"ggml {kind} ({name})", partial(_next, itertools.cycle(made))


def _next(products: Iterator[Product]) -> None:
    next(products).run()
