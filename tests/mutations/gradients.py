"""Mistakes in methods that follow the gradient of a reward: sampling, decoding, rewards and losses."""

SAMPLING = "vpo_engine/rollout/reward_gradient.py"
DECODING = "vpo_engine/models/opensora/vae_gradient.py"
DIFFUSERS = "vpo_engine/models/diffusers_model.py"
BASE = "vpo_engine/models/base.py"
FLOW = "vpo_engine/models/diffusers_flow.py"
SOLVERS = "vpo_engine/models/solvers.py"
SPRITES = "vpo_engine/rewards/sprites.py"
VIDEOSCORE = "vpo_engine/rewards/videoscore.py"
LOSSES = "vpo_engine/objectives/reward_losses.py"
CONSISTENCY = "vpo_engine/objectives/consistency.py"
VADER = "vpo_engine/vader.py"
INSTRUCT = "vpo_engine/instructvideo.py"
TURBO = "vpo_engine/t2v_turbo.py"

OF_SAMPLING = ("tests/rollout/test_reward_gradient.py", "tests/methods/test_baselines.py")
OF_DECODING = ("tests/models/test_decode_pixels.py",)
OF_PIXELS = ("tests/rewards/test_pixel_gradients.py",)
OF_NUMBERS = ("tests/methods/test_baselines.py",)
OF_RUNS = ("tests/wiring/test_gradient_methods.py",)

MUTATIONS = [
    (
        "gradients: steps are cut off from each other",
        SAMPLING,
        "before = latents\n",
        "before = latents = latents.detach()\n",
        OF_SAMPLING,
    ),
    (
        "gradients: no guidance",
        SAMPLING,
        "scale = settings.guidance if",
        "scale = 1.0 if",
        OF_SAMPLING,
    ),
    (
        "gradients: every prediction at the first time",
        SAMPLING,
        "solver.times[step], device",
        "solver.times[0], device",
        OF_SAMPLING,
    ),
    (
        "gradients: the clean prediction is one step on",
        SAMPLING,
        "state.step + 1).preview",
        "state.step + 1).latents",
        OF_SAMPLING,
    ),
    (
        "gradients: a partial chain is rounded down",
        SAMPLING,
        "math.floor(steps * (1 - strength) + 1e-9)",
        "math.ceil(steps * (1 - strength) - 1e-9)",
        OF_NUMBERS,
    ),
    (
        "gradients: a partial chain begins at rounded times",
        FLOW,
        "return 1000 * self.solver(steps).noise_level(step)",
        "return super()._time_before(steps, step)",
        OF_SAMPLING,
    ),
    (
        "gradients: UniPC of order 2 in the first correction of a partial chain",
        SOLVERS,
        "change = (clean - last_clean) * _FIRST_ORDER",
        "change = (clean - last_clean) * numbers.weights[-1]",
        ("tests/models/test_solvers.py",),
    ),
    (
        "gradients: frames in the order of the video",
        DECODING,
        "[places[number] for number in wanted]",
        "[places[number] for number in sorted(wanted)]",
        OF_DECODING,
    ),
    (
        "gradients: a chunk is decoded up to its wanted frames",
        DECODING,
        "[number - start for number in inside]",
        "[number - start - 1 for number in inside]",
        OF_DECODING,
    ),
    (
        "gradients: a causal video is decoded whole",
        DIFFUSERS,
        "latents = latents[:, :, : self.prefix(max(frames) + 1)[0]]",
        "pass",
        OF_DECODING,
    ),
    (
        "gradients: pixels are not clamped",
        BASE,
        "return (pixels.float() / 2 + 0.5).clamp(0, 1)",
        "return pixels.float() / 2 + 0.5",
        OF_DECODING,
    ),
    (
        "gradients: pixels that are not finite are scored",
        BASE,
        "if not bool(torch.isfinite(pixels).all()):",
        "if False:",
        OF_DECODING,
    ),
    (
        "gradients: the sprites reward sees levels of 0..1",
        SPRITES,
        "videos.movedim(2, 4) * 255, prompts",
        "videos.movedim(2, 4), prompts",
        OF_PIXELS,
    ),
    (
        "gradients: VideoScore looks at the first frames",
        VIDEOSCORE,
        "frames = videos[:, frame_indices(videos.shape[1], self.max_frames)]",
        "frames = videos[:, : self.max_frames]",
        OF_PIXELS,
    ),
    (
        "gradients: ReFL pushes rewards above the margin",
        LOSSES,
        "F.relu(margin - rewards)",
        "(margin - rewards)",
        OF_NUMBERS,
    ),
    (
        "gradients: VADER pushes rewards beyond the goal",
        LOSSES,
        "(rewards - self.value).abs().mean()",
        "(self.value - rewards).mean()",
        OF_RUNS,
    ),
    (
        "gradients: segments are divided by the sum of weights",
        LOSSES,
        "rewards = (scores * weights).mean(1)",
        "rewards = (scores * weights).sum(1) / weights.sum(1)",
        OF_NUMBERS,
    ),
    (
        "gradients: the Huber distance without its constant",
        CONSISTENCY,
        ".sqrt() - c).mean()",
        ".sqrt()).mean()",
        OF_NUMBERS,
    ),
    (
        "gradients: clean latents and noise are exchanged",
        CONSISTENCY,
        "(q * latents - s * prediction) / determinant",
        "(q * latents + s * prediction) / determinant",
        OF_RUNS,
    ),
    (
        "gradients: VADER has a gradient in all steps",
        VADER,
        "first = self.sampling.steps - self._last_steps(number)",
        "first = 0",
        OF_RUNS,
    ),
    (
        "gradients: InstructVideo has no last step",
        INSTRUCT,
        "stacked_embeddings(prompts), self.sampling.steps - 1",
        "stacked_embeddings(prompts), self.sampling.steps - 2",
        OF_RUNS,
    ),
    (
        "gradients: the student is the teacher",
        TURBO,
        "model.predict(self.reference, latents",
        "model.predict(model.network, latents",
        OF_RUNS,
    ),
    (
        "gradients: the teacher's guidance is w",
        TURBO,
        "self.own.guidance + 1)",
        "self.own.guidance)",
        OF_RUNS,
    ),
    (
        "gradients: the student learns through its target",
        TURBO,
        "with torch.no_grad():",
        "if True:",
        OF_RUNS,
    ),
]
