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

FRAMES = "vpo_engine/rollout/scored_frames.py"
GIVEN = "vpo_engine/rollout/given_videos.py"
GRADIENT = "vpo_engine/reward_gradient_method.py"

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
    (
        "gradients: of a file of pairs the losers are the given videos",
        GIVEN,
        "PreferredFiles(each.winner, each.winner, each.prompt, each.place)",
        "PreferredFiles(each.loser, each.loser, each.prompt, each.place)",
        ("tests/wiring/test_methods.py::test_videos_of_a_file_of_pairs_are_its_winners",),
    ),
    (
        "gradients: files of given videos in the same order for every seed",
        GIVEN,
        'generator(seed, "given videos")',
        'generator(0, "given videos")',
        ("tests/wiring/test_gradient_methods.py::test_given_videos_are_the_winners_of_a_file",),
    ),
    (
        "gradients: the same videos drawn for every seed",
        GIVEN,
        "return DrawnVideos(prompts, seed)",
        "return DrawnVideos(prompts, 0)",
        ("tests/wiring/test_gradient_methods.py::test_drawn_videos_follow_the_seed_and_the_place",),
    ),
    (
        "gradients: T2V-Turbo lowers its second reward",
        TURBO,
        "loss - self.own.second.weight * others.mean()",
        "loss + self.own.second.weight * others.mean()",
        ("tests/wiring/test_gradient_methods.py::test_t2v_turbo_follows_a_second_reward_too",),
    ),
    (
        "gradients: T2V-Turbo's second reward sees the frames of the first",
        TURBO,
        "self._frames(self.second_frames, prompts)",
        "self._frames(self.frames, prompts)",
        ("tests/wiring/test_gradient_methods.py::test_a_second_reward_of_videos_sees_all_frames",),
    ),
    (
        "gradients: instructvideo.attenuation has no effect",
        INSTRUCT,
        "decay = 1.0 if self.own.attenuation is None else self.own.attenuation",
        "decay = 1.0",
        ("tests/wiring/test_gradient_methods.py::test_instructvideo_scores_a_frame_of_each_segment",),
    ),
    (
        "gradients: every video of a run has the same frames scored",
        INSTRUCT,
        '"segments", prompt.position)',
        '"segments", 0)',
        ("tests/wiring/test_gradient_methods.py::test_instructvideo_scores_a_frame_of_each_segment",),
    ),
    (
        "gradients: the frames of all segments are of the first one",
        FRAMES,
        "span * part + integer(span, seed, *key, part)",
        "integer(span, seed, *key, part)",
        (
            "tests/wiring/test_gradient_methods.py::test_instructvideo_scores_a_frame_of_each_segment",
            "tests/methods/test_baselines.py",
        ),
    ),
    (
        "gradients: the same place in every segment",
        FRAMES,
        "integer(span, seed, *key, part)",
        "integer(span, seed, *key)",
        ("tests/methods/test_baselines.py::test_every_segment_has_a_frame_of_its_own_draw",),
    ),
    (
        "gradients: the same frames are scored in every step",
        FRAMES,
        'integer(2**62, seed, *key, "frames")',
        'integer(2**62, seed, "frames")',
        ("tests/methods/test_baselines.py::test_the_frames_of_a_step_are_drawn_from_all_and_anew",),
    ),
    (
        "gradients: VADER's second reward has the goal of the first",
        VADER,
        'vader_goal(self.own.second.kind, "auto", None)',
        'vader_goal(self.config.reward.kind, "auto", None)',
        ("tests/wiring/test_gradient_methods.py::test_vaders_second_reward_has_a_goal_of_its_own",),
    ),
    (
        "gradients: VADER scores the same random frames in every step",
        VADER,
        'random_frames(self.frames, self.model, self.config.seed, "vader", number)',
        'random_frames(self.frames, self.model, self.config.seed, "vader", 0)',
        (
            "tests/wiring/test_gradient_methods.py::test_vader_decodes_so_many_random_frames_anew_in_every_step",
        ),
    ),
    (
        "gradients: vader.frames has no effect",
        VADER,
        "self.frames = frames_of_step(kind, self.own.frames, default=1)",
        "self.frames = frames_of_step(kind, None, default=1)",
        (
            "tests/wiring/test_gradient_methods.py::test_vader_decodes_so_many_random_frames_anew_in_every_step",
        ),
    ),
    (
        "gradients: VADER's goals of PickScore and HPSv2.1 exchanged",
        LOSSES,
        '"hpsv2_1": HPS, "pickscore": PICKSCORE',
        '"hpsv2_1": PICKSCORE, "pickscore": HPS',
        ("tests/methods/test_baselines.py",),
    ),
    (
        "gradients: vader.scale ignored beside the published goal",
        LOSSES,
        "return published if scale is None else replace(published, scale=scale)",
        "return published",
        ("tests/methods/test_baselines.py",),
    ),
    (
        "gradients: ReFL's step is drawn once for the whole run",
        "vpo_engine/refl.py",
        'self.config.seed, "refl", self._step_number(prompts)',
        'self.config.seed, "refl", 0',
        ("tests/wiring/test_methods.py::test_refl_draws_its_step_anew_in_every_step",),
    ),
    (
        "gradients: the log's means are sums over the processes",
        GRADIENT,
        "(sums / self.processes.count).tolist()",
        "sums.tolist()",
        (
            "tests/wiring/test_gradient_methods.py::test_the_log_of_a_method_without_pairs_is_a_mean_over_processes",
        ),
    ),
    (
        "gradients: the two branches of guidance count as one input",
        GRADIENT,
        "videos * len(steps) * (1 if self.sampling.guidance == 1.0 else 2)",
        "videos * len(steps)",
        (
            "tests/wiring/test_gradient_methods.py::test_the_log_counts_the_inputs_with_and_without_a_gradient",
        ),
    ),
]
