"""Algorithm 1 computed a second time, one candidate and one pair after the other, in float64.

Nothing here uses the engine's sampling, scoring, pairing, loss, optimizer or refresh. Random numbers come from
``vpo_engine.seeding`` by the documented rules:

    noise of candidate n of block b     normal((N, C, T, H, W), seed, "rollout", position[, b])[n - b * N]
    time of draw d of update u          generator(seed, "time", position[, u]), stratified over the draws
    noise of draw d of update u         normal((draws, C, T, H, W), seed, "noise", position[, u])[d]

with b and u left out of the key where they are 0.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from toy import SHAPE, ToyNetwork, numbers_of, sampling_times, scores_of, toy_motion, velocity, video_of

from vpo_engine.config import Config
from vpo_engine.data.prompts import PromptStream
from vpo_engine.seeding import generator, normal


@dataclass
class Candidate:
    number: int
    latents: Tensor
    scores: dict[str, float]
    still: bool = False


@dataclass
class Line:
    """The outcome of one prompt in one step."""

    step: int
    position: int
    prompt: str
    candidates: list[Candidate]
    selected: list[float]
    winner: Candidate
    loser: Candidate
    gap: float
    kept: bool
    weight: float = 0.0
    tied_at_first: bool = False


@dataclass
class LossRow:
    """One draw of one pair in one update."""

    winner: Tensor
    loser: Tensor
    noise: Tensor
    time: float
    caption: Tensor
    weight: float
    position: int


@dataclass
class Run:
    lines: list[Line] = field(default_factory=list)
    rows: list[LossRow] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    policies: list[dict[str, Tensor]] = field(default_factory=list)
    """After each step."""
    references: list[dict[str, Tensor]] = field(default_factory=list)
    refreshed_at: list[int] = field(default_factory=list)
    scored: list[tuple[str, Tensor]] = field(default_factory=list)
    """(prompt, video) in the order of scoring, of a rollout that is not cut into groups."""


def caption(prompt: str) -> Tensor:
    words = [numbers_of(f"{prompt} {word}", 4) for word in prompt.split()]
    return torch.stack(words).mean(0).double()


class Oracle:
    """The run of ``config`` on the toy."""

    def __init__(self, config: Config, prompts: tuple[str, ...]) -> None:
        self.config = config
        self.stream = PromptStream(prompts, config.seed)
        self.policy = ToyNetwork().double()
        self.reference = self.frozen()
        settings = config.optimizer
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self._parameters()}
        self.betas, self.eps, self.decay = settings.betas, settings.eps, settings.weight_decay
        self.optimizer_steps = self.refreshed_at = 0
        self.found = Run()

    def run(self) -> Run:
        for step in range(1, self.config.steps + 1):
            self.step(step)
        return self.found

    def step(self, step: int) -> None:
        first = (step - 1) * self.config.pairs_per_step
        lines = []
        for position in range(first, first + self.config.pairs_per_step):
            (item,) = self.stream.take(position, 1)
            lines.append(self.line(step, position, item.text))
        self.weigh(lines)
        metrics: dict[str, float] = {}
        for update in range(self.config.objective.updates_per_rollout):
            metrics = self.update(lines, update)
            every = self.config.reference.refresh_every
            if every is not None and self.optimizer_steps - self.refreshed_at >= every:
                self.reference = self.frozen()
                self.refreshed_at = self.optimizer_steps
        metrics |= self.means(lines)
        metrics |= {
            "optimizer_steps": self.optimizer_steps,
            "reference_age": self.optimizer_steps - self.refreshed_at,
        }
        found = self.found
        found.lines += lines
        found.metrics.append(metrics)
        found.policies.append({name: p.detach().clone() for name, p in self.policy.state_dict().items()})
        found.references.append({name: p.clone() for name, p in self.reference.state_dict().items()})
        found.refreshed_at.append(self.refreshed_at)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.policy.named_parameters())

    def frozen(self) -> ToyNetwork:
        """A copy of the policy, the matrices of its blocks rounded as reference.storage=bf16 holds them."""
        network = copy.deepcopy(self.policy).requires_grad_(False)
        if self.config.reference.storage == "bf16":
            for block in network.blocks:
                block.weight.copy_(block.weight.float().bfloat16())
        return network

    # From a prompt to its pair.

    def line(self, step: int, position: int, prompt: str) -> Line:
        candidates = self.block(position, prompt, 0)
        line = self.pair(step, position, prompt, candidates)
        tied_at_first = not line.kept
        for block in range(1, 1 + self.config.pairs.resample):
            if line.kept:
                break
            candidates = candidates + self.block(position, prompt, block)
            line = self.pair(step, position, prompt, candidates)
        line.tied_at_first = tied_at_first
        return line

    def block(self, position: int, prompt: str, block: int) -> list[Candidate]:
        rollout = self.config.rollout
        key = ("rollout", position, block) if block else ("rollout", position)
        noises = normal((rollout.candidates, *SHAPE), self.config.seed, *key).double()
        numbers = [block * rollout.candidates + place for place in range(rollout.candidates)]
        if rollout.prune is None and rollout.explore is None:
            full = [self.sampled(noise, prompt, rollout.steps, rollout) for noise in noises]
            return [self.judged(n, x, prompt) for n, (x, _) in zip(numbers, full, strict=True)]
        if rollout.prune is not None:
            after = round(rollout.prune.after * rollout.steps)
            halves = [self.sampled(noise, prompt, rollout.steps, rollout, stop=after) for noise in noises]
            reached, previews = [x for x, _ in halves], [x[:, : rollout.prune.frames] for _, x in halves]
            keep = rollout.prune.keep
        else:
            explore = rollout.explore
            assert explore is not None
            cheap = [self.sampled(z, prompt, explore.steps or rollout.steps, explore) for z in noises]
            after, reached, previews, keep = 0, list(noises), [x for x, _ in cheap], 2
        judged = [self.judged(n, x, prompt) for n, x in zip(numbers, previews, strict=True)]
        chosen = self.extremes(judged, keep)
        full = [self.sampled(reached[place], prompt, rollout.steps, rollout, start=after) for place in chosen]
        return [self.judged(numbers[p], x, prompt) for p, (x, _) in zip(chosen, full, strict=True)]

    def extremes(self, judged: list[Candidate], keep: int) -> list[int]:
        """Places of the better half of ``keep`` from the top and the rest from the bottom."""
        selected = self.selected(judged)
        low = min(selected)
        lowered = [low if one.still else value for one, value in zip(judged, selected, strict=True)]
        order = sorted(range(len(judged)), key=lambda place: (-lowered[place], place))
        worst = keep // 2
        return sorted(order[: keep - worst] + order[len(order) - worst :])

    @torch.no_grad()
    def sampled(
        self, z: Tensor, prompt: str, steps: int, settings: Any, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the latents after Euler steps, and the preview of the last prediction."""
        network = self.reference if self.config.rollout.source == "reference" else self.policy
        times = sampling_times(steps)
        z, v, time = z[None], torch.zeros(()), 0.0
        for time in times[start:stop]:
            low, high = settings.guidance_interval or (0.0, 1.0)
            guidance = self.config.rollout.guidance if low <= time / 1000 <= high else 1.0
            t = torch.tensor([time], dtype=torch.float64)
            v = velocity(network, z, t, caption(prompt)[None], guidance)
            v = v * (1 - settings.cache) if settings.cache else v
            z = z + v / steps
        return z[0], (z + v * (time / 1000 - 1 / steps))[0]

    def judged(self, number: int, latents: Tensor, prompt: str) -> Candidate:
        video = video_of(latents[None].float())[0]
        self.found.scored.append((prompt, video))
        names = ("visual_quality", "temporal_consistency", "text_alignment")
        scores = dict(zip(names, scores_of(video, prompt), strict=True))
        floor = self.config.guards.motion_floor
        still = floor is not None and float(toy_motion(video[None])) < floor
        return Candidate(number, latents, scores, still)

    def selected(self, candidates: list[Candidate]) -> list[float]:
        """One number per candidate: the weighted average of the chosen dimensions."""
        reward = self.config.reward
        weights = reward.dimensions
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(weights, 1.0)
        total = [0.0] * len(candidates)
        for name, weight in weights.items():
            values = [one.scores[name] for one in candidates]
            if reward.normalise == "group":
                mean = sum(values) / len(values)
                spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
                values = [(value - mean) / spread if max(values) > min(values) else 0.0 for value in values]
            for place, value in enumerate(values):
                total[place] += weight / sum(weights.values()) * value
        return total

    def pair(self, step: int, position: int, prompt: str, candidates: list[Candidate]) -> Line:
        selected, rule = self.selected(candidates), self.config.pairs
        numbers = range(len(candidates))
        may_win = [n for n in numbers if not candidates[n].still]
        best = max(may_win, key=lambda n: (selected[n], -n)) if may_win else 0  # a tie whatever it is
        worst = min(numbers, key=lambda n: (selected[n], n))
        allowed = bool(may_win)
        if rule.rule == "pareto":
            pairs = [(w, x) for w in may_win for x in numbers if w != x and self.no_worse(candidates, w, x)]
            allowed = bool(pairs)
            if pairs and (best, worst) not in pairs:
                best, worst = max(
                    pairs, key=lambda pair: (selected[pair[0]] - selected[pair[1]], -pair[0], -pair[1])
                )
        gap = selected[best] - selected[worst]
        kept = allowed and gap > rule.min_gap
        return Line(
            step, position, prompt, candidates, selected, candidates[best], candidates[worst], gap, kept
        )

    def no_worse(self, candidates: list[Candidate], one: int, other: int) -> bool:
        names = self.config.reward.dimensions
        return all(candidates[one].scores[name] >= candidates[other].scores[name] for name in names)

    def weigh(self, lines: list[Line]) -> None:
        power, kept = self.config.pairs.gap_power, [line for line in lines if line.kept]
        total = sum(line.gap**power for line in kept)
        for line in kept:
            line.weight = line.gap**power * len(kept) / total

    # From pairs to the policy.

    def update(self, lines: list[Line], update: int) -> dict[str, float]:
        objective = self.config.objective
        kept = [line for line in lines if line.kept]
        rate = self.rate()
        metrics: dict[str, float] = {"pairs": len(kept), "lr": rate}
        if not kept:
            return metrics
        self.policy.zero_grad()
        sums: dict[str, float] = defaultdict(float)
        count = len(kept) * objective.timesteps_per_pair
        for line in kept:
            for row in self.draws(line, update):
                self.found.rows.append(row)
                loss, values = self.loss(row)
                (loss / count).backward()
                for name, value in ({"loss": loss.item()} | values).items():
                    sums[name] += value / count
        metrics |= sums
        if self.optimizer_steps == self.refreshed_at:
            del metrics["implicit_accuracy"]  # policy and reference are the same: no margin is above zero
        metrics["grad_norm"] = self.adamw(rate)
        return metrics

    def draws(self, line: Line, update: int) -> list[LossRow]:
        config, draws = self.config, self.config.objective.timesteps_per_pair
        which = (update,) if update else ()
        uniform = torch.rand(draws, generator=generator(config.seed, "time", line.position, *which))
        noise = normal((draws, *SHAPE), config.seed, "noise", line.position, *which)
        rows = []
        for draw in range(draws):
            u = min(max((draw + float(uniform[draw])) / draws, 1e-6), 1 - 1e-6)
            rows.append(
                LossRow(
                    line.winner.latents,
                    line.loser.latents,
                    noise[draw],
                    1000 * math.sqrt(u),
                    caption(line.prompt),
                    line.weight,
                    line.position,
                )
            )
        return rows

    def loss(self, row: LossRow) -> tuple[Tensor, dict[str, float]]:
        objective, noise, share = self.config.objective, row.noise.double(), row.time / 1000
        t = torch.tensor([row.time], dtype=torch.float64)
        guidance = self.config.rollout.guidance if objective.branch == "guided" else 1.0
        errors: dict[str, Tensor] = {}
        off: dict[str, Tensor] = {}
        for who, network in (("policy", self.policy), ("reference", self.reference)):
            for side, latents in (("winner", row.winner), ("loser", row.loser)):
                x = (1 - share) * latents + share * noise
                predicted = velocity(network, x[None], t, row.caption[None], guidance)[0]
                off[f"{who} {side}"] = predicted - (latents - noise)
                errors[f"{who} {side}"] = off[f"{who} {side}"].square().mean()
        if objective.loser_scaling is not None:
            a, b = off["policy winner"].detach(), off["policy loser"].detach()
            along, most = float((a * b).sum()), (1 - objective.loser_scaling) * float(a.square().sum())
            scale = min(1.0, max(0.0, most / along)) if along > 0 else 1.0
            error = errors["policy loser"]
            errors["policy loser"] = (
                scale * error + (1 - scale) * error.detach()
            )  # the gradient alone is less
        winner = errors["policy winner"] - errors["reference winner"]
        loser = errors["policy loser"] - errors["reference loser"]
        space = {"prediction": 1.0, "epsilon": (1 - share) ** 2, "x0": share**2}[objective.weighting]
        margin = -(objective.beta * space / 2) * (winner - loser)
        loss = -torch.nn.functional.logsigmoid(margin) + objective.winner_anchor * errors["policy winner"]
        values = {
            "margin": margin.item(),
            "implicit_accuracy": float(margin > 0),
            "winner_error_change": winner.item(),
            "loser_error_change": loser.item(),
        } | {f"reference_{side}_error": errors[f"reference {side}"].item() for side in ("winner", "loser")}
        return row.weight * loss, values

    def rate(self) -> float:
        """A straight line up over the warm-up, then one down to final_lr at the last optimizer step."""
        settings, total = self.config.optimizer, self.config.steps * self.config.objective.updates_per_rollout
        step, warmup = self.optimizer_steps, settings.warmup_steps
        if step < warmup:
            return settings.lr * (step + 1) / (warmup + 1)
        share = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
        return settings.lr * (1 - (1 - settings.final_lr) * share)

    @torch.no_grad()
    def adamw(self, rate: float) -> float:
        gradients = {name: p.grad for name, p in self._parameters()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        clip = self.config.optimizer.clip
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        self.optimizer_steps += 1
        one, two = self.betas
        for name, parameter in self._parameters():
            gradient = gradients[name] * factor
            mean, square = self.moments[name]
            mean.mul_(one).add_(gradient, alpha=1 - one)
            square.mul_(two).addcmul_(gradient, gradient, value=1 - two)
            parameter.mul_(1 - rate * self.decay)
            unbiased = mean / (1 - one**self.optimizer_steps)
            spread = (square / (1 - two**self.optimizer_steps)).sqrt()
            parameter.sub_(rate * unbiased / (spread + self.eps))
        return norm

    def means(self, lines: list[Line]) -> dict[str, float]:
        rollout = self.config.rollout
        keep = rollout.prune.keep if rollout.prune else 2 if rollout.explore else rollout.candidates
        first = [line.candidates[:keep] for line in lines]
        found = {}
        for name in first[0][0].scores:
            found[f"reward/{name}"] = _mean([one.scores[name] for row in first for one in row])
        plain = Oracle.selected(_plain(self.config), [one for row in first for one in row])  # type: ignore[arg-type]
        found["reward/selected"] = _mean(plain)
        found["reward/gap"] = _mean([line.gap for line in lines])
        found["tie_rate"] = _mean([not line.kept for line in lines])
        if self.config.pairs.resample:
            found["tie_rate_before_resample"] = _mean([line.tied_at_first for line in lines])
        if self.config.guards.motion_floor is not None:
            found["guards/still"] = _mean([one.still for row in first for one in row])
        return found


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values)


@dataclass
class _Plain:
    config: Config


def _plain(config: Config) -> _Plain:
    """For ``Oracle.selected`` without the normalisation within a prompt: the log shows plain averages."""
    reward = config.reward.model_copy(update={"normalise": "none"})
    return _Plain(config.model_copy(update={"reward": reward}))
