"""The check of an export: it is loaded back as its users load it, and compared with the policy of the checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpo_engine.exporting.adapter import Adapter
from vpo_engine.exporting.folder import ExportMismatchError
from vpo_engine.model_values import TextEmbedding
from vpo_engine.models.diffusers_folder import pipeline_index
from vpo_engine.models.registry import model_family
from vpo_engine.seeding import normal
from vpo_engine.video_model import VideoModel

TOLERANCE = 1e-4
"""The largest relative difference of two predictions in float32. An adapter that is merged, or whose scale stands
elsewhere, changes the order of sums, each by an ulp of 6e-8; a layer that is missing changes far more. Weights
themselves are compared bit for bit."""
_SIDES = 4, 6
"""Height and width of small videos, in units of the smallest side that the family can represent."""
_LATENT_FRAMES, _LATENT_SIDE, _TOKENS = 3, 8, 16
"""The largest size of the inputs: a prediction must take seconds on a CPU, whatever the size of the videos."""


def small_size(kind: str) -> dict[str, int]:
    """Return the settings of ``model`` for small videos of a family; none where the size is not a setting.

    They have at least two latent frames, and sides that differ.
    """
    card = model_family(kind).card
    if "model.height" not in card.supports:
        return {}
    rule = card.sizes
    return {
        "height": _SIDES[0] * rule.side,
        "width": _SIDES[1] * rule.side,
        "num_frames": rule.frames(1 + (rule.frame_offset == 0)),
    }


def fixed_inputs(model: VideoModel) -> tuple[Tensor, Tensor, TextEmbedding]:
    """Return random latents [1, C, T, H, W], a time [1] and text, which depend on nothing but the model's sizes.

    They are of at most 3 x 8 x 8 latents.
    """
    channels, frames, height, width = model.latent_shape
    shape = (1, channels, min(frames, _LATENT_FRAMES), min(height, _LATENT_SIDE), min(width, _LATENT_SIDE))
    rule = model.text_rule
    tokens = min(rule.max_tokens, _TOKENS) if rule.padding == "masked" else rule.max_tokens
    embeddings = normal((1, tokens, rule.channels), 0, "export", "text")
    text = TextEmbedding(embeddings, torch.ones(1, tokens, dtype=torch.bool)).to(model.device)
    latents = normal(shape, 0, "export", "latents").to(model.device)
    return latents, model.draw_timesteps(torch.tensor([0.5], device=model.device)), text


@torch.no_grad()
def fixed_prediction(model: VideoModel, network: nn.Module) -> Tensor:
    """Return what ``network`` predicts for ``fixed_inputs``, float32 [1, C, T, H, W] on the CPU."""
    return model.predict(_Plain(network), *fixed_inputs(model)).cpu()


class _Plain:
    """Calls a network that others have loaded without the engine's own arguments, which are None here."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        parameters = inspect.signature(network.forward).parameters.values()
        self._known = {parameter.name for parameter in parameters}
        self._any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        known = {
            name: value
            for name, value in kwargs.items()
            if self._any or name in self._known or value is not None
        }
        prediction: Tensor = self._network(*args, **known)
        return prediction


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Return the size of the difference over that of ``expected``."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def check_prediction(expected: Tensor, found: Tensor, folder: Path) -> float:
    """Return the relative error of an export's prediction; ExportMismatchError if it is too large."""
    error = relative_error(expected, found)
    if not error <= TOLERANCE:
        raise ExportMismatchError(
            f"the export does not compute what the policy computes: on the same inputs its prediction differs by "
            f"{error:.2g} of its size (at most {TOLERANCE:g} is rounding); it is kept in {folder} and must not be used"
        )
    return error


def check_same_weights(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ExportMismatchError, naming them, unless an export holds exactly these tensors."""
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        own, other = expected[name].float(), found[name].detach().float().cpu()
        if own.shape != other.shape:
            wrong.append(f"{name} is {list(other.shape)} in place of {list(own.shape)}")
        elif not torch.equal(own, other):
            wrong.append(f"{name} differs by up to {(own - other).abs().max():.2g}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ExportMismatchError(
            f"the export does not hold the weights of the policy: {'; '.join(sorted(wrong)[:3])}{more}; it is kept in "
            f"{folder} and must not be used"
        )


def sides(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter by name, for ``check_same_weights``."""
    return {
        f"{name}.lora_{side}": values
        for name, both in adapter.layers.items()
        for side, values in zip("AB", both, strict=True)
    }


def attached(network: nn.Module) -> Adapter:
    """Return the adapter that PEFT or diffusers has attached to a network, its scale in B."""
    layers = {}
    for name, module in network.named_modules():
        if not hasattr(module, "lora_A") or not module.lora_A:
            continue
        part: Any = module
        key = part.active_adapters[0]
        down, up = (getattr(part, kind)[key].weight.detach().float().cpu() for kind in ("lora_A", "lora_B"))
        layers[name] = (down, up * part.scaling[key])
    return Adapter(layers)


def load_pipeline(folder: Path, **parts: Any) -> Any:
    """Load a folder by the pipeline class that it names, in float32, without its text encoder and tokenizer.

    parts: modules that take the place of the folder's own. Errors are those of diffusers, as ExportMismatchError.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    index = pipeline_index(folder)
    unused = {
        name: None for name, value in index.items() if isinstance(value, list) and value[0] == "transformers"
    }
    try:
        return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **(unused | parts))
    except (ValueError, OSError, RuntimeError) as error:
        raise ExportMismatchError(f"diffusers does not load {folder}: {error}") from error
