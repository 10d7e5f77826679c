"""Mistakes around the step: evaluations, guards, the gallery, what a resumed run takes up, batches that do not fit."""

from mutations.tests_of import DISK, EVALUATION, FAULTS, REPLAY, RESUME, TWO

TRAINER = "vpo_engine/trainer.py"
HELD_OUT = "vpo_engine/metrics/held_out.py"
GUARDS = "vpo_engine/rewards/guards.py"
COMBINE = "vpo_engine/rewards/combine.py"
STATE = "vpo_engine/run_state.py"
START = "vpo_engine/runs/start.py"
GALLERY = "vpo_engine/run_gallery.py"
CHECKPOINT = "vpo_engine/runs/checkpoint.py"
DATASET = "vpo_engine/data/preference_dataset.py"
PROMPTS = "vpo_engine/data/prompts.py"
OPTIMIZER = "vpo_engine/memory/optimizer.py"
BATCHES = "vpo_engine/rollout/batches.py"
COPY = "vpo_engine/rollout/quantised_copy.py"
WEIGHTS = "vpo_engine/reference/weights.py"
NETWORK = "vpo_engine/reference/network.py"
EXACT = "vpo_engine/reference/exact.py"
GUARD_TESTS = ("tests/rewards/test_guards.py",)
MONITOR = (
    "tests/test_reward_monitor.py",
    "tests/test_reward_monitor.py::test_alarms_reach_log_terminal_and_report_and_stop_a_run_that_goes_on_when_resumed",
)
STORES = ("tests/reference/test_reference_store.py", "tests/reference/test_int8.py")
OPTIMIZER_TESTS = ("tests/memory/test_policy_optimizer.py", "tests/memory/test_policy_optimizer_state.py")
BATCH_TESTS = ("tests/rollout/test_rollout_memory.py",)

