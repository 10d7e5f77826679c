"""Checks of a family of diffusers against the pipeline of a folder: the same noise and prompts on both sides."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpo_engine.config import Config
from vpo_engine.exporting.check import check_same_weights, relative_error
from vpo_engine.model_checks.own import GUIDANCE, PROMPT, ROUNDING, STEPS, clean_and_noise, noised, target
from vpo_engine.model_checks.record import (
    Call,
    Recording,
    Sampling,
    record_calls,
    record_decoded,
    run_pipeline,
)
from vpo_engine.model_checks.sizes import frame_rule, side_rule
from vpo_engine.model_checks.table import Finding, Table
from vpo_engine.model_values import SamplerSettings, SamplerState
from vpo_engine.models.diffusers_folder import pipeline_index
from vpo_engine.models.diffusers_model import DiffusersModel
from vpo_engine.video_model import VideoModel

UNCLEAN = "  A  red &amp;amp; blue\ncat "
"""A prompt that pipelines which clean their prompts change."""
_PARTS = ("transformer", "vae", "text_encoder")


def class_checks(table: Table, family: type[VideoModel], folder: Path) -> None:
    """Compare the classes that the family states with those of the folder, before anything is loaded."""
    index = pipeline_index(folder)
    pipelines = family.card.pipelines
    name = index.get("_class_name")
    table.check(
        "class of the pipeline",
        "card.pipelines",
        lambda: Finding(float(name not in pipelines), 0.0, f"the folder is of a {name}"),
    )
    if not issubclass(family, DiffusersModel):
        return
    for part in _PARTS:
        stated, held = getattr(family.facts, part), index.get(part, [None, None])[1]
        note = f"the folder holds a {held}, and the family states {stated}"
        finding = Finding(float(stated != held), 0.0, note)
        table.check(f"class of the {part}", f"facts.{part}", lambda finding=finding: finding)  # type: ignore[misc]


def pipeline_checks(table: Table, model: VideoModel, config: Config, folder: Path) -> None:
    """Add all checks against the pipeline of ``folder``, in the order in which a sampling loop needs them."""
    assert isinstance(model, DiffusersModel), "a family with a pipeline derives from DiffusersModel"
    pipeline = _load(folder, model.device)
    both = _Both(model, pipeline)
    sizes = model.card.sizes
    check = table.check
    check("weights", "load", both.weights)
    check("strides", "strides", both.strides)
    check("frame rule", "card.sizes (frame_step, frame_offset)", lambda: frame_rule(pipeline, sizes))
    check(
        "side rule",
        "card.sizes.side",
        lambda: side_rule(config, sizes.side, lambda size: both.sampled_size(size)),
        ["strides"],
    )
    check("latent size and VAE encoding", "strides or latent_size", both.encoding, ["strides"])
    chain = ["weights", "frame rule", "side rule", "strides"]
    check("layout", "facts.layout (to_layout, from_layout)", both.layout, chain)
    check("text length", "text_size", both.text_length, chain)
    check("text", "facts.encoder_mask or text encoder", both.text, ["text length"])
    check("text padding", "facts.padding", both.padding, ["text"])
    check("text cleaning", "rewrite", both.cleaning, ["text padding"])
    check("times of the steps", "solver", both.solver_times, chain)
    check("times for the network", "network_time", both.network_times, ["times of the steps"])
    check("noised latents", "noising_scales", both.noising, ["times of the steps", "layout"])
    check("target sign and time scale", "target_scales", both.target, ["noised latents"])
    asked = ["layout", "text padding", "times for the network"]
    check("other arguments", "arguments", both.arguments, asked)
    check("prediction", "predict or from_layout", both.prediction, ["other arguments"])
    check("guidance order", "facts.negative_first", both.guidance_order, ["prediction"])
    check("one step", "solver", both.one_step, ["prediction", "target sign and time scale"])
    check("guidance", "predict, null_text or negative prompt", both.guidance, ["one step", "text cleaning"])
    check("several steps", "solver", both.several_steps, ["guidance"])
    check("latents for the VAE", "denormalised", both.normalisation, ["layout"])
    check("frames (of 255)", "pixels or to_video", both.frames, ["latents for the VAE"])


def _load(folder: Path, device: torch.device) -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipeline_index(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class _Both:
    """A model and the pipeline of the same folder. Each method is a check."""

    def __init__(self, model: DiffusersModel, pipeline: Any) -> None:
        self._model, self._pipeline = model, pipeline
        setup = model.setup
        size = (setup.num_frames, setup.height, setup.width)
        self._settings = Sampling(PROMPT, setup.negative_prompt, *size, model.pipeline_arguments)
        model.prepare([PROMPT, UNCLEAN])

    # --- what was recorded ---------------------------------------------------------------------------------

    @cached_property
    def _plain(self) -> Recording:
        """The pipeline's loop without guidance, from noise that it has drawn itself."""
        return run_pipeline(self._pipeline, self._settings, steps=STEPS, guidance=1.0)

    @cached_property
    def _scheduler(self) -> Any:
        """The pipeline's scheduler with the times of that loop, before its first step."""
        assert len(self._plain.calls) == STEPS
        scheduler = self._plain.scheduler
        scheduler._begin_index = scheduler._step_index = None
        return scheduler

    @cached_property
    def _guided(self) -> Recording:
        latents = self._plain.calls[0].latents
        return run_pipeline(self._pipeline, self._settings, steps=STEPS, guidance=GUIDANCE, latents=latents)

    @property
    def _noise(self) -> Tensor:
        return self._model.from_layout(self._plain.calls[0].latents)

    def _asked(self, guidance: float = 1.0, prompt: str = PROMPT) -> Call:
        """Return the family's first call of the network."""
        model, calls = self._model, list[Call]()
        times = torch.tensor([model.solver(STEPS).times[0]], device=model.device)
        with record_calls(model.network, calls), torch.no_grad():
            model.predict(model.network, self._noise, times, model.embed([prompt]), guidance)
        return calls[0]

    def _latents(self, guidance: float, stop: int) -> Tensor:
        model = self._model
        settings = SamplerSettings(STEPS, guidance)
        start: SamplerState = model.start(self._noise)
        return model.denoise(model.network, start, model.embed([PROMPT]), settings, stop).latents

    def sampled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size of the frames that the pipeline makes when it is asked for ``size``."""
        frames = run_pipeline(self._pipeline, self._settings, steps=2, guidance=1.0, size=size).frames
        assert frames is not None
        return frames.shape[1], frames.shape[2]

    # --- parts and sizes -----------------------------------------------------------------------------------

    def weights(self) -> Finding:
        for own, other in (
            (self._model.network, self._pipeline.transformer),
            (self._model.vae, self._pipeline.vae),
        ):
            held = {name: tensor.detach().cpu() for name, tensor in other.state_dict().items()}
            check_same_weights(held, own.state_dict(), Path("the model as the family loads it"))
        return Finding(0.0, 0.0, "")

    def strides(self) -> Finding:
        own = self._model.strides(self._model.setup.vae)
        other = strides_of(self._pipeline)
        return Finding(
            float(own != other), 0.0, f"a latent stands for {other} frames and pixels, the family says {own}"
        )

    @torch.no_grad()
    def encoding(self) -> Finding:
        """Encode a video: its latents must have the shape that the family says."""
        frames, height, width = self._settings.frames, self._settings.height, self._settings.width
        video = torch.linspace(-1, 1, width, device=self._model.device).expand(1, 3, frames, height, width)
        found = tuple(self._pipeline.vae.encode(video.contiguous()).latent_dist.mode().shape[1:])
        note = f"the VAE makes latents of {found}, the family says {self._model.latent_shape}"
        return Finding(float(found != self._model.latent_shape), 0.0, note)

    # --- what the network is asked -------------------------------------------------------------------------

    def layout(self) -> Finding:
        theirs = self._plain.calls[0].latents
        own = self._model.to_layout(torch.zeros(1, *self._model.latent_shape, device=theirs.device))
        if own.shape != theirs.shape:
            note = f"the network takes latents as {list(theirs.shape)}, the family gives {list(own.shape)}"
            return Finding(1.0, 0.0, note)
        there = self._model.to_layout(self._model.from_layout(theirs))
        return Finding(relative_error(theirs, there), 0.0, "from_layout does not undo to_layout")

    def text_length(self) -> Finding:
        theirs, own = self._plain.calls[0].text.shape[1], self._model.text_rule.max_tokens
        return Finding(abs(theirs - own), 0.0, f"the network gets {theirs} tokens, the family says {own}")

    def text(self) -> Finding:
        tokens = len(self._pipeline.tokenizer(PROMPT).input_ids)
        own, theirs = (call.text[:, :tokens] for call in (self._asked(), self._plain.calls[0]))
        return Finding(relative_error(theirs, own), ROUNDING, "the embeddings of a prompt's tokens differ")

    def padding(self) -> Finding:
        return self._text_finding(self._asked(), self._plain.calls[0], "what stands behind a prompt differs")

    def cleaning(self) -> Finding:
        theirs = run_pipeline(self._pipeline, self._settings, steps=2, guidance=1.0, prompt=UNCLEAN)
        own = self._asked(prompt=UNCLEAN)
        return self._text_finding(own, theirs.calls[0], f"the embeddings of {UNCLEAN!r} differ")

    def _text_finding(self, own: Call, theirs: Call, note: str) -> Finding:
        """Compare texts as the network sees them: masked tokens do not count."""
        lengths = [
            call.text.shape[1] if call.mask is None else int(call.mask.sum()) for call in (own, theirs)
        ]
        if lengths[0] != lengths[1]:
            note = f"the network attends to {lengths[1]} tokens, the family gives {lengths[0]}"
            return Finding(1.0, ROUNDING, note)
        error = relative_error(theirs.text[:, : lengths[0]], own.text[:, : lengths[0]])
        return Finding(error, ROUNDING, note)

    def solver_times(self) -> Finding:
        own = torch.tensor(list(self._model.solver(STEPS).times))
        theirs = self._scheduler.timesteps.cpu().double()
        if own.shape != theirs.shape:
            return Finding(1.0, 0.0, f"the pipeline makes {len(theirs)} steps, the family {len(own)}")
        note = f"steps are at {_shown(theirs)}, the family says {_shown(own)}"
        return Finding(float((own - theirs).abs().max()), 1.0, note)  # schedulers may drop what is below 1

    def network_times(self) -> Finding:
        own = self._model.network_time(
            torch.tensor(list(self._model.solver(STEPS).times), device=self._model.device)
        )
        theirs = torch.stack([call.time.float().flatten()[0] for call in self._plain.calls])
        note = f"the network is told {_shown(theirs)}, by the family {_shown(own)}"
        return Finding(float((own.float() - theirs).abs().max()), 1e-3, note)

    def arguments(self) -> Finding:
        own, theirs = self._asked().others, self._plain.calls[0].others
        wrong = [f"{name} is missing" for name in theirs.keys() - own.keys()]
        wrong += [f"{name} is unexpected" for name in own.keys() - theirs.keys()]
        for name in own.keys() & theirs.keys() - {"encoder_attention_mask"}:  # compared with the text
            if not _alike(own[name], theirs[name]):
                wrong.append(f"{name} is {own[name]} in place of {theirs[name]}")
        return Finding(float(len(wrong)), 0.0, "; ".join(sorted(wrong)))

    # --- the schedule --------------------------------------------------------------------------------------

    def noising(self) -> Finding:
        clean, noise = clean_and_noise(self._model)
        scheduler = self._scheduler
        add: Callable[..., Tensor] | None = getattr(scheduler, "add_noise", None)
        errors = []
        for time, told in zip(self._model.solver(STEPS).times, scheduler.timesteps, strict=True):
            at = told.reshape(1)
            theirs = scheduler.scale_noise(clean, at, noise) if add is None else add(clean, noise, at)
            errors.append(relative_error(theirs, noised(self._model, clean, noise, time)))
        limit = ROUNDING + self._between_times()
        return Finding(max(errors), limit, "noised latents are not those of the scheduler")

    def _between_times(self) -> float:
        """Return how much noised latents change within one time, for schedulers that round times down; else 0."""
        if self._scheduler.timesteps.is_floating_point():
            return 0.0
        model, (clean, noise) = self._model, clean_and_noise(self._model)
        return max(
            relative_error(noised(model, clean, noise, time), noised(model, clean, noise, time - 1))
            for time in model.solver(STEPS).times
        )

    def target(self) -> Finding:
        """Let the scheduler walk with exact predictions: it must stay on the line from noise to clean latents."""
        model, (clean, noise) = self._model, clean_and_noise(self._model)
        times = list(model.solver(STEPS).times)
        steps = iter(times)

        def oracle(whole: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor]:
            return (model.to_layout(target(model, clean, noise, next(steps))),)

        start = model.to_layout(noised(model, clean, noise, times[0]))
        made = run_pipeline(
            self._pipeline, self._settings, steps=STEPS, guidance=1.0, latents=start, oracle=oracle
        )
        errors = [
            relative_error(noised(model, clean, noise, time), model.from_layout(latents))
            for time, latents in zip(times[1:], made.latents, strict=False)
        ]
        note = "with these targets as predictions, the scheduler does not lead to the clean latents"
        # The start and the latents that are compared are both noised at whole times.
        return Finding(max(errors), ROUNDING + 2 * self._between_times(), note)

    # --- predictions and steps -----------------------------------------------------------------------------

    def prediction(self) -> Finding:
        model = self._model
        times = torch.tensor([model.solver(STEPS).times[0]], device=model.device)
        with torch.no_grad():
            own = model.predict(model.network, self._noise, times, model.embed([PROMPT]))
        theirs = model.from_layout(self._plain.calls[0].prediction)
        return Finding(relative_error(theirs, own), ROUNDING, "the prediction for the same inputs differs")

    def guidance_order(self) -> Finding:
        """Find the prompt's row in a guided batch on both sides; pipelines with two passes have no order."""
        theirs, own = self._guided.calls[0], self._asked(GUIDANCE)
        if len(theirs.text) == 1:
            return Finding(0.0, 0.0, "")
        rows = [self._prompt_row(call) for call in (own, theirs)]
        note = f"the prompt is row {rows[1]} of the pipeline's batch, and row {rows[0]} of the family's"
        return Finding(float(rows[0] != rows[1]), 0.0, note)

    def _prompt_row(self, call: Call) -> int:
        tokens = len(self._pipeline.tokenizer(PROMPT).input_ids)
        prompt = self._plain.calls[0].text[0, :tokens]
        return min(range(len(call.text)), key=lambda row: float((call.text[row, :tokens] - prompt).norm()))

    def one_step(self) -> Finding:
        return self._latents_finding(self._plain, 1.0, 1, "latents after one step without guidance differ")

    def guidance(self) -> Finding:
        return self._latents_finding(self._guided, GUIDANCE, 1, "latents after one step with guidance differ")

    def several_steps(self) -> Finding:
        return self._latents_finding(self._guided, GUIDANCE, STEPS, f"latents after {STEPS} steps differ")

    def _latents_finding(self, theirs: Recording, guidance: float, stop: int, note: str) -> Finding:
        expected = self._model.from_layout(theirs.latents[stop - 1])
        return Finding(relative_error(expected, self._latents(guidance, stop)), ROUNDING, note)

    # --- the VAE -------------------------------------------------------------------------------------------

    def normalisation(self) -> Finding:
        decoded: list[Tensor] = []
        with record_decoded(self._model.vae, decoded):
            self._model.decode(self._model.from_layout(self._guided.latents[-1]))
        [theirs] = self._guided.decoded
        return Finding(
            relative_error(theirs, decoded[0]), ROUNDING, "the latents that the VAE decodes differ"
        )

    def frames(self) -> Finding:
        [own] = self._model.decode(self._model.from_layout(self._guided.latents[-1]))
        theirs = self._guided.frames
        assert theirs is not None
        if own.shape != theirs.shape:
            note = f"the pipeline makes videos of {list(theirs.shape)}, the family {list(own.shape)}"
            return Finding(255.0, 1.0, note)
        error = float((own.cpu().int() - theirs.round().int()).abs().max())
        return Finding(error, 1.0, "the frames of the same latents differ")


def strides_of(pipeline: Any) -> tuple[int, int]:
    """Return how many frames, and how many pixels of a side, a latent of a diffusers pipeline stands for."""
    names = ("vae_scale_factor_{}", "vae_{}_compression_ratio")
    found = []
    for of in ("temporal", "spatial"):
        held = [getattr(pipeline, name.format(of), None) for name in names]
        found.append(next(int(value) for value in held if value is not None))
    return found[0], found[1]


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        one, other = torch.as_tensor(one).float(), torch.as_tensor(other).float()
        return one.shape == other.shape and relative_error(other.cpu(), one.cpu()) <= ROUNDING
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(_alike(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) or isinstance(other, float):
        return abs(one - other) <= 1e-6 * abs(other)
    return bool(one == other)


def _shown(times: Tensor) -> str:
    return ", ".join(f"{float(time):.4g}" for time in times.flatten()[:STEPS])
