"""Mistakes beside the update: counts of work, errors, who judges, the parts that are moved, locks, tolerances."""

from mutations.tests_of import EVALUATION, FAULTS, REPLAY

STEP = "vpo_engine/online_vpo.py"
DPO = "vpo_engine/objectives/dpo.py"
METHOD = "vpo_engine/method.py"
BUILD = "vpo_engine/build.py"
TRAINING = "vpo_engine/training.py"
TRAINER = "vpo_engine/trainer.py"
STORE = "vpo_engine/reference/store.py"
HELD_OUT = "vpo_engine/metrics/held_out.py"
WATCH = "vpo_engine/metrics/step_watch.py"
CONSISTENCY = "vpo_engine/objectives/consistency.py"

SUMS = ("tests/test_dpo_sums.py",)
STORES = ("tests/reference/test_gathered_refresh.py",)
OFFLOAD = ("tests/memory/test_idle_offload_run.py",)
BUILT = ("tests/test_build_reward.py",)
ROOM = ("tests/test_checkpoint_size.py",)
WATCHED = ("tests/metrics/test_step_watch.py",)
GUARDS = ("tests/rewards/test_guards.py",)
FORMULAS = ("tests/methods/test_baselines.py",)
NOT_FINITE = ("tests/wiring/test_evaluation.py::test_an_evaluation_says_that_latents_are_not_finite",)