MUTATIONS = [
    # Evaluations.
    (
        "captions of held-out clips prompt by prompt",
        HELD_OUT,
        "self.prompts[clip % len(self.prompts)]",
        "self.prompts[clip * len(self.prompts) // 4 % len(self.prompts)]",
        EVALUATION,
    ),
    (
        "held-out noise by the place in the batch",
        HELD_OUT,
        '"held-out", clip) for clip in clips',
        '"held-out", place) for place, clip in enumerate(clips)',
        (*EVALUATION, *TWO),
    ),
    (
        "the last clip counted again",
        HELD_OUT,
        "self._processes.device))[:total]",
        "self._processes.device))",
        TWO,
    ),
    (
        "every process measures the first clips",
        HELD_OUT,
        "first = self._processes.rank * each",
        "first = 0",
        TWO,
    ),
    (
        "measures under the names of others",
        HELD_OUT,
        "dict(zip(names, rows.unbind(1), strict=True))",
        "dict(zip(sorted(names, reverse=True), rows.unbind(1), strict=True))",
        EVALUATION,
    ),
    (
        "the held-out reward of one dimension",
        HELD_OUT,
        "combine(scores, dimensions)",
        "combine(scores, list(scores)[0])",
        EVALUATION,
    ),
    (
        "scores of the gallery under the next clip's name",
        HELD_OUT,
        "float(value[i]) for name",
        "float(value[i - 1]) for name",
        EVALUATION,
    ),
    (
        "the policy at the end evaluated as the reference",
        TRAINER,
        "network = self._algorithm.model.network with self._algorithm.evaluated_weights(): final =",
        "network = self._algorithm.reference\n            with self._algorithm.evaluated_weights():\n"
        "                final =",
        EVALUATION,
    ),
    (
        "evaluations in between by the reference",
        TRAINER,
        "self._held_out.evaluate(self._algorithm.model.network, samples)",
        "self._held_out.evaluate(self._algorithm.reference, samples)",
        EVALUATION,
    ),
    (
        "all samples evaluated in between",
        TRAINER,
        "settings.samples_between or settings.samples_per_prompt",
        "settings.samples_per_prompt",
        EVALUATION,
    ),
    (
        "before and after exchanged in the summary",
        TRAINER,
        "summarise(_logged(self._baseline), _logged(final),",
        "summarise(_logged(final), _logged(self._baseline),",
        EVALUATION,
    ),
    (
        "the time of a resumed run without what came before",
        TRAINER,
        "self._seconds |= sum_rows(read_metrics(self._run.metrics))",
        "pass",
        ("tests/test_train.py::test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit",),
    ),
    (
        "clips before and after exchanged",
        GALLERY,
        "before=before, after=after,",
        "before=after, after=before,",
        EVALUATION,
    ),
    (
        "scores of the clips before for those after",
        GALLERY,
        "after_scores=held_out.scores(after, clips)",
        "after_scores=held_out.scores(before, clips)",
        EVALUATION,
    ),
    (
        "evaluated a step early",
        TRAINER,
        "every is not None and step % every == 0",
        "every is not None and (step + 1) % every == 0",
        EVALUATION,
    ),
    ("no checkpoint at the end", TRAINER, "or step == self._config.steps or", "or", EVALUATION),
    # The gallery and the preference dataset of a run.
    (
        "the narrowest pairs shown",
        GALLERY,
        "key=lambda pair: pair.gap, reverse=True",
        "key=lambda pair: pair.gap",
        REPLAY,
    ),
    (
        "shown winners are losers",
        GALLERY,
        "winner=_decoded(model, winners)",
        "winner=_decoded(model, losers)",
        REPLAY,
    ),
    (
        "pairs of one process alone recorded",
        TRAINER,
        "if not self._processes.team.first:",
        "if not self._processes.first:",
        TWO,
    ),
    ("every member of a team records", TRAINER, "if not self._processes.team.first:", "if False:", TWO),
    (
        "steps without pairs never forgotten",
        TRAINER,
        'self._steps_without_pairs = 0 if result.metrics["pairs"] else self._steps_without_pairs + 1',
        'self._steps_without_pairs += not result.metrics["pairs"]',
        FAULTS,
    ),
    (
        "one step without pairs too many",
        TRAINER,
        "self._steps_without_pairs >= _MOST_STEPS_WITHOUT_PAIRS",
        "self._steps_without_pairs > _MOST_STEPS_WITHOUT_PAIRS",
        FAULTS,
    ),
    # What a resumed run takes up.
    (
        "the guards' state not restored",
        TRAINER,
        'self._monitor.load(checkpoint.state.get("guards", RewardMonitor.NOTHING))',
        "pass",
        (*MONITOR, *RESUME),
    ),
    (
        "the guards' state not saved",
        TRAINER,
        'snapshot["state"]["guards"] = self._monitor.state()',
        "pass",
        (*MONITOR, *RESUME),
    ),
    (
        "the optimizer's settings may change",
        START,
        '"checkpoint", "processes", "log")',
        '"checkpoint", "processes", "log", "optimizer")',
        FAULTS,
    ),
    (
        "the reference's settings may change",
        START,
        '"checkpoint", "processes", "log")',
        '"checkpoint", "processes", "log", "reference")',
        FAULTS,
    ),
    (
        "the rules of pairs may change",
        START,
        '"checkpoint", "processes", "log")',
        '"checkpoint", "processes", "log", "pairs")',
        FAULTS,
    ),
    (
        "pairs_per_step may change",
        START,
        '"checkpoint", "processes", "log")',
        '"checkpoint", "processes", "log", "pairs_per_step")',
        FAULTS,
    ),
    (
        "the guards may change",
        START,
        '"checkpoint", "processes", "log")',
        '"checkpoint", "processes", "log", "guards")',
        FAULTS,
    ),
    (
        "the steps of evaluations may change",
        START,
        "if saved.held_out_steps != config.held_out_steps:",
        "if False:",
        FAULTS,
    ),
    (
        "the policy's files not in the manifest",
        CHECKPOINT,
        'root.rglob("*") if item.is_file()',
        'root.glob("*") if item.is_file()',
        DISK,
    ),
    ("nothing synced", CHECKPOINT, "os.fsync(descriptor)", "pass", DISK),
    (
        "reading deletes an unfinished save",
        CHECKPOINT,
        "_settle_interrupted(folder, remove=False)",
        "_settle_interrupted(folder)",
        DISK,
    ),
    (
        "lines of the step before overwritten",
        DATASET,
        '.open("ab", buffering=0)',
        '.open("wb", buffering=0)',
        REPLAY,
    ),
    ("latents of the first process for all", DATASET, 'values["step"], rank)', 'values["step"], 0)', TWO),
    (
        "scores by candidate number, not by place",
        DATASET,
        "place = self.candidates.index(candidate)",
        "place = candidate % len(self.candidates)",
        ("tests/data_layer/test_preference_dataset.py",),
    ),
    (
        "latents of later steps not cut",
        DATASET,
        "latents.unlink()",
        "pass",
        ("tests/data_layer/test_preference_dataset.py",),
    ),
    (
        "the seed left out of the prompts' order",
        PROMPTS,
        "repr((self._seed, epoch))",
        "repr(epoch)",
        ("tests/data_layer/test_prompts.py",),
    ),
    (
        "places beyond the prompts not walked on",
        PROMPTS,
        "if place < len(self._prompts): return place",
        "return place % len(self._prompts)",
        ("tests/data_layer/test_prompts.py",),
    ),
    # Guards and scores.
    (
        "the floor of still candidates is that of all prompts",
        GUARDS,
        "selected.amin(dim=1, keepdim=True)",
        "selected.amax(dim=0, keepdim=True)",
        REPLAY,
    ),
    (
        "rewards differ a little and pass",
        GUARDS,
        "if not torch.equal(once.view(torch.int32), again.view(torch.int32)):",
        "if not torch.allclose(once, again):",
        GUARD_TESTS,
    ),
    (
        "clips that score lower count as higher",
        GUARDS,
        "(own[name] > other[name])",
        "(own[name] != other[name])",
        GUARD_TESTS,
    ),
    ("prompts exchanged with themselves", GUARDS, "if prompts[index] != prompt)", ")", GUARD_TESTS),
    ("the trend of the first observations", GUARDS, "deque(maxlen=window)", "deque()", GUARD_TESTS),
    (
        "the deviation of a sample, not of all",
        COMBINE,
        "off.square().mean(dim=-1, keepdim=True)",
        "off.square().sum(dim=-1, keepdim=True) / (off.shape[-1] - 1)",
        REPLAY,
    ),
    ("equal scores are not 0", COMBINE, "torch.where(constant, 0.0,", "torch.where(constant, exact,", REPLAY),
    (
        "motion is part of all dimensions",
        COMBINE,
        "tuple(name for name in known if name != MOTION)",
        "tuple(known)",
        ("tests/rewards/test_combine.py", *GUARD_TESTS),
    ),
    # The optimizer.
    (
        "the norm is a sum of norms",
        OPTIMIZER,
        "torch.linalg.vector_norm(torch.stack(norms))",
        "torch.stack(norms).sum()",
        REPLAY,
    ),
    (
        "gradients of the update before kept",
        OPTIMIZER,
        "self._library.set_rate(rate) for parameter in self._parameters: parameter.grad = None",
        "self._library.set_rate(rate)",
        OPTIMIZER_TESTS,
    ),
    (
        "the rate of the first parameter alone",
        OPTIMIZER,
        "for library in self._libraries: library",
        "for library in self._libraries[:1]:\n            library",
        REPLAY,
    ),
    (
        "the same rounding in every step",
        OPTIMIZER,
        "rounding_offsets(weight, self._seed, self.steps, number)",
        "rounding_offsets(weight, self._seed, 0, number)",
        OPTIMIZER_TESTS,
    ),
    (
        "the same rounding in every parameter",
        OPTIMIZER,
        "rounding_offsets(weight, self._seed, self.steps, number)",
        "rounding_offsets(weight, self._seed, self.steps, 0)",
        OPTIMIZER_TESTS,
    ),
    (
        "a norm that is not finite is stepped by",
        OPTIMIZER,
        "self._check(value)",
        "pass",
        OPTIMIZER_TESTS,
    ),
    (
        "moments not restored, but the count of their steps",
        OPTIMIZER,
        "name: value.to(places[name], copy=True) for",
        "name: value.to(places[name], copy=True) * (name == _STEP) for",
        RESUME,
    ),
    # Batches, the 8-bit copy and the reference's storages.
    (
        "a batch that did not fit computed last",
        BATCHES,
        "waiting.insert(0, batch)",
        "waiting.append(batch)",
        BATCH_TESTS,
    ),
    ("halved again and again", BATCHES, "if self._halved or size == 1:", "if size == 1:", BATCH_TESTS),
    (
        "batches of one more than fits",
        BATCHES,
        "size is None or len(self) <= size:",
        "size is None or len(self) <= size + 1:",
        BATCH_TESTS,
    ),
    (
        "scales of the copy by column",
        COPY,
        "x.abs().amax(1)",
        "x.abs().amax().expand(len(x))",
        (
            "tests/rewards/test_quantize.py",
            "tests/rollout/test_exact_rollout.py",
            "tests/rollout/test_explore.py",
        ),
    ),
    (
        "the copy's scales stay as they were",
        COPY,
        "self.scales.copy_(scales)",
        "pass",
        ("tests/rollout/test_approximations.py", "tests/wiring/test_samplers.py"),
    ),
    (
        "int8 codes refreshed without their scales",
        WEIGHTS,
        "self._scales.copy_(weight.abs().amax(dim=-1) / 127)",
        "self._scales.add_((weight.abs().amax(dim=-1) / 127) * (self._scales == 0))",
        STORES,
    ),
    ("int8 scales not restored", WEIGHTS, 'self._scales.copy_(parts["scales"])', "pass", (*STORES, *RESUME)),
    ("int8 codes not restored", WEIGHTS, 'self._codes.copy_(parts["codes"])', "pass", (*STORES, *RESUME)),
    ("a bfloat16 matrix not restored", WEIGHTS, 'self._weight.copy_(parts[""])', "pass", STORES),
    (
        "buffers shared with the policy",
        NETWORK,
        "{id(buffer): buffer.detach().clone() for buffer",
        "{id(buffer): buffer for buffer",
        STORES,
    ),
    (
        "trained parameters shared with the policy",
        NETWORK,
        "elif id(parameter) not in encoded: memo[id(parameter)] = "
        "nn.Parameter(parameter.detach().clone(), requires_grad=False)",
        "elif id(parameter) not in encoded:\n                memo[id(parameter)] = parameter",
        REPLAY,
    ),
    (
        "an exact reference encoded from the policy before",
        EXACT,
        "encode_delta(reference, self.policy.detach().bfloat16(), out=old)",
        "encode_delta(reference, reference.clone(), out=old)",
        FAULTS,
    ),
    (
        "an exact reference not restored",
        EXACT,
        'self._held = OrderedDelta(**own) if "difference" in own else own["bfloat16"]',
        "pass",
        RESUME,
    ),
]
