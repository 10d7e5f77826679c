"""Mistakes in what all models share, and in what every process shares: the sampling loop, guidance, teams."""

from mutations.tests_of import REPLAY, RESUME, TWO

BASE = "vpo_engine/models/base.py"
GUIDANCE = "vpo_engine/models/guidance.py"
SOLVERS = "vpo_engine/models/solvers.py"
VALUES = "vpo_engine/model_values.py"
PROCESSES = "vpo_engine/distributed/processes.py"
STEP_CACHE = "vpo_engine/models/step_cache.py"
LOOP = ("tests/models/test_sampling_loop.py",)
FLOW = ("tests/models/test_rectified_flow.py",)
TEAMS = ("tests/test_teams.py",)

MUTATIONS = [
    (
        "guidance decided a step late",
        BASE,
        "solver.noise_level(step)",
        "solver.noise_level(max(0, step - 1))",
        REPLAY,
    ),
    (
        "one guidance scale for the whole loop",
        BASE,
        "self._predictor(network, text, settings, scale)",
        "self._predictor(network, text, settings, settings.guidance)",
        REPLAY,
    ),
    (
        "a resumed loop begins at the first step",
        BASE,
        "range(state.step, stop)",
        "range(stop - state.step)",
        REPLAY,
    ),
    (
        "a resumed loop repeats the step it was cut at",
        BASE,
        "range(state.step, stop)",
        "range(max(0, state.step - 1), stop)",
        REPLAY,
    ),
    ("times counted from the cut", BASE, "solver.times[step]", "solver.times[step - state.step]", REPLAY),
    (
        "the preview from before the step",
        BASE,
        "solver.preview(step, before, latents, prediction)",
        "solver.preview(step, latents, before, prediction)",
        REPLAY,
    ),
    ("the preview of the first step", BASE, "if step + 1 == stop:", "if step == state.step:", REPLAY),
    (
        "the state forgets its steps",
        BASE,
        "SamplerState(latents, preview, stop, memory)",
        "SamplerState(latents, preview, 0, memory)",
        REPLAY,
    ),
    (
        "the solver's memory is that of the cut",
        BASE,
        "SamplerState(latents, preview, stop, memory)",
        "SamplerState(latents, preview, stop, state.memory)",
        LOOP,
    ),
    (
        "text cut to the shortest prompt",
        BASE,
        "text.mask.sum(dim=1).max()",
        "text.mask.sum(dim=1).min()",
        REPLAY,
    ),
    (
        "latents and noise exchanged in what is trained on",
        BASE,
        "kept * latents + added * noise",
        "added * latents + kept * noise",
        REPLAY,
    ),
    (
        "the policy not loaded at a resume",
        BASE,
        'self.network.load_state_dict(read_files([folder / "model.safetensors"]), strict=True)',
        "pass",
        RESUME,
    ),
    (
        "both branches of guidance exchanged",
        "vpo_engine/models/guidance.py",
        "unprompted, prompted = whole.chunk(2) if",
        "prompted, unprompted = whole.chunk(2) if",
        REPLAY,
    ),
    (
        "the null caption before the prompt",
        "vpo_engine/models/guidance.py",
        "if negative_first:\n        parts.reverse()",
        "if not negative_first:\n        parts.reverse()",
        REPLAY,
    ),
    (
        "guidance beyond the prompted branch",
        GUIDANCE,
        "unprompted + guidance *",
        "prompted + guidance *",
        REPLAY,
    ),
    (
        "prompts in turn, not each next to itself",
        GUIDANCE,
        "repeated = text.repeat_interleave(samples)",
        "repeated = TextEmbedding.cat([text] * samples)",
        REPLAY,
    ),
    (
        "masks in turn, embeddings next to each other",
        VALUES,
        "self.mask.repeat_interleave(count, dim=0)",
        "self.mask.repeat(count, 1)",
        REPLAY,
    ),
    (
        "a step as long as the one before",
        SOLVERS,
        "prediction * self.lengths[step], memory",
        "prediction * self.lengths[step - 1], memory",
        FLOW,
    ),
    (
        "the preview goes the step's way again",
        SOLVERS,
        "self.num_timesteps - self.lengths[step])",
        "self.num_timesteps)",
        REPLAY,
    ),
    ("guidance from above the lower end", VALUES, "low <= min(", "low < min(", REPLAY),
    ("guidance to below the upper end", VALUES, "1.0) <= high", "1.0) < high", REPLAY),
    (
        "a state's preview is not chosen",
        VALUES,
        "SamplerState(function(self.latents), function(self.preview)",
        "SamplerState(function(self.latents), function(self.latents)",
        REPLAY,
    ),
    (
        "a state's memory is not chosen",
        VALUES,
        "memory = tuple(function(tensor) for tensor in self.memory)",
        "memory = self.memory",
        LOOP,
    ),
    (
        "the step cache compares with the last step, not the computed one",
        STEP_CACHE,
        "self.reused += 1",
        "self.reused += 1\n            self._first = first",
        ("tests/rollout/test_approximations.py",),
    ),
    (
        "one sample near enough for the whole batch",
        "vpo_engine/models/step_cache.py",
        "(change < self.threshold * before).all()",
        "(change < self.threshold * before).any()",
        ("tests/rollout/test_approximations.py",),
    ),
    ("gradients summed over processes", PROCESSES, "flat /= self.count", "pass", TWO),
    (
        "a missing gradient is left out of the mean",
        PROCESSES,
        "parameter.grad = torch.zeros_like(parameter)",
        "continue",
        ("tests/test_online_vpo.py", *TEAMS),
    ),
    ("a full bucket not averaged", PROCESSES, "self._average(bucket) bucket = []", "bucket = []", TWO),
    ("gathered along the wrong dimension", PROCESSES, "torch.cat(parts, dim)", "torch.cat(parts, 0)", TWO),
    (
        "the last items to no process",
        PROCESSES,
        "range(total * self.rank // self.count, total * (self.rank + 1) // self.count)",
        "range(total // self.count * self.rank, total // self.count * (self.rank + 1))",
        TWO,
    ),
    (
        "the same items for all processes",
        PROCESSES,
        "range(total * self.rank // self.count, total * (self.rank + 1) // self.count)",
        "range(total // self.count)",
        TWO,
    ),
    (
        "prompts of the next team",
        PROCESSES,
        "range(team * each, (team + 1) * each)",
        "range((teams - 1 - team) * each, (teams - team) * each)",
        TWO,
    ),
    (
        "a team's sum over all processes",
        "vpo_engine/distributed/processes.py",
        "self.device, made[number], stages=self.stages",
        "self.device, stages=self.stages",
        TEAMS,
    ),
    (
        "all teams in the group of the first",
        "vpo_engine/distributed/processes.py",
        "self.device, made[number], stages=self.stages",
        "self.device, made[0], stages=self.stages",
        TEAMS,
    ),
    (
        "teams of far ranks, not of neighbours",
        PROCESSES,
        "team = self.rank // size return range",
        "team = self.rank % teams\n        return range",
        TEAMS,
    ),
    (
        "a flag counts where all have it",
        PROCESSES,
        "dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)\n        return bool",
        "dist.all_reduce(value, op=dist.ReduceOp.MIN, group=self.group)\n        return bool",
        TEAMS,
    ),
    ("the text of each process, not of the first", PROCESSES, "return box[0]", "return text", TWO),
]
