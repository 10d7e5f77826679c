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
]
