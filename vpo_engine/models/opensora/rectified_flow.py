"""Rectified flow as Open-Sora 1.2 trains and samples with it.

Times run from 0 (clean) to ``num_timesteps`` (noise): x_t = (1 - t / 1000) * x0 + (t / 1000) * noise, and the
network predicts the velocity x0 - noise. Sources: opensora/schedulers/rf of hpcaitech/Open-Sora, tag v1.2.0.
Shape letters: B samples, C x T x H x W latent channels, frames, rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vpo_engine.model_values import SplitGuidance
from vpo_engine.models.guidance import mixed
from vpo_engine.models.solvers import EulerFlow

Predict = Callable[[Tensor, Tensor], Tensor]
"""A function of z [B, C, T, H, W] and t [B] that predicts the velocity [B, C, T, H, W]."""

BASE_PIXELS = 512 * 512


@dataclass(frozen=True)
class RectifiedFlow:
    """The schedule. Heights and widths are in pixels, frame counts are those of the video.

    num_timesteps: the time of pure noise.
    use_timestep_transform: shift times towards noise for large and long videos (the released recipe does).
    transform_scale: extra factor of that shift.
    geometry_dtype: in which the shift's ratio is computed. The released scripts carried sizes in the model's
    dtype, so bfloat16 repeats their times to the digit.
    """

    TARGET_SCALES: ClassVar[tuple[float, float]] = (1.0, -1.0)
    """The factors of latents and noise in the velocity that the network predicts, at all times."""

    num_timesteps: int = 1000
    use_timestep_transform: bool = True
    transform_scale: float = 1.0
    geometry_dtype: torch.dtype = torch.float32

    def timestep_transform(self, t: Tensor, height: float, width: float, num_frames: int) -> Tensor:
        """Map times, of any shape, of a 512 x 512 image to times that look equally noisy at this size.

        With r = sqrt(height * width / 512^2) * sqrt(frames) * transform_scale, where frames is 1 for an image
        and floor(num_frames / 17) * 5 otherwise: u -> r * u / (1 + (r - 1) * u), u = t / num_timesteps.
        """
        if num_frames != 1 and num_frames < 17:
            raise ValueError(
                f"num_frames={num_frames}: the timestep transform counts chunks of 17 frames, so it needs "
                "1 or at least 17; turn use_timestep_transform off for shorter clips"
            )
        size = torch.tensor([height, width, num_frames], dtype=self.geometry_dtype)
        latent_frames = size[2] if num_frames == 1 else size[2] // 17 * 5
        ratio = (size[0] * size[1] / BASE_PIXELS).sqrt() * latent_frames.sqrt() * self.transform_scale
        excess = float(ratio - 1)
        u = t / self.num_timesteps
        return float(ratio) * u / (1 + excess * u) * self.num_timesteps

    def draw_timesteps(self, u: Tensor, height: float, width: float, num_frames: int) -> Tensor:
        """Map uniform numbers in (0, 1), of any shape, to training times: logit-normal(0, 1), then the transform."""
        return self.timesteps_from_normal(torch.special.ndtri(u), height, width, num_frames)

    def timesteps_from_normal(self, z: Tensor, height: float, width: float, num_frames: int) -> Tensor:
        """Map standard normal numbers, of any shape, to training times, as the published code does."""
        t = torch.sigmoid(z) * self.num_timesteps
        return self.timestep_transform(t, height, width, num_frames) if self.use_timestep_transform else t

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t of latents [B, ...] at times t [B], in the widest of the dtypes."""
        kept, added = (scale.view(-1, *[1] * (latents.dim() - 1)) for scale in self.noising_scales(t))
        return kept * latents + added * noise

    def noising_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of latents and noise in x_t, each [B], at times t [B]."""
        kept = 1 - t / self.num_timesteps
        return kept, 1 - kept

    def target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Return the velocity that the network should predict, at any time."""
        return latents - noise

    def sampling_timesteps(
        self, steps: int, height: float, width: float, num_frames: int
    ) -> tuple[Tensor, Tensor]:
        """Return the times [steps] at which the network is asked, and the lengths [steps] of the steps.

        Both float32, CPU. Step i adds velocity * length[i]; the lengths sum to times[0] / num_timesteps.
        """
        if steps < 1:
            raise ValueError(f"steps={steps}: sampling needs at least 1 step")
        t = torch.tensor([(1.0 - i / steps) * self.num_timesteps for i in range(steps)])
        if self.use_timestep_transform:
            t = self.timestep_transform(t, height, width, num_frames)
        return t, (t - torch.cat([t[1:], t.new_zeros(1)])) / self.num_timesteps

    def solver(self, steps: int, height: float, width: float, num_frames: int) -> EulerFlow:
        """Return the Euler steps of ``sampling_timesteps``."""
        times, lengths = self.sampling_timesteps(steps, height, width, num_frames)
        return EulerFlow(times.tolist(), lengths.tolist(), self.num_timesteps)

    def training_loss(self, predict: Predict, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the mean squared velocity error of each sample, float32 [B].

        latents, noise: [B, C, T, H, W]; t: [B].
        """
        velocity = predict(self.add_noise(latents, noise, t), t)
        error = (velocity - self.target(latents, noise)).float().square()
        return error.flatten(1).mean(1)


def null_captions(text: Tensor, null_embedding: Tensor) -> Tensor:
    """Return as many null captions as there are captions in ``text`` [P, L, D], of the same shape and dtype.

    null_embedding: [max length, D]. Raise ValueError for text longer than the null caption.
    """
    length = text.shape[1]
    if null_embedding.shape[0] < length:
        raise ValueError(
            f"text has {length} tokens, but the null caption only {null_embedding.shape[0]}; "
            "encode prompts with at most the model's model_max_length tokens"
        )
    return null_embedding[:length].to(text.dtype).expand_as(text)


def caption_states(
    text: Tensor, null_embedding: Tensor, guidance: float, split: SplitGuidance | None = None
) -> Tensor:
    """Return the network's y of a guided prediction, [P or 2 P, 1, L, D].

    It holds text [P, L, D] and, unless guidance is 1, as many null captions after it; see ``null_captions``. split: one
    of the two only, of the half that this process computes.
    """
    if guidance == 1.0:
        return text[:, None]
    if split is not None:
        return (null_captions(text, null_embedding) if split.half else text)[:, None]
    return torch.cat([text, null_captions(text, null_embedding)])[:, None]


def guided_velocity(
    network: Callable[..., Tensor],
    z: Tensor,
    t: Tensor,
    text: Tensor,
    text_mask: Tensor | None,
    null_embedding: Tensor,
    guidance: float,
    **named: Any,
) -> Tensor:
    """Return the classifier-free guided velocity [B, C, T, H, W], both branches in one pass of 2 B samples.

    text [P, L, D], text_mask [P, L], null_embedding [max length, D]; each prompt is that of B / P samples next to each
    other. As in the published sampler, prompts come before nulls, and a null uses its prompt's mask. Guidance 1 gives
    the plain conditional prediction, from B samples. ``named`` (fps, height, width) goes to the network as it is. The
    network's further channels are not used, so they get no gradient.
    """
    captions = caption_states(text, null_embedding, guidance)
    return velocity_of(network, z, t, captions, text_mask, guidance, **named)


def velocity_of(
    network: Callable[..., Tensor],
    z: Tensor,
    t: Tensor,
    captions: Tensor,
    text_mask: Tensor | None,
    guidance: float,
    split: SplitGuidance | None = None,
    **named: Any,
) -> Tensor:
    """Return the ``guided_velocity`` from ``caption_states``, which a sampling loop makes once."""
    channels = z.shape[1]
    if guidance == 1.0:
        return network(z, t, captions, text_mask, **named)[:, :channels]
    if split is None:
        whole = network(torch.cat([z, z]), torch.cat([t, t]), captions, text_mask, **named)[:, :channels]
    else:
        whole = split.exchange(network(z, t, captions, text_mask, **named)[:, :channels])
    prompted, unprompted = whole.chunk(2)
    return mixed(prompted, unprompted, guidance)
