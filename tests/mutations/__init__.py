"""Mistakes that the tests must notice: (name, file, old text, new text, tests). ``tests/mutants.py`` applies them."""

from mutations import (
    adapters,
    evaluation,
    flow,
    gradients,
    methods,
    models,
    parts,
    prompts,
    rollout,
    runs,
    scores,
    starting,
    state,
    step,
    survival,
    update,
)

MUTATIONS = [
    *step.MUTATIONS,
    *update.MUTATIONS,
    *rollout.MUTATIONS,
    *scores.MUTATIONS,
    *state.MUTATIONS,
    *models.MUTATIONS,
    *runs.MUTATIONS,
    *parts.MUTATIONS,
    *prompts.MUTATIONS,
    *starting.MUTATIONS,
    *adapters.MUTATIONS,
    *flow.MUTATIONS,
    *gradients.MUTATIONS,
    *survival.MUTATIONS,
    *evaluation.MUTATIONS,
    *methods.MUTATIONS,
]
