"""Ask a reward, before there is a video, which prompts and which sizes of videos it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def refusals(reward: object, prompts: Sequence[str]) -> dict[int, str]:
    """Return why a ``Reward``, or a scorer of images, refuses prompts, by their number; what it takes is left out.

    A reward says so by a method ``refuse_prompt(prompt) -> str | None``; one without it takes every prompt. The reward
    of another process is asked about all prompts at once, by its method ``refusals``.
    """
    together = getattr(reward, "refusals", None)
    if together is not None:
        found: dict[int, str] = together(prompts)
        return found
    ask = getattr(reward, "refuse_prompt", None)
    if ask is None:
        return {}
    answers = {row: ask(prompt) for row, prompt in enumerate(prompts)}
    return {row: answer for row, answer in answers.items() if answer is not None}


def size_refusal(reward: object, frames: int, height: int, width: int) -> str | None:
    """Return why the reward scores no videos of this size, or None if it does.

    A reward says so by a method ``refuse_size(frames, height, width) -> str | None``; one without it takes every size.
    """
    ask = getattr(reward, "refuse_size", None)
    reason: str | None = None if ask is None else ask(frames, height, width)
    return reason


def refusal(check: Callable[..., object], *arguments: object) -> str | None:
    """Return the text of the ValueError that ``check`` raises, or None if it raises none."""
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return None
