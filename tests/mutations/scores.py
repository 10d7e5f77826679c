"""Mistakes between scores and pairs: averages, rules, ties, weights, more candidates for ties."""

from mutations.tests_of import FAULTS, REPLAY, TWO

PAIRS = "vpo_engine/objectives/pairs.py"
PAIRING = "vpo_engine/pairing.py"
POOL = "vpo_engine/rollout/pool.py"
COMBINE = "vpo_engine/rewards/combine.py"
GUARDS = "vpo_engine/rewards/guards.py"

MUTATIONS = [
    ("a gap of exactly min_gap is kept", PAIRS, "gap > min_gap)", "gap >= min_gap)", REPLAY),
    ("min_gap ignored", PAIRS, "gap > min_gap)", "gap > 0)", REPLAY),
    ("winner and loser exchanged in the pair", PAIRS, "return Pairs(winner, loser, gap", "return Pairs(loser, winner, gap", REPLAY),
    (
        "of equal scores the last wins",
        PAIRS,
        "scores.masked_fill(barred, -torch.inf).argmax(dim=1)",
        "scores.shape[1] - 1 - scores.masked_fill(barred, -torch.inf).flip(1).argmax(dim=1)",
        REPLAY,
    ),
    ("of equal scores the last loses", PAIRS, "scores.argmin(dim=1)", "scores.shape[1] - 1 - scores.flip(1).argmin(dim=1)", REPLAY),
    ("scores that are NaN pass", PAIRS, "if not torch.isfinite(scores).all():", "if torch.isinf(scores).any():", FAULTS),
    ("scores that are infinite pass", PAIRS, "if not torch.isfinite(scores).all():", "if torch.isnan(scores).any():", FAULTS),
    ("moving candidates barred", PAIRS, "scores.masked_fill(barred,", "scores.masked_fill(~barred,", REPLAY),
    ("still candidates may win", PAIRS, "scores.masked_fill(barred, -torch.inf).argmax(dim=1)", "scores.argmax(dim=1)", REPLAY),
    ("still candidates may not lose", PAIRS, "loser = scores.argmin(dim=1)", "loser = scores.masked_fill(barred, torch.inf).argmin(dim=1)", REPLAY),
    ("pairs where none may win", PAIRS, "allowed & (gap > min_gap)", "(gap > min_gap)", REPLAY),
    ("Pareto: better in all dimensions", PAIRS, "parts.unsqueeze(3) >= parts.unsqueeze(2)", "parts.unsqueeze(3) > parts.unsqueeze(2)", REPLAY),
    ("Pareto: worse in all dimensions", PAIRS, "parts.unsqueeze(3) >= parts.unsqueeze(2)", "parts.unsqueeze(3) <= parts.unsqueeze(2)", REPLAY),
    ("Pareto: better in any dimension", PAIRS, "(parts.unsqueeze(3) >= parts.unsqueeze(2)).all(dim=0)", "(parts.unsqueeze(3) >= parts.unsqueeze(2)).any(dim=0)", REPLAY),
    ("Pareto: still candidates may win", PAIRS, "fine &= ~barred.unsqueeze(2) &", "fine &=", REPLAY),
    ("Pareto: still candidates may not lose", PAIRS, "~barred.unsqueeze(2)", "~barred.unsqueeze(1)", REPLAY),
    ("Pareto: the narrowest gap", PAIRS, "gaps.flatten(1).argmax(dim=1)", "gaps.masked_fill(gaps < 0, torch.inf).flatten(1).argmin(dim=1)", REPLAY),
    (
        "Pareto: winner and loser exchanged",
        PAIRS,
        "winner = torch.where(extremes, best, widest // scores.shape[1]) loser = torch.where(extremes, worst, widest % scores.shape[1])",
        "winner = torch.where(extremes, best, widest % scores.shape[1])\n    loser = torch.where(extremes, worst, widest // scores.shape[1])",
        REPLAY,
    ),
    ("weights in proportion whatever the power", PAIRS, "pairs.gap.double() ** power", "pairs.gap.double()", REPLAY),
    ("weights over all prompts", PAIRS, "pairs.kept.sum()]", "torch.tensor(len(powers))]", REPLAY),
    ("weights not divided by their mean", PAIRS, "(powers * (count / total)).float()", "powers.float()", REPLAY),
    ("ties count in the mean of weights", PAIRS, "torch.where(pairs.kept, pairs.gap.double() ** power, 0.0)", "pairs.gap.double() ** power", REPLAY),
    ("weights of one process alone", PAIRS, "everywhere(torch.stack([powers.sum(), pairs.kept.sum()]))", "torch.stack([powers.sum(), pairs.kept.sum()])", TWO),
    ("pairs by plain scores", PAIRING, "combine(scores, reward.dimensions, reward.normalise), rule.min_gap", "combine(scores, reward.dimensions), rule.min_gap", REPLAY),
    ("the Pareto rule ignored", PAIRING, 'if rule.rule == "pareto" else None', "if False else None", REPLAY),
    ("the motion floor ignored", PAIRING, "barred = None if self._floor is None else self._floor.still(scores)", "barred = None", REPLAY),
    ("more candidates for the first prompts", PAIRING, "[prompts[row] for row in rows]", "prompts[: len(rows)]", REPLAY),
    ("text of the first prompts for more candidates", PAIRING, "text[tied]", "text[: len(tied)]", REPLAY),
    ("positions of the first prompts for more candidates", PAIRING, "[positions[row] for row in rows]", "list(positions)[: len(rows)]", REPLAY),
    ("the second round repeats the first", PAIRING, "for row in rows], stages, block", "for row in rows], stages, 1", REPLAY),
    ("more candidates repeat those there are", PAIRING, "for row in rows], stages, block", "for row in rows], stages, 0", REPLAY),
    ("one round too few", PAIRING, "range(1, 1 + self._config.pairs.refill)", "range(1, self._config.pairs.refill)", REPLAY),
    ("one round too many", PAIRING, "range(1, 1 + self._config.pairs.refill)", "range(1, 2 + self._config.pairs.refill)", REPLAY),
    ("more candidates for those that need none", PAIRING, "tied = (~pairs.kept).nonzero()", "tied = pairs.kept.nonzero()", REPLAY),
    ("new pairs for the first prompts", PAIRING, "pairs.with_rows(tied, again)", "pairs.with_rows(torch.arange(len(tied)), again)", REPLAY),
    ("pairs of the new candidates alone", PAIRING, "for name, each in pool.scores.items()})", "for name, each in more.scores.items()})", REPLAY),
    ("the log's means over the last candidates", PAIRING, "value[:, :count]", "value[:, -count:]", REPLAY),
    ("the log's tie rate turned around", PAIRING, "(~pairs.kept).float().mean()", "pairs.kept.float().mean()", REPLAY),
    ("the log of one process alone", PAIRING, "(summed / self._processes.count)", "summed", TWO),
    ("new candidates before the others", POOL, "torch.cat([values, added], dim=1)", "torch.cat([added, values], dim=1)", REPLAY),
    ("new candidates of the first prompts", POOL, "added[rows.to(values.device)]", "added[: len(rows)]", REPLAY),
    ("dimensions weigh alike", COMBINE, "dimensions[name] / total * part", "part / len(parts)", REPLAY),
    ("weights of dimensions not divided by their sum", COMBINE, "dimensions[name] / total * part", "dimensions[name] * part", REPLAY),
    ("normalised over all prompts", COMBINE, "off = exact - exact.mean(dim=-1, keepdim=True)", "off = exact - exact.mean()", REPLAY),
    ("only centred", COMBINE, "off / spread.where(~constant, 1.0)", "off", REPLAY),
    ("the motion floor turned around", GUARDS, "scores[MOTION] < self.floor", "scores[MOTION] > self.floor", REPLAY),
    ("still candidates count as the best", GUARDS, "selected.amin(dim=1, keepdim=True)", "selected.amax(dim=1, keepdim=True)", REPLAY),
]
