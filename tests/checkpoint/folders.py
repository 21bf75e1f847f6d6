"""Small safetensors folders for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Weights as a small language model stores them."""
    torch.manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (48, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.self_attn.q_proj.bias": (64,),
        "model.layers.0.mlp.experts.gate_up_proj": (2, 128, 64),
        "model.layers.0.mlp.gate.weight": (2, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (48, 64),
    }
    found = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return found | {"model.steps": torch.tensor([7])}


def write_folder(path: Path, content: dict[str, Tensor], shards: int = 1, **config: Any) -> Path:
    """Write the tensors as so many shards with their index."""
    path.mkdir()
    if config:
        (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(content, path / "model.safetensors", {"format": "pt"})
        return path
    names = {
        n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(content)
    }
    for file in set(names.values()):
        save_file({n: x for n, x in content.items() if names[n] == file}, path / file)
    index = {"metadata": {}, "weight_map": names}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
