"""Mistakes in the rollout: noise, settings of both passes, groups, pruning."""

from mutations.tests_of import FAULTS, RANDOMNESS, REPLAY, SAMPLERS, TWO

CANDIDATES = "vpo_engine/rollout/candidates.py"
SAMPLING = "vpo_engine/sampling.py"
SCORING = "vpo_engine/scoring.py"
PRUNE = "vpo_engine/rollout/prune.py"
HELD_OUT = "vpo_engine/metrics/held_out.py"

MUTATIONS = [
    ("explore takes the rollout's steps", CANDIDATES, "first.steps or config.steps", "config.steps", SAMPLERS),
    ("explore takes the rollout's interval", CANDIDATES, "first.guidance_interval", "config.guidance_interval", SAMPLERS),
    ("explore takes the rollout's cache", CANDIDATES, "first.cache", "config.cache", SAMPLERS),
    (
        "the second pass takes explore's settings",
        CANDIDATES,
        "reached[prompts, kept], text, self._settings,",
        "reached[prompts, kept], text, self._first,",
        SAMPLERS,
    ),
    ("explored candidates finished from the cheap ones", CANDIDATES, "Denoised(noise.to(self._device), explored.latents)", "Denoised(explored.latents, explored.latents)", REPLAY),
    ("later rounds reuse the first noise", CANDIDATES, '"rollout", position, *later', '"rollout", position', RANDOMNESS),
    ("one noise for all prompts", CANDIDATES, '"rollout", position, *later', '"rollout", positions[0], *later', RANDOMNESS),
    ("the rollout in the noise of evaluations", CANDIDATES, '"rollout", position, *later', '"held-out", position, *later', RANDOMNESS),
    ("members of a team sample the same candidates", CANDIDATES, "*later)[mine]", "*later)[: mine.stop - mine.start]", TWO),
    ("text of the first prompts in a group", CANDIDATES, "text[prompts], settings, part", "text[: len(group.prompts)], settings, part", REPLAY),
    ("finished candidates scored, not previews", CANDIDATES, "made.preview if previews else made.latents", "made.latents", REPLAY),
    ("the wrong candidates are finished", CANDIDATES, "kept = extremes(scores, keep)[:, mine]", "kept = extremes(-scores, keep)[:, mine]", REPLAY),
    ("numbers counted from zero in every round", SAMPLING, "torch.arange(block * count, (block + 1) * count)", "torch.arange(count)", REPLAY),
    ("candidates where they are scored, not previews", SAMPLING, "self._scoring.score(begun.preview, prompts", "self._scoring.score(begun.latents, prompts", REPLAY),
    (
        "plain scores choose what is finished",
        SAMPLING,
        "combine(scores, config.reward.dimensions, config.reward.normalise)",
        "combine(scores, config.reward.dimensions)",
        REPLAY,
    ),
    ("still candidates finished as the best", SAMPLING, "if config.guards.motion_floor is not None:", "if False:", REPLAY),
    ("numbers of the first candidates", SAMPLING, "numbers = numbers.gather(1, extremes(selected, keep).cpu())", "numbers = numbers[:, :keep]", REPLAY),
    ("the 8-bit copy stays as it was", SAMPLING, "self._copy.refresh()", "pass", SAMPLERS),
    ("both passes in 8 bits", SAMPLING, 'exact = self._exact if self._config.rollout.weights == "policy" else first', "exact = first", SAMPLERS),
    ("both passes by the policy", SAMPLING, "first = self._exact if self._copy is None else self._copy", "first = self._exact", SAMPLERS),
    (
        "captions in the order of candidates",
        SCORING,
        "[prompt for prompt in prompts for _ in range(candidates.shape[1])]",
        "[prompt for _ in range(candidates.shape[1]) for prompt in prompts]",
        REPLAY,
    ),
    ("captions of the first group", SCORING, "captions[first : first + len(chunk)]", "captions[: len(chunk)]", REPLAY),
    (
        "prompts of the first group, scored ahead",
        SCORING,
        "self._prompts[group.prompts.start : group.prompts.stop]",
        "self._prompts[: len(group.prompts)]",
        REPLAY,
    ),
    ("the first candidates decoded for every group", SCORING, "group.candidates.start : group.candidates.stop", ": len(group.candidates)", REPLAY),
    ("the first prompts decoded for every group", SCORING, "group.prompts.start : group.prompts.stop, group.candidates", ": len(group.prompts), group.candidates", REPLAY),
    ("candidates of a group decoded by number", SCORING, "chosen.flatten(0, 1)", "chosen.transpose(0, 1).flatten(0, 1)", REPLAY),
    ("more of the worst kept", PRUNE, "order[:, : keep - worst], order[:, -worst:]", "order[:, :worst], order[:, worst - keep :]", REPLAY),
    ("the middle kept", PRUNE, "order[:, -worst:]", "order[:, keep - worst : keep]", REPLAY),
    ("kept candidates in the order of scores", PRUNE, ".sort(dim=1).values", "", REPLAY),
    ("previews that are not finite pass", PRUNE, "if not torch.isfinite(scores).all():", "if False:", FAULTS),
    ("evaluations in the noise of the rollout", HELD_OUT, '"held-out", clip', '"rollout", clip', RANDOMNESS),
    ("evaluations in the noise of the training", HELD_OUT, '"held-out", clip', '"noise", clip', RANDOMNESS),
    ("evaluations guided otherwise", HELD_OUT, "guidance=rollout.guidance", "guidance=1.0", SAMPLERS),
    ("evaluations at the rollout's steps", HELD_OUT, "steps=self._config.held_out_steps", "steps=rollout.steps", SAMPLERS),
]
