"""Measure how often a cheaper rollout finds the same winner and loser as the exact one, on the sprites policy.

Each argument is a set of settings, key=value separated by blanks ("rollout.prune.after=0.5 rollout.prune.keep=2").
Without arguments the sets in ``SETS`` are measured. Every set is compared with the exact rollout, which has the
settings of the sprites world and the guidance of the set. Both start from the same noise, so candidate n of a prompt
is the same candidate in both. With fewer steps its video changes too; both then agree if the videos from the same
noise are best and worst.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from candidates import sample_candidates
from report import Table, replaced
from rows import commit, hardware
from torch import Tensor

from vpo_engine.build import build_model, build_prompts, build_reward
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.distributed.processes import Processes
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.protocols import Network, Reward
from vpo_engine.rewards.combine import combine
from vpo_engine.rollout.quantised_copy import SamplingCopy

CPU = torch.device("cpu")
SETS = (
    "rollout.batch_size=16",
    "rollout.steps=8",
    "rollout.steps=6",
    "rollout.cache=0.1",
    "rollout.cache=0.2",
    "rollout.weights=bf16",
    "rollout.weights=int8",
    "rollout.weights=fp8",
    "rollout.prune.after=0.5 rollout.prune.keep=2",
    "rollout.explore.steps=6",
    "rollout.explore.cache=0.1",
    "rollout.explore.weights=fp8",
    "rollout.steps=8 rollout.cache=0.1",
    "rollout.cache=0.1 rollout.weights=fp8",
    "rollout.explore.steps=8 rollout.explore.cache=0.1",
    "rollout.guidance=7 rollout.guidance_interval=[0.3,1.0]",
    "rollout.guidance=7 rollout.guidance_interval=[0.3,1.0] rollout.cache=0.1",
)
AT_ONCE = 16
"""The sets take turns after this many prompts, so that changes of the machine's speed affect all of them."""
RESAMPLES = 2000
START, END = "<!-- agreement -->\n", "<!-- end of agreement -->"


@dataclass
class Found:
    """The result of one set of settings: candidate numbers of winners and losers, each int64 [P], and scores.

    scores: [P, N], of the finished candidates. sampling: CPU seconds in the sampling loops. seconds: CPU seconds in
    sampling, decoding and scoring, until the pairs are known.
    """

    winner: list[Tensor] = field(default_factory=list)
    loser: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    sampling: float = 0.0
    seconds: float = 0.0


class Bench:
    """Samples and scores candidates with the sprites policy and reward, for one set of settings after the other."""

    def __init__(self, base: Config, prompts: int) -> None:
        train, _ = build_prompts(base)
        self.prompts = [train[index % len(train)] for index in range(prompts)]
        self._model: OpenSora = build_model(base, Processes.start("cpu"), lambda _: None)
        self._model.prepare(self.prompts)
        self._reward: Reward = build_reward(base, CPU)

    def sample(self, config: Config, positions: range, found: Found) -> None:
        """Sample and score the candidates of these prompts, and add the result to ``found``."""
        captions = self.prompts[positions.start : positions.stop]
        text, bits = self._model.embed(captions), config.rollout.first_pass.weights
        exact: Network = self._model.network
        start, judged = time.process_time(), 0.0

        def judge(latents: Tensor) -> Tensor:
            nonlocal judged
            begun = time.process_time()
            scores = self._score(config, latents, captions)
            judged += time.process_time() - begun
            return scores

        first = exact if bits == "policy" else SamplingCopy(self._model.network, bits)
        candidates = sample_candidates(
            self._model, (first, exact), text, positions, config.rollout, config.seed, CPU, judge
        )
        taken = time.process_time() - start
        found.sampling += taken - judged
        found.seconds += taken
        numbers = torch.tensor([[candidate.number for candidate in each] for each in candidates])
        scores = torch.tensor([[candidate.scores["judge"] for candidate in each] for each in candidates])
        found.winner.append(numbers.gather(1, scores.argmax(1, keepdim=True)).squeeze(1))
        found.loser.append(numbers.gather(1, scores.argmin(1, keepdim=True)).squeeze(1))
        found.scores.append(scores)

    def _score(self, config: Config, latents: Tensor, captions: Sequence[str]) -> Tensor:
        each = latents.shape[1]
        repeated = [caption for caption in captions for _ in range(each)]
        scores = self._reward.score(self._model.decode(latents.flatten(0, 1)), repeated)
        by_prompt = {name: score.unflatten(0, (-1, each)) for name, score in scores.items()}
        return combine(by_prompt, config.reward.dimensions)


