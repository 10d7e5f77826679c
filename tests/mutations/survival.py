"""Saving in the background, the watchdog, restarts and locks."""

SAVING, STATE = "vpo_engine/runs/saving.py", "vpo_engine/run_state.py"
WATCHDOG, STAGES = "vpo_engine/distributed/watchdog.py", "vpo_engine/distributed/stages.py"
BOARD, MEETING = "vpo_engine/distributed/board.py", "vpo_engine/distributed/meeting.py"
LOCK, ATTEMPTS = "vpo_engine/runs/lock.py", "vpo_engine/runs/attempts.py"
SAVES = ("tests/runs/test_saving.py", "tests/wiring/test_background.py")
WATCHED = ("tests/test_watchdog.py",)
MEETINGS = ("tests/test_meeting.py",)
LOCKS = ("tests/runs/test_lock.py",)
STOPPING = "vpo_engine/distributed/stopping.py"
TEAMS = (
    "tests/wiring/test_two_processes.py::test_a_team_is_stopped_in_the_middle_of_a_rollout_and_goes_on_bit_for_bit",
)
STARTS = ("tests/runs/test_attempts.py",)

MUTATIONS = [
    (
        "tensors written while they change",
        SAVING,
        "self._copies.tensors(tensors), copy",
        "tensors, copy",
        SAVES,
    ),
    ("the state written while it changes", SAVING, "copy.deepcopy(dict(state))", "state", SAVES),
    ("the policy written while it changes", STATE, "twin.network = copies.network(model.network)", "", SAVES),
    (
        "a second save does not wait",
        SAVING,
        "self.wait() self._copies.begin()",
        "self._copies.begin()",
        SAVES,
    ),
    ("an error of the writer is swallowed", SAVING, "raise error", "return", SAVES),
    ("the end does not wait", SAVING, "if kind is None: self.wait()", "if kind is None: pass", SAVES),
    (
        "a second signal waits",
        SAVING,
        "elif not issubclass(kind, KeyboardInterrupt):",
        "else:",
        ("tests/runs/test_saving.py",),
    ),
    (
        "the copies take memory anew",
        "vpo_engine/memory/host_copy.py",
        "self._slab, self._used = 0, 0 @property",
        "pass\n\n    @property",
        SAVES,
    ),
    ("no stage is ever too long", WATCHDOG, "word.seconds > word.limit + grace", "False", WATCHED),
    ("no time for the other to say it", WATCHDOG, "2 * self._interval", "0", WATCHED),
    ("those that wait are blamed", WATCHDOG, "if not now.waiting:", "if True:", WATCHED),
    (
        "auto limits the first time",
        "vpo_engine/distributed/watchdog.py",
        "if stage in self._stages.ended else FIRST_MINUTES",
        "if stage in self._stages.ended else 1.0",
        WATCHED,
    ),
    (
        "auto has no least time",
        WATCHDOG,
        "max(60 * (LEAST_MINUTES if stage in self._stages.ended else FIRST_MINUTES), longest)",
        "longest",
        WATCHED,
    ),
    ("the start has a limit", WATCHDOG, "if stage == STARTING:", "if False:", WATCHED),
    (
        "waiting counts as work",
        "vpo_engine/distributed/stages.py",
        "if not (now := self.now).waiting:",
        "now = self.now\n        if True:",
        WATCHED,
    ),
    ("the dead are missed at once", BOARD, "now - since > _NOTICE", "True", WATCHED),
    ("who took leave is missed", BOARD, 'self._get(f"{_LEFT} {rank}") is None', "True", WATCHED),
    ("the word of a dead process counts", MEETING, "words[rank] == own", "True", MEETINGS),
    ("the first waits for nobody", MEETING, "if not missing:", "if True:", MEETINGS),
    ("a living process counts as gone", LOCK, "not is_running(", "bool(", LOCKS),
    ("another container counts as this one", LOCK, 'holder.get("place") == here and', "", LOCKS),
    ("any job is the same", LOCK, 'own["job"] != holder.get("job") or', "", LOCKS),
    ("a run that was stopped has failed", ATTEMPTS, 'any("ended" in line for line in ends)', "False", STARTS),
    (
        "a run that was cut short at its end is finished",
        "vpo_engine/runs/start.py",
        "and not was_cut_short(run)",
        "",
        ("tests/wiring/test_stopping.py",),
    ),
    (
        "a team finishes its rollout before it stops",
        STOPPING,
        "left, self._inside = False, True",
        "left = False",
        TEAMS,
    ),
    ("one of a team leaves the others waiting", STOPPING, "if team.any(left):", "if left:", TEAMS),
    (
        "balanced computes in float32 beside an exact reference",
        "vpo_engine/planning/presets.py",
        "or _with_value(config, name, lean[name])",
        "",
        ("tests/test_presets.py",),
    ),
    (
        "prompt files that were checked are not read again when they change",
        "vpo_engine/data/prompt_settings.py",
        "and all(file.is_the_file_at_its_path for file in found[0].values())",
        "",
        ("tests/test_command.py",),
    ),
    (
        "the checkpoint that is being written is not waited for after divergence",
        "vpo_engine/trainer.py",
        "self._saver.settle()",
        "pass",
        (
            "tests/wiring/test_background.py::test_a_run_that_diverges_names_the_checkpoint_that_was_still_being_written",
        ),
    ),
    (
        "an alarm of the last step stops the run before its end",
        "vpo_engine/trainer.py",
        "if self._must_stop(stop) and step < total:",
        "if self._must_stop(stop):",
        ("tests/wiring/test_stopping.py::test_an_alarm_of_the_last_step_does_not_keep_the_run_from_its_end",),
    ),
    (
        "the background keeps one checkpoint more",
        SAVING,
        "tensors=kept, state=said, keep=self._keep",
        "tensors=kept, state=said, keep=self._keep + 1",
        ("tests/runs/test_saving.py::test_the_background_keeps_as_many_as_it_is_told",),
    ),
    (
        "a disk is judged while a checkpoint is written to it",
        "vpo_engine/trainer.py",
        "and not self._saver.writing",
        "",
        (
            "tests/wiring/test_background.py::test_the_room_on_the_disk_is_not_judged_while_a_checkpoint_is_written_to_it",
        ),
    ),
    (
        "one who came late to a meeting is counted as long there as the first",
        WATCHDOG,
        "min(word.seconds for word in everyone) > limit",
        "max(word.seconds for word in everyone) > limit",
        ("tests/test_watchdog.py::test_processes_that_meet_late_are_not_taken_for_a_deadlock",),
    ),
    (
        "auto lets all wait for each other for ten minutes only",
        WATCHDOG,
        "isinstance(self._minutes, float) else LEAST_MINUTES)",
        "isinstance(self._minutes, float) else TIMES_LONGEST)",
        ("tests/test_watchdog.py::test_auto_lets_all_wait_for_each_other_for_half_an_hour",),
    ),
    (
        "the group of all processes has torch's limit",
        "vpo_engine/distributed/processes.py",
        "world_size=count, timeout=limit)",
        "world_size=count)",
        ("tests/test_watchdog.py::test_every_group_has_the_limit_that_the_run_gives",),
    ),
    (
        "the groups of teams have torch's limit",
        "vpo_engine/distributed/processes.py",
        "dist.new_group(ranks, timeout=limit)",
        "dist.new_group(ranks)",
        ("tests/test_watchdog.py::test_every_group_has_the_limit_that_the_run_gives",),
    ),
    (
        "a process leaves the others of its unit in the middle of a pass",
        STOPPING,
        "sliced = self._processes.sequence.count > 1",
        "sliced = False",
        (
            "tests/distributed/test_sequence_runs.py::"
            "test_a_process_with_a_slice_goes_on_to_the_end_of_the_block_before_it_gives_the_step_up",
        ),
    ),
    (
        "a process of this machine counts as one of a machine that is lost",
        LOCK,
        'or holder.get("host") == socket.gethostname():',
        "or False:",
        ("tests/runs/test_lock.py::test_a_process_of_this_job_that_runs_here_keeps_its_lock",),
    ),
    (
        "the end of a longer name stays in the lock",
        LOCK,
        "os.truncate(self._file, 0)",
        "pass",
        ("tests/runs/test_lock.py::test_nothing_is_left_of_the_longer_name_of_a_dead_holder",),
    ),
    (
        "a zombie counts as running",
        "vpo_engine/distributed/machine.py",
        'not in ("Z", "X")',
        'not in ("X",)',
        ("tests/runs/test_lock.py::test_the_lock_that_outlives_a_dead_process_is_taken_over",),
    ),
    (
        "the background writes the policy for its average",
        "vpo_engine/run_state.py",
        "with average.in_place(): return policy_writer(algorithm.model, copies)",
        "return policy_writer(algorithm.model, copies)",
        ("tests/wiring/test_background.py::test_the_average_is_written_in_the_background_as_it_was",),
    ),
    (
        "a resumed run chooses its memory settings again",
        "vpo_engine/runs/start.py",
        'sections["memory"] = saved.memory',
        "pass",
        ("tests/runs/test_start.py::test_a_resumed_run_keeps_the_memory_settings_that_were_planned",),
    ),
    (
        "a resumed run is planned as if it were new",
        "vpo_engine/training.py",
        'return resolved_as_before(config, parse_config(text, "the saved configuration")) if text else config',
        "return config",
        ("tests/wiring/test_faults.py::test_a_resumed_run_is_planned_with_what_it_began_with",),
    ),
    (
        "the time of the last evaluation is in no number",
        "vpo_engine/trainer.py",
        'self._progress.stage("writing the report") self._take_seconds()',
        'self._progress.stage("writing the report")',
        ("tests/wiring/test_evaluation.py::test_the_time_of_the_last_evaluation_is_in_the_summary",),
    ),
    (
        "a process that fails takes its leave",
        "vpo_engine/distributed/watchdog.py",
        "and kind is None and not self._thread.is_alive()",
        "and not self._thread.is_alive()",
        ("tests/test_watchdog.py::test_a_process_that_fails_takes_no_leave",),
    ),
    (
        "the GPU is counted over all machines",
        "vpo_engine/distributed/processes.py",
        "chosen.index if chosen.index is not None else local_rank",
        "chosen.index if chosen.index is not None else rank",
        ("tests/test_teams.py::test_a_process_takes_the_gpu_of_its_number_on_its_machine",),
    ),
]
