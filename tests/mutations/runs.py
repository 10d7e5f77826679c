"""Mistakes around the step: evaluations, guards, the gallery, what a resumed run takes up."""

from mutations.tests_of import DISK, EVALUATION, FAULTS, REPLAY, RESUME, TWO

TRAINER = "vpo_engine/trainer.py"
STEP = "vpo_engine/online_vpo.py"
HELD_OUT = "vpo_engine/metrics/held_out.py"
GUARDS = "vpo_engine/rewards/guards.py"
COMBINE = "vpo_engine/rewards/combine.py"
START = "vpo_engine/runs/start.py"
GALLERY = "vpo_engine/run_gallery.py"
CHECKPOINT = "vpo_engine/runs/checkpoint.py"
DATASET = "vpo_engine/data/preference_dataset.py"
PROMPTS = "vpo_engine/data/prompts.py"
GUARD_TESTS = ("tests/rewards/test_guards.py",)
MONITOR = (
    "tests/test_reward_monitor.py",
    "tests/test_reward_monitor.py::test_alarms_reach_log_terminal_and_report_and_stop_a_run_that_goes_on_when_resumed",
)

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
        "vpo_engine/metrics/held_out.py",
        "units.gather(rows)[:total]",
        "units.gather(rows)",
        TWO,
    ),
    (
        "every process measures the first clips",
        "vpo_engine/metrics/held_out.py",
        "first = units.rank * each",
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
        "summarise(logged(self._baseline), logged(final),",
        "summarise(logged(final), logged(self._baseline),",
        EVALUATION,
    ),
    (
        "the time of a resumed run without what came before",
        TRAINER,
        "if self._resumed_at and self._processes.first:",
        "if False:",
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
        "vpo_engine/trainer.py",
        "if not self._processes.first_of_team:",
        "if not self._processes.first:",
        TWO,
    ),
    (
        "every member of a team records",
        "vpo_engine/trainer.py",
        "if not self._processes.first_of_team:",
        "if False:",
        TWO,
    ),
    (
        "steps without pairs never forgotten",
        "vpo_engine/online_vpo.py",
        'self.steps_without_pairs = 0 if metrics["pairs"] else self.steps_without_pairs + 1',
        'self.steps_without_pairs += not metrics["pairs"]',
        FAULTS,
    ),
    (
        "one step without pairs too many",
        "vpo_engine/online_vpo.py",
        "self.steps_without_pairs >= _MOST_STEPS_WITHOUT_PAIRS",
        "self.steps_without_pairs > _MOST_STEPS_WITHOUT_PAIRS",
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
        '"distributed", "log", "memory.limit_gib",',
        '"distributed", "log", "optimizer", "memory.limit_gib",',
        FAULTS,
    ),
    (
        "the reference's settings may change",
        START,
        '"distributed", "log", "memory.limit_gib",',
        '"distributed", "log", "reference", "memory.limit_gib",',
        FAULTS,
    ),
    (
        "the rules of pairs may change",
        START,
        '"distributed", "log", "memory.limit_gib",',
        '"distributed", "log", "pairs", "memory.limit_gib",',
        FAULTS,
    ),
    (
        "pairs_per_step may change",
        START,
        '"distributed", "log", "memory.limit_gib",',
        '"distributed", "log", "pairs_per_step", "memory.limit_gib",',
        FAULTS,
    ),
    (
        "the guards may change",
        START,
        '"distributed", "log", "memory.limit_gib",',
        '"distributed", "log", "guards", "memory.limit_gib",',
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
    ("nothing synced", "vpo_engine/full_disk.py", "os.fsync(descriptor)", "pass", DISK),
    (
        "reading deletes an unfinished save",
        CHECKPOINT,
        "_settle_interrupted(folder, remove=False)",
        "_settle_interrupted(folder)",
        DISK,
    ),
    (
        "lines of the step before overwritten",
        "vpo_engine/line_files.py",
        "os.O_WRONLY | os.O_APPEND | os.O_CREAT",
        "os.O_WRONLY | os.O_TRUNC | os.O_CREAT",
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
    (
        "files added to a checkpoint are taken",
        CHECKPOINT,
        "_refuse_added(path, manifest) for name, entry",
        "for name, entry",
        DISK,
    ),
    (
        "a manifest may lead out of its checkpoint",
        CHECKPOINT,
        'file_inside(path, name, manifest, "copy the checkpoint again")',
        "pass",
        DISK,
    ),
    (
        "push publishes what was changed",
        "vpo_engine/push.py",
        "verify_checkpoint(newest)",
        "pass",
        ("tests/test_push.py",),
    ),
    (
        "a shard may lie outside of its folder",
        "vpo_engine/weights.py",
        "file_inside(index.parent, name, index)",
        "index.parent / name",
        ("tests/test_weights.py",),
    ),
    (
        "links out of the base are exported",
        "vpo_engine/exporting/folder.py",
        'file_inside(path, inside.as_posix(), path, "take it out")',
        "pass",
        ("tests/test_no_foreign_code.py",),
    ),
    (
        "videos of 240p are enlarged",
        "vpo_engine/runs/video.py",
        "2 * side >= min_side",
        "side >= min_side",
        ("tests/runs/test_video.py",),
    ),
    (
        "playlists are opened",
        "vpo_engine/runs/video_file.py",
        '"format_whitelist": _FORMATS, "protocol_whitelist": "file", ',
        "",
        ("tests/runs/test_video_file.py",),
    ),
]