MUTATIONS = [
    # What the log counts.
    ("guided passes count three times", STEP, "2 if guided else 1", "3 if guided else 1", REPLAY),
    ("passes without guidance count twice", STEP, "2 if guided else 1", "2", REPLAY),
    (
        "inputs of the second pass do not count",
        STEP,
        "sum(network.take() for network in self._networks)",
        "self._networks[0].take()",
        REPLAY,
    ),
    (
        "the videos of one prompt alone count",
        STEP,
        "self.config.pairs_per_step * self.config.rollout.candidates",
        "self.config.rollout.candidates",
        REPLAY,
    ),
    ("the saturation of twice the margin", DPO, "(result.margin / 2).tanh()", "result.margin.tanh()", SUMS),
    (
        "the error of a mean that never falls below one",
        DPO,
        "max(variance, 0.0)",
        "max(variance, 1.0)",
        SUMS,
    ),
    (
        "the samples of a pair count as many",
        DPO,
        "max(variance, 0.0) / pairs",
        "max(variance, 0.0) / samples",
        SUMS,
    ),
    # Weights.
    ("one weight of 1 makes all weights 1", DPO, "(weights == 1).all()", "(weights == 1).any()", SUMS),
    (
        "a refresh does not gather what other processes hold",
        STORE,
        "policy.state_dict(keep_vars=True)",
        "policy.state_dict()",
        STORES,
    ),
    (
        "a refresh gathers the whole policy at once",
        STORE,
        "for names in _by_block(source)",
        "for names in [list(source)]",
        STORES,
    ),
    (
        "a refresh encodes weights that 8 bits cannot tell",
        STORE,
        'if self._storage == "exact8": check_on_grid({name: policy',
        "if False:\n            check_on_grid({name: policy",
        ("tests/reference/test_exact8.py",),
    ),
    (
        "a student's answer with its shares exchanged",
        CONSISTENCY,
        "skip * latents + out * clean",
        "out * latents + skip * clean",
        FORMULAS,
    ),
    # Parts that are moved to the host while they are idle.
    (
        "the reference always stays",
        METHOD,
        'self.idle_offload.register("reference", reference.tensors)',
        "pass",
        OFFLOAD,
    ),
    (
        "the optimizer always stays",
        METHOD,
        'self.idle_offload.register("optimizer", self.optimizer.tensors)',
        "pass",
        OFFLOAD,
    ),
    (
        "the average of the host is moved",
        METHOD,
        "if not settings.on_host:",
        "if True:",
        OFFLOAD,
    ),
    ("the average of the device stays", METHOD, "if not settings.on_host:", "if False:", OFFLOAD),
    (
        "the reward always stays",
        BUILD,
        'idle_offload.register("reward", lambda: module_tensors(network)) return',
        "pass\n    return",
        OFFLOAD,
    ),
    (
        "the judge always stays",
        BUILD,
        'model.idle_offload.register("judge", lambda: module_tensors(network))',
        "pass",
        OFFLOAD,
    ),
    (
        "decoder and reward take turns with every batch",
        "vpo_engine/rollout/sampler.py",
        "if self._take_turns:",
        "if False:",
        ("tests/rollout/test_overlap.py",),
    ),
    (
        "copies are written before they are complete",
        "vpo_engine/runs/saving.py",
        "copy.deepcopy(dict(state)) self._copies.wait()",
        "copy.deepcopy(dict(state))",
        ("tests/runs/test_saving.py",),
    ),
    # Who judges, and what it is compared with.
    (
        "a judge averages what it does not have",
        BUILD,
        'set(config.reward.dimensions) <= {"global", *judge.dimensions}',
        "True",
        BUILT,
    ),
    (
        "a judge never averages what is trained on",
        BUILD,
        'judge is None or set(config.reward.dimensions) <= {"global", *judge.dimensions}',
        "judge is None",
        BUILT,
    ),
    (
        "the base is compared with the policy",
        TRAINER,
        "self._monitor.observe(step, self._baseline, measured)",
        "self._monitor.observe(step, measured, self._baseline)",
        EVALUATION,
    ),
    (
        "a reward is checked with the prompt of another clip",
        HELD_OUT,
        "check_deterministic(reward, videos[0], captions[0])",
        "check_deterministic(reward, videos[0], captions[-1])",
        EVALUATION,
    ),
    (
        "two prompts are too few to exchange",
        HELD_OUT,
        "len(set(captions)) < 2",
        "len(set(captions)) <= 2",
        EVALUATION,
    ),
    (
        "motion as large as the floor is too little",
        "vpo_engine/rewards/guards.py",
        "scores[MOTION] < self.floor",
        "scores[MOTION] <= self.floor",
        GUARDS,
    ),
    (
        "no rise of the winners' error is tolerated",
        WATCH,
        "SHORTCUT_TOLERATED = 0.08",
        "SHORTCUT_TOLERATED = 0.0",
        WATCHED,
    ),
    ("no fall of motion is tolerated", WATCH, "MOTION_TOLERATED = 0.25", "MOTION_TOLERATED = 0.0", WATCHED),
    # The run's directory, its start and its end.
    (
        "training prompts that the model does not read are taken",
        BUILD,
        "notes += check_prompts(config, train, rows)",
        "pass",
        ("tests/test_opensora_run.py",),
    ),
    (
        "one half of a couple leaves the other waiting",
        STEP,
        "together=self.processes.team.count > 1",
        "together=False",
        (
            "tests/distributed/test_split_guidance.py"
            "::test_a_couple_goes_on_to_the_end_of_the_rollout_before_it_gives_the_step_up",
        ),
    ),
    (
        "alarms are not written",
        TRAINER,
        "write_alarms(self._run, [asdict(alarm) for alarm in self._monitor.alarms])",
        "pass",
        ("tests/test_train.py::test_a_run_leaves_everything_it_promises",),
    ),
    (
        "a full disk ends a run as if it were finished",
        TRAINER,
        '"a disk without room", exit_code=1',
        '"a disk without room", exit_code=0',
        ("tests/wiring/test_full_disk.py",),
    ),
    (
        "a full disk does not stop a run",
        TRAINER,
        "return answer > 0 or self._alarmed",
        "return answer > 0 and self._alarmed",
        ("tests/wiring/test_full_disk.py",),
    ),
    (
        "room is looked for on another disk",
        TRAINING,
        'start.root or Path("runs")',
        'start.root and Path("runs")',
        ROOM,
    ),
    (
        "a run directory that was named is not locked",
        TRAINING,
        "at_end.enter_context(RunLock(start.root))",
        "pass",
        FAULTS,
    ),
    (
        "a run directory that was not named is not locked",
        TRAINING,
        "at_end.enter_context(RunLock(run.root))",
        "pass",
        FAULTS,
    ),
    (
        "a time at the end of the schedule",
        DPO,
        ".clamp(1e-6, 1 - 1e-6)",
        "",
        ("tests/wiring/test_randomness.py::test_a_time_is_never_the_end_of_the_schedule",),
    ),
    (
        "the last integer is never drawn",
        "vpo_engine/seeding.py",
        "_number(seed, *key) % count",
        "_number(seed, *key) % max(1, count - 1)",
        ("tests/wiring/test_randomness.py::test_every_integer_below_the_count_is_drawn_about_equally_often",),
    ),
    (
        "latents of other processes take no room",
        TRAINER,
        "writers = processes.count if",
        "writers = 1 if",
        ("tests/wiring/test_full_disk.py::test_latents_of_all_processes_are_counted",),
    ),
    (
        "a run near its end needs the room of the whole",
        TRAINING,
        "check_run_fits(config, model, root, step_of(start.checkpoint))",
        "check_run_fits(config, model, root, 0)",
        ("tests/wiring/test_full_disk.py::test_a_run_near_its_end_needs_the_room_of_the_rest_only",),
    ),
    (
        "checkpoints that are there need room once more",
        "vpo_engine/checkpoint_size.py",
        "config.checkpoint.keep + 1 - present",
        "config.checkpoint.keep + 1",
        ("tests/test_checkpoint_size.py::test_checkpoints_that_are_there_need_no_more_room",),
    ),
    (
        "a team's inputs counted by each member",
        STEP,
        "len(pairs) / self.processes.team_size",
        "len(pairs)",
        ("tests/test_teams.py::test_two_processes_share_the_candidates_of_a_prompt_and_train_as_one",),
    ),
    # What the log says of the reference.
    *(
        (
            f"the reference's error of the {member} is that of the {other}",
            DPO,
            f'"reference_{member}_error": result.reference_{member}_error',
            f'"reference_{member}_error": result.reference_{other}_error',
            ("tests/wiring/test_replay.py::test_the_log_says_what_the_rules_give",),
        )
        for member, other in (("winner", "loser"), ("loser", "winner"))
    ),
    # Processes that keep step with each other.
    (
        "a last small micro-batch is no pass",
        STEP,
        "-(-samples // size)",
        "samples // size",
        ("tests/test_updates.py::test_a_process_with_fewer_micro_batches_makes_passes_that_add_nothing",),
    ),
    (
        "a batch is halved behind the other process",
        STEP,
        "Batches(config.batch_limit, halved=alone)",
        "Batches(config.batch_limit)",
        (
            "tests/distributed/test_split_guidance.py::"
            "test_a_step_that_two_processes_compute_together_does_not_halve_its_batch",
        ),
    ),
    (
        "latents of which one number is finite are decoded",
        "vpo_engine/values.py",
        "if not torch.isfinite(latents).all():",
        "if not torch.isfinite(latents).any():",
        NOT_FINITE,
    ),
    (
        "an evaluation decodes whatever is sampled",
        HELD_OUT,
        "return self._model.decode(check_latents(latents))",
        "return self._model.decode(latents)",
        NOT_FINITE,
    ),
    (
        "the judge scores while the reward is on the device",
        HELD_OUT,
        'self._idle_offload.phase("reward" if name == "reward" else "judge"):',
        'self._idle_offload.phase("reward"):',
        (
            "tests/memory/test_idle_offload_run.py::"
            "test_the_scorers_of_an_evaluation_are_on_the_device_when_they_score",
        ),
    ),
    (
        "the process of a reward multiplies matrices with torch's precision",
        "vpo_engine/rewards/process.py",
        '"matmul_precision": torch.get_float32_matmul_precision(),',
        '"matmul_precision": "highest",',
        (
            "tests/rewards/test_process.py::TestScores::"
            "test_with_the_matrix_precision_of_the_process_that_starts_it",
        ),
    ),
]
