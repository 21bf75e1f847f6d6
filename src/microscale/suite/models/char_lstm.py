"""A character language model of two LSTM layers, in the manner of char-rnn-tensorflow.

The checkpoint is `charrnn-bronte-lstm/model.safetensors`. TensorFlow's BasicLSTMCell adds 1 to the
forget gate; here that is part of the bias.
"""

from pathlib import Path

from torch import Tensor, nn

from microscale.suite.models.checkpoint import expect, read_tensors
from microscale.suite.models.recurrent import lstm_state

CHARACTERS, WIDTH, LAYERS = 108, 128, 2
FORGET_BIAS = 1.0
ORDER = "igfo"
"""Gates in the checkpoint: input, candidate, forget, output."""


class CharacterLSTM(nn.Module):
    """Character ids [streams, steps] to logits [streams, steps, 108], from a zero state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=LAYERS, batch_first=True)
        self.output = nn.Linear(WIDTH, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        """Predict each next character."""
        hidden, _ = self.lstm(self.embedding(characters))
        logits: Tensor = self.output(hidden)
        return logits


def load(folder: Path) -> CharacterLSTM:
    """The model with the weights of `folder`."""
    path = folder / "model.safetensors"
    tensors, model = read_tensors(path), CharacterLSTM()
    expect(tensors, SHAPES, path, "CharacterLSTM")
    state = {name: tensors[name] for name in SHAPES if not name.startswith("lstm.")}
    for layer in range(LAYERS):
        bias = tensors[f"lstm.{layer}.bias"].clone()
        bias[ORDER.index("f") * WIDTH :][:WIDTH] += FORGET_BIAS
        weight = tensors[f"lstm.{layer}.weight"]
        parts = lstm_state(f"l{layer}", weight, bias, WIDTH, ORDER)
        state |= {f"lstm.{name}": part for name, part in parts.items()}
    model.load_state_dict(state)
    return model.eval()


SHAPES: dict[str, tuple[int, ...]] = {
    "embedding.weight": (CHARACTERS, WIDTH),
    "output.weight": (CHARACTERS, WIDTH),
    "output.bias": (CHARACTERS,),
    **{f"lstm.{layer}.weight": (4 * WIDTH, 2 * WIDTH) for layer in range(LAYERS)},
    **{f"lstm.{layer}.bias": (4 * WIDTH,) for layer in range(LAYERS)},
}
"""The tensors of the checkpoint."""
