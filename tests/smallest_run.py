"""Settings that make the run of the sprites world one of seconds."""

SMALL = (
    "steps=4",
    "pairs_per_step=2",
    "rollout.candidates=2",
    "rollout.steps=2",
    "objective.timesteps_per_pair=2",
    "optimizer.warmup_steps=0",
    "reference.refresh_every=3",
    "evaluation.prompts=2",
    "evaluation.samples_per_prompt=1",
    "evaluation.samples_between=1",
    "evaluation.every=2",
    "checkpoint.every=2",
)
SHIPPED = "model.policy=null"
"""The setting with which a run that the fixtures make small has the shipped policy, where a test needs that."""
