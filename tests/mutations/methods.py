"""Mistakes in the methods beside OnlineVPO: their gradients, their pairs, what they refuse, and how they go on."""

FOLLOWED = ("tests/wiring/test_methods.py",)
OFFLINE = ("tests/wiring/test_offline_pairs.py",)
ENCODED = ("tests/models/test_encode.py",)
GRADIENT = "vpo_engine/reward_gradient_method.py"
REFL = "vpo_engine/refl.py"
STORED = "vpo_engine/rollout/preference_dataset.py"
FILES = "vpo_engine/rollout/preferred_files.py"
SETTINGS = "vpo_engine/config/methods.py"
RUN = "vpo_engine/config/run.py"
OFFLINE_DPO = "vpo_engine/offline_dpo.py"

MUTATIONS = [
    (
        "ReFL's step one too late",
        REFL,
        "self.sampling.steps - last_steps + drawn",
        "self.sampling.steps - last_steps + drawn + 1",
        FOLLOWED,
    ),
    (
        "ReFL's step always the first of the late ones",
        REFL,
        "self.sampling.steps - last_steps + drawn",
        "self.sampling.steps - last_steps",
        FOLLOWED,
    ),
    ("ReFL without its margin", REFL, "own.margin, own.scale", "None, own.scale", FOLLOWED),
    (
        "micro-batches all weigh as the whole",
        GRADIENT,
        "self.optimizer.backward(loss * share * self.processes.sequence.count)",
        "self.optimizer.backward(loss * self.processes.sequence.count)",
        FOLLOWED,
    ),
    (
        "the same noise for all videos",
        GRADIENT,
        "normal(shape, self.config.seed, purpose, prompt.position)",
        "normal(shape, self.config.seed, purpose, 0)",
        FOLLOWED,
    ),
    (
        "rewards of one dimension in place of the chosen ones",
        GRADIENT,
        "return combine(scores, self.config.reward.dimensions), scores",
        "return next(iter(scores.values())), scores",
        FOLLOWED,
    ),
    (
        "a run without pairs keeps the guidance of the rollout",
        RUN,
        "self.rollout.guidance if guidance is None else guidance",
        "self.rollout.guidance",
        FOLLOWED,
    ),
    (
        "unused settings of sections are taken",
        SETTINGS,
        "if isinstance(default, Section):",
        "if isinstance(default, Section) and sections:",
        FOLLOWED,
    ),
    (
        "pairs of a file with the loser as the winner",
        FILES,
        "enumerate((row.winner, row.loser))",
        "enumerate((row.loser, row.winner))",
        OFFLINE,
    ),
    (
        "latents of another size are taken",
        FILES,
        "if tuple(latents.shape) != tuple(shape):",
        "if latents.dim() != len(shape):",
        OFFLINE,
    ),
    (
        "a video is found again by its VAE alone",
        FILES,
        "{content_hash(path)}_{vae}",
        "{vae}",
        ENCODED,
    ),
    (
        "a video is found again by its content alone",
        FILES,
        "{content_hash(path)}_{vae}",
        "{content_hash(path)}",
        ENCODED,
    ),
    (
        "sampling of pairs begins again after a stop",
        STORED,
        "counts[step + 1] < size",
        "counts[step + 1] < size + 1",
        OFFLINE,
    ),
    (
        "steps of pairs that were cut are kept",
        STORED,
        "counts[step + 1] < size",
        "counts[step + 1] < 1",
        OFFLINE,
    ),
    (
        "pairs are sampled by the trained policy where they are gone",
        OFFLINE_DPO,
        "started=self.optimizer_steps > 0",
        "started=False",
        OFFLINE,
    ),
    (
        "processes with slices of the same videos record every pair twice",
        OFFLINE_DPO,
        "if self.processes.first_of_team:",
        "if self.processes.team.first:",
        (
            "tests/wiring/test_offline_pairs.py::test_processes_with_slices_of_the_same_videos_record_their_pairs_once",
        ),
    ),
    (
        "the cache of encoded videos is beside the run whatever is set",
        OFFLINE_DPO,
        'cache = settings.cache or beside / "encoded_videos"',
        'cache = beside / "encoded_videos"',
        ("tests/wiring/test_offline_pairs.py::test_encoded_videos_are_kept_where_the_settings_say",),
    ),
    (
        "every process encodes the same part of the videos of a preference file",
        FILES,
        "list(videos)[processes.rank :: processes.count]",
        "list(videos)[:: processes.count]",
        ("tests/models/test_encode.py::test_processes_share_the_videos",),
    ),
    (
        "a preference file's videos are divided by what is there already",
        FILES,
        "list(videos)[processes.rank :: processes.count]",
        "[path for path in videos if not self._kept[path].is_file()][processes.rank :: processes.count]",
        ("tests/models/test_encode.py::test_a_process_that_comes_late_still_encodes_its_share",),
    ),
    (
        "what the run that wrote a dataset left out is no tie",
        STORED,
        "return not pair.kept or pair.gap <= self._min_gap",
        "return pair.gap <= self._min_gap",
        ("tests/data_layer/test_preference_dataset.py::test_ties_of_the_run_that_wrote_a_dataset_stay_ties",),
    ),
    (
        "stored losers have the scores of their winners",
        STORED,
        "stored.score(number)",
        "stored.score(stored.winner)",
        (
            "tests/data_layer/test_preference_dataset.py::test_winner_and_loser_of_a_stored_pair_have_their_own_scores",
        ),
    ),
    (
        "the record of stored pairs does not say who won",
        STORED,
        "(pair.step, pair.position, pair.prompt, pair.winner, pair.loser, pair.gap, pair.kept)",
        "(pair.step, pair.position, pair.prompt)",
        ("tests/wiring/test_offline_pairs.py::test_a_stored_pair_that_was_turned_round_is_told",),
    ),
    (
        "the process of a reward does not get its settings",
        "vpo_engine/rewards/registry.py",
        '"settings": dict(self.settings),',
        '"settings": {},',
        ("tests/rewards/test_registry.py::test_everything_about_a_reward_reaches_another_process",),
    ),
    (
        "a stored tie has no latents for passes that add nothing",
        STORED,
        "(torch.zeros(latent_shape),) * 2 if tied",
        "(torch.empty(0),) * 2 if tied",
        (
            "tests/wiring/test_offline_pairs.py::test_a_process_whose_pair_is_a_tie_makes_passes_that_add_nothing",
        ),
    ),
    (
        "pairs that were sampled once tell of resampling",
        "vpo_engine/selection.py",
        "if config.pairs.resample and config.offline_dpo is None:",
        "if config.pairs.resample:",
        (
            "tests/wiring/test_offline_pairs.py::test_the_log_of_pairs_that_were_sampled_once_tells_nothing_of_resampling",
        ),
    ),
    (
        "latents are written where scores were asked for",
        "vpo_engine/trainer.py",
        'rank, config.pairs.dataset == "latents"',
        'rank, config.pairs.dataset != "none"',
        ("tests/wiring/test_replay.py::test_a_dataset_of_scores_holds_no_latents",),
    ),
    (
        "a recorder writes latents whatever it is told",
        STORED,
        "enumerate(weights)} if self._with_latents else {}",
        "enumerate(weights)}",
        ("tests/wiring/test_replay.py::test_a_dataset_of_scores_holds_no_latents",),
    ),
    (
        "what the reference has begun is finished by the policy",
        "vpo_engine/online_vpo.py",
        'CountedRows(exact if config.weights == "policy" else first, check)',
        'CountedRows(model.network if config.weights == "policy" else first, check)',
        ("tests/wiring/test_samplers.py",),
    ),
    (
        "scales of whole targets lie along the width",
        "vpo_engine/objectives/dpo.py",
        "scale.to(dtype).view(-1, *[1] * (latents.dim() - 1))",
        "scale.to(dtype)",
        ("tests/test_ablations.py::test_whole_targets_have_the_scales_of_their_own_samples",),
    ),
    (
        "the error of steps without pairs names the step before",
        "vpo_engine/online_vpo.py",
        "1 + choices[0].prompt.position // self.config.pairs_per_step",
        "choices[0].prompt.position // self.config.pairs_per_step",
        ("tests/wiring/test_faults.py::test_a_run_stops_after_twenty_steps_in_a_row_without_a_pair",),
    ),
]
