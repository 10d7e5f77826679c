"""Notes for the user about a configuration that is valid."""

from __future__ import annotations

from vpo_engine.config.run import Config
from vpo_engine.texts import counted


def notes(config: Config) -> list[str]:
    """Return a line for every setting that has another effect than one might expect."""
    found = []
    warmup, steps = config.optimizer.warmup_steps, config.optimizer_steps
    if warmup >= steps:
        found.append(
            f"optimizer.warmup_steps={warmup} is not below the {counted(steps, 'optimizer step')} of the run: the "
            "learning rate reaches optimizer.lr at the last step"
        )
    if config.left_out:
        found.append(
            f"method={config.method} ({config.card.title}) does not use these settings of the file, which are left "
            f"out: {', '.join(config.left_out)}"
        )
    if config.refresh_every == 1 and config.reference.refresh_share == 1:
        section = "reference" if config.offline_dpo is None else "offline_dpo"
        found.append(
            f"{section}.refresh_every=1 makes the reference the policy of every step: the margin is always 0, there is "
            "no margin accuracy to see, and nothing holds the policy near where it was; the paper has 200"
        )
    share = config.reference.refresh_share
    if config.card.reference and not config.refreshes and share < 1:
        found.append(f"reference.refresh_share={share:g} is not used: the reference is never refreshed")
    return found