def interval(values: Tensor, weights: Tensor | None = None) -> str:
    """Format the mean of ``values`` [P] with its 95 % bootstrap interval; with ``weights``, the ratio of both sums."""
    divisor = torch.ones_like(values) if weights is None else weights
    random = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=random)
    resampled = values[picks].sum(1) / divisor[picks].sum(1)
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return f"{100 * values.sum() / divisor.sum():.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def line(name: str, found: Found, exact: Found) -> list[str]:
    """Return a row of the table; see ``HEADER``."""
    winner, loser = torch.cat(found.winner), torch.cat(found.loser)
    best, worst, scores = torch.cat(exact.winner), torch.cat(exact.loser), torch.cat(exact.scores).double()

    def gap(high: Tensor, low: Tensor) -> Tensor:
        return (scores.gather(1, high[:, None]) - scores.gather(1, low[:, None])).squeeze(1)

    same_winner, same_loser = winner == best, loser == worst
    return [
        f"`{name}`",
        interval((same_winner & same_loser).double()),
        interval(same_winner.double()),
        interval(same_loser.double()),
        interval(gap(winner, loser), gap(best, worst)),
        f"{found.sampling / exact.sampling:.2f}",
        f"{found.seconds / exact.seconds:.2f}",
    ]


HEADER = ["settings", "same pair", "same winner", "same loser", "gap kept", "sampling", "in all"]


def measure(sets: Sequence[str], prompts: int, candidates: int) -> Table:
    """Measure all sets, each against the exact rollout with the same guidance, and return the table."""
    always = [f"rollout.candidates={candidates}", "model.device=cpu"]
    configs = {name: load_config(None, [*always, *name.split()]) for name in sets}
    exact = {
        config.rollout.guidance: load_config(None, [*always, f"rollout.guidance={config.rollout.guidance}"])
        for config in configs.values()
    }
    bench = Bench(load_config(None, always), prompts)
    found, references = {name: Found() for name in sets}, {guidance: Found() for guidance in exact}
    for start in range(0, prompts, AT_ONCE):
        positions = range(start, min(start + AT_ONCE, prompts))
        for guidance, config in exact.items():
            bench.sample(config, positions, references[guidance])
        for name, config in configs.items():
            bench.sample(config, positions, found[name])
        print(f"{positions.stop} of {prompts} prompts", file=sys.stderr, flush=True)
    lines = [line(name, found[name], references[configs[name].rollout.guidance]) for name in sets]
    return Table(HEADER, lines, [])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sets", nargs="*", metavar="SETTINGS", help="a set of settings, given as one argument"
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=64,
        help="number of prompts (default 64); captions are repeated with other noise",
    )
    parser.add_argument("--candidates", type=int, default=4, help="candidates for each prompt (default 4)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    given = parser.parse_args(arguments)
    try:
        table = measure(given.sets or SETS, given.prompts, given.candidates)
        origin = (
            f"{given.prompts} prompts, {given.candidates} candidates each; {hardware(CPU)}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}"
        )
        text = f"{origin}:\n\n{table.markdown()}\n"
        print(text)
        if given.write is not None:
            unfinished = given.write.with_name(f".{given.write.name}.tmp")
            unfinished.write_text(
                replaced(given.write.read_text(encoding="utf-8"), text, START, END), encoding="utf-8"
            )
            os.replace(unfinished, given.write)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
