"""Rewards of the user's own: found by ``package.module:Class`` or an entry point, checked, and made.

``docs/rewards.md`` is the page for those who write one.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from vpo_engine.protocols import Reward
from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.combine import MOTION
from vpo_engine.rewards.frames import check_video_pixels, check_videos
from vpo_engine.rewards.kinds import ENTRY_POINTS
from vpo_engine.rewards.refusals import refusals, size_refusal
from vpo_engine.rewards.videos import FileReward, Videos, whole

_HELP = "see docs/rewards.md"
_TAKEN = {MOTION, "selected", "gap"}
"""Names of numbers that the engine puts beside a reward's dimensions."""
_MADE_WITH = ("path", "device", "dtype", "fps")
"""The values that a constructor may ask for by the name of a parameter, beside the reward's settings."""


def own_class(kind: str) -> Any:
    """Return the class of a reward of the user's own.

    Raise ValueError for a module or a class that is not there, and for a class that is no reward.
    """
    place = kind if ":" in kind else entry_points(group=ENTRY_POINTS)[kind].value
    module_name, _, name = place.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"reward {kind!r}: {module_name} cannot be imported, because {error.name} is missing; install it"
            ) from error
        raise ValueError(
            f"reward {kind!r}: there is no module {error.name}; install its package, or start from the folder that it "
            "lies in by python -m (vpo looks there only with PYTHONPATH=.)"
        ) from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        own = [
            key for key, value in vars(module).items() if inspect.isclass(value) and hasattr(value, "score")
        ]
        raise ValueError(
            f"reward {kind!r}: {module_name} has no class {name or 'after the colon'}; its classes with a score method "
            f"are {', '.join(own) or 'none'}"
        )
    _check_class(kind, found)
    return found


def _check_class(kind: str, found: Any) -> None:
    if not callable(getattr(found, "score", None)):
        raise ValueError(
            f"reward {kind!r}: {found.__name__} has no method score(videos, prompts), which returns a tensor of scores "
            f"for each dimension; {_HELP}"
        )
    names: Any = getattr(found, "dimensions", None)
    fits = isinstance(names, (tuple, list)) and all(isinstance(name, str) for name in names)
    if not fits or not names or len(set(names)) < len(names):
        raise ValueError(
            f"reward {kind!r}: {found.__name__}.dimensions is {names!r}, expected the different names of what it "
            f'scores, as a tuple in the class: dimensions = ("sharpness",); {_HELP}'
        )
    for name in _TAKEN & set(names):
        raise ValueError(
            f"reward {kind!r}: {found.__name__}.dimensions has {name!r}, which is the engine's name of a number of its "
            "own; call that dimension otherwise"
        )


def own_card(kind: str) -> RewardCard:
    """Return what is known of a reward of the user's own: its dimensions, whether it reads the prompt, and whether it
    has ``score_pixels``, which passes gradients to pixels."""
    found = own_class(kind)
    return RewardCard(
        name=kind,
        dimensions=dict.fromkeys(found.dimensions, (None, None)),
        frames="its own choice",
        resolution="its own choice",
        reads_prompt=bool(getattr(found, "reads_prompt", True)),
        differentiable=callable(getattr(found, "score_pixels", None)),
        parameters=0,
        licence="its author's",
        source=f"{found.__module__}:{found.__qualname__}",
    )


def own_parameters(kind: str) -> tuple[str, ...]:
    """Return the names of the parameters with which the class is made."""
    return tuple(inspect.signature(own_class(kind)).parameters)


def check_own(kind: str, path: object, settings: Mapping[str, Any]) -> None:
    """ValueError for a path or a setting that the class does not take, or for a parameter that is never given."""
    parameters = inspect.signature(own_class(kind)).parameters
    for name in ([] if path is None else ["path"]) + list(settings):
        if name not in parameters:
            raise ValueError(
                f"reward {kind!r} takes no {name}: its class is made with {', '.join(parameters) or 'nothing'}; leave "
                f"{name} out, or add a parameter of this name to the class"
            )
    given = {*_MADE_WITH, *settings} - ({"path"} if path is None else set())
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in given:
            path_is_missing = "set reward.path (--reward-path of rank)"
            remedy = path_is_missing if name == "path" else f"give the parameter a default; {_HELP}"
            raise ValueError(f"reward {kind!r} needs {name}: {remedy}")


def build_own(kind: str, given: Mapping[str, Any]) -> FileReward:
    """Make the reward with those of ``given`` (path, device, dtype, fps and settings) that its class takes."""
    found = own_class(kind)
    taken = inspect.signature(found).parameters
    reward = found(**{name: value for name, value in given.items() if name in taken})
    with_gradients = callable(getattr(reward, "score_pixels", None))
    return _CheckedGradients(kind, reward) if with_gradients else _Checked(kind, reward)


class _Checked:
    """A reward of the user's own whose scores are checked: a wrong one stops the run instead of becoming data."""

    def __init__(self, kind: str, reward: Reward) -> None:
        self._kind, self._reward = kind, reward
        self.dimensions = tuple(reward.dimensions)
        network = getattr(reward, "network", None)
        self.network = network if isinstance(network, nn.Module) else None

    def refusals(self, prompts: Sequence[str]) -> dict[int, str]:
        """Return why the reward refuses prompts, by their number. ValueError if it answers with anything but a text."""
        found = refusals(self._reward, prompts)
        for row, reason in found.items():
            if not isinstance(reason, str):
                raise ValueError(
                    f"reward {self._kind!r}: refuse_prompt({prompts[row]!r}) returned {reason!r}, expected a text that "
                    f"says why the prompt is refused, or None; {_HELP}"
                )
        return found

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why the reward refuses a size. ValueError if it answers with anything but a text."""
        reason: object = size_refusal(self._reward, frames, height, width)
        if reason is None or isinstance(reason, str):
            return reason
        raise ValueError(
            f"reward {self._kind!r}: refuse_size({frames}, {height}, {width}) returned {reason!r}, expected a text "
            f"that says why videos of this size are refused, or None; {_HELP}"
        )

    @torch.no_grad()
    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the reward's scores, float32 [B]. ValueError for anything but a finite number for each video."""
        check_videos(videos, prompts)
        return self._checked(self._reward.score(whole(videos), prompts), prompts)

    def _checked(self, scores: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return what the reward made of videos with these prompts, float32 [B]; raise ValueError as ``score`` does."""
        if not isinstance(scores, Mapping) or set(scores) != set(self.dimensions):
            returned = sorted(scores) if isinstance(scores, Mapping) else type(scores).__name__
            raise ValueError(
                f"reward {self._kind!r} returned {returned}, expected a tensor for each of {', '.join(self.dimensions)}"
            )
        for name, values in scores.items():
            if not isinstance(values, Tensor) or tuple(values.shape) != (len(prompts),):
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    f"reward {self._kind!r} returned {got} for {name}, expected a tensor of shape ({len(prompts)},): "
                    "one number for each video"
                )
            if bool((~values.isfinite()).any()):
                row = int((~values.isfinite()).nonzero()[0, 0])
                raise ValueError(
                    f"reward {self._kind!r} gave {values[row].item()} in {name} for video {row} ({prompts[row]!r}), "
                    "expected a finite number"
                )
        return {name: scores[name].float() for name in self.dimensions}


class _CheckedGradients(_Checked):
    """A reward of the user's own that has ``score_pixels``."""

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the reward's scores of float videos [B, F, 3, H, W] in 0..1, with gradients; errors as ``score``'s."""
        check_video_pixels(videos, prompts)
        reward: Any = self._reward
        return self._checked(reward.score_pixels(videos, prompts), prompts)
