"""Read the published checkpoint files of the networks that metrics look through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from vpo_engine.metrics.networks.torchscript import is_script, read_script
from vpo_engine.weights import read_file


def read_state(path: Path, network: str, wrappers: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the weights in a checkpoint file, without the prefix ``module.`` of parallel training.

    ``wrappers``: keys under which the weights may lie in the file. Of a TorchScript archive, as OpenAI publishes CLIP,
    the weights are taken and the program is not run. Raise ValueError for a file that cannot be read or holds no
    weights.
    """
    content = read_script(path) if is_script(path) else read_file(path)
    for key in wrappers:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(each, Tensor) for each in content.values()):
        raise ValueError(
            f"{path} holds no weights of {network}: expected tensors by name"
            + (f", or under {' or '.join(wrappers)}" if wrappers else "")
            + "; fetch the published file again"
        )
    return {key.removeprefix("module."): weight for key, weight in content.items()}


def size_of(weights: Mapping[str, Tensor], key: str, dimension: int, network: str) -> int:
    """Return a size of the network, as one weight tells it. Raise ValueError where that weight is missing."""
    if key not in weights or weights[key].ndim <= dimension:
        raise ValueError(
            f"these are no weights of {network}, {key} is missing; give the checkpoint of {network}"
        )
    return weights[key].shape[dimension]


def depth_of(weights: Mapping[str, Tensor], blocks: str) -> int:
    """Return how many blocks there are under keys that begin with ``blocks`` and a number."""
    numbers = {key.removeprefix(blocks).partition(".")[0] for key in weights if key.startswith(blocks)}
    return len(numbers)
