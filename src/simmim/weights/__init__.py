"""Read and write encoders: ours, the official SimMIM releases, timm's and Hugging Face's.

Whatever the source, its tensors get our names (`sources`), are fitted into a model that says what
it did with each of them (`fit`), and nothing in a file is run while it is opened (`files`).
"""

from simmim.weights.api import load_encoder, load_weights
from simmim.weights.files import find_checkpoint
from simmim.weights.fit import Report

__all__ = ["Report", "find_checkpoint", "load_encoder", "load_weights"]
