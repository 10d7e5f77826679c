"""Mistakes of several processes in a step, and of runs that are stopped, killed or gone back with."""

MUTATIONS = [
    (
        "a process without a part of the weights does not gather",
        "vpo_engine/memory/zero.py",
        "step = self._processes.largest(step)",
        "pass",
        (
            "tests/distributed/test_zero.py::test_a_process_that_steps_no_part_of_a_weight_joins_in_gathering_the_moments",
        ),
    ),
    (
        "each process checks the reward for itself",
        "vpo_engine/metrics/held_out.py",
        "json.loads(self._processes.broadcast_text(said))",
        "json.loads(said)",
        ("tests/wiring/test_evaluation.py::test_what_the_first_process_finds_of_the_reward_counts_for_all",),
    ),
    (
        "the average takes in the weights before the step",
        "vpo_engine/method.py",
        "norm = self.optimizer.step() if self.average is not None: self.average.update() return norm",
        "if self.average is not None:\n            self.average.update()\n        return self.optimizer.step()",
        ("tests/wiring/test_replay.py::test_the_average_takes_in_the_weights_that_a_step_has_made",),
    ),
    (
        "the error of a mean counts the timesteps of a pair as pairs",
        "vpo_engine/online_vpo.py",
        "DPO.means(totals, samples, total)",
        "DPO.means(totals, samples, samples)",
        ("tests/wiring/test_replay.py::test_the_error_of_a_mean_counts_pairs_and_not_their_timesteps",),
    ),
    (
        "gradients: a signal waits for the end of the step",
        "vpo_engine/reward_gradient_method.py",
        "with self.stopping.stoppable(): local = self._backward(prompts)",
        "local = self._backward(prompts)",
        (
            "tests/wiring/test_methods.py::test_a_signal_is_followed_before_the_next_micro_batch_and_the_step_given_up",
        ),
    ),
    (
        "gradients: nobody looks for a signal before a micro-batch",
        "vpo_engine/reward_gradient_method.py",
        "self.stopping.check() chosen = prompts[start : start + size]",
        "chosen = prompts[start : start + size]",
        (
            "tests/wiring/test_methods.py::test_a_signal_is_followed_before_the_next_micro_batch_and_the_step_given_up",
        ),
    ),
    (
        "a process with a slice leaves a share of its team in the middle of a pass",
        "vpo_engine/distributed/stopping.py",
        "self._open, self._inside = not sliced,",
        "self._open, self._inside = True,",
        (
            "tests/distributed/test_sequence_runs.py::test_a_process_with_a_slice_does_not_leave_a_share_of_its_team_either",
        ),
    ),
    (
        "one half of a couple leaves the other waiting while pairs are sampled once",
        "vpo_engine/offline_dpo.py",
        "together=self.processes.team.count > 1",
        "together=False",
        (
            "tests/wiring/test_sampled_pairs.py::test_no_member_of_a_team_leaves_the_others_while_pairs_are_sampled",
        ),
    ),
    (
        "waiting for a team or a unit counts as work",
        "vpo_engine/distributed/processes.py",
        "made[number], stages=self.stages",
        "made[number]",
        ("tests/distributed/test_sequence_runs.py::test_processes_wait_for_their_team_and_unit_as_for_all",),
    ),
    (
        "the groups of units have torch's limit",
        "vpo_engine/distributed/processes.py",
        "_sequence=self._among(units, limit)",
        "_sequence=self._among(units, None)",
        ("tests/distributed/test_sequence_runs.py::test_processes_wait_for_their_team_and_unit_as_for_all",),
    ),
    (
        "gradients: T2V-Turbo scores the same random frames in every step",
        "vpo_engine/t2v_turbo.py",
        'self.config.seed, "t2v_turbo", number)',
        'self.config.seed, "t2v_turbo", 0)',
        ("tests/methods/test_baselines.py::test_t2v_turbo_draws_the_frames_of_each_step_by_the_seed",),
    ),
    (
        "a run that goes back keeps the checkpoints that it gives up",
        "vpo_engine/runs/log.py",
        "delete_after(self._run.checkpoints, step)",
        "pass",
        (
            "tests/wiring/test_resume.py::test_a_run_that_went_back_and_ended_before_its_next_save_goes_on_from_there",
        ),
    ),
    (
        "the checkpoint that a run goes back to is given up as well",
        "vpo_engine/runs/checkpoint.py",
        "if other > step:",
        "if other >= step:",
        (
            "tests/wiring/test_resume.py::test_a_run_that_went_back_and_ended_before_its_next_save_goes_on_from_there",
        ),
    ),
    (
        "clips of steps that were given up stay",
        "vpo_engine/runs/log.py",
        "if clips > self._run.pairs_file(step): clips.unlink()",
        "pass",
        ("tests/wiring/test_resume.py::test_clips_that_a_run_gives_up_are_not_shown",),
    ),
    (
        "clips of an earlier end stay",
        "vpo_engine/runs/log.py",
        "for result in (self._run.summary, self._run.held_out_gallery):",
        "for result in (self._run.summary,):",
        ("tests/wiring/test_resume.py::test_clips_that_a_run_gives_up_are_not_shown",),
    ),
    (
        "a job that Slurm requeues goes back again",
        "vpo_engine/runs/attempts.py",
        'int(os.environ.get("SLURM_RESTART_COUNT", "0"))',
        "0",
        (
            "tests/runs/test_start.py::test_a_job_that_slurm_requeues_keeps_what_it_has_saved_since_it_went_back",
        ),
    ),
    (
        "torchrun starts a run again that an alarm has stopped",
        "vpo_engine/train.py",
        "if start.root is not None and stopped_by_alarm(start.root): say(",
        "if False:\n            say(",
        ("tests/wiring/test_resume.py::test_what_torchrun_starts_again_after_an_alarm_does_not_go_on",),
    ),
    (
        "other processes go on after an alarm",
        "vpo_engine/train.py",
        "return 1 if start.root is not None and stopped_by_alarm(start.root) else None",
        "return None",
        ("tests/wiring/test_resume.py::test_what_torchrun_starts_again_after_an_alarm_does_not_go_on",),
    ),
    (
        "an alarm ends a run as a signal does",
        "vpo_engine/ending.py",
        '"alarm" if self.alarmed else "stopped"',
        '"stopped"',
        ("tests/wiring/test_resume.py::test_what_torchrun_starts_again_after_an_alarm_does_not_go_on",),
    ),
    (
        "a person cannot go on after an alarm",
        "vpo_engine/runs/attempts.py",
        "return _restarts()[1] > 0 and bool(lines) and lines[-1]",
        "return bool(lines) and lines[-1]",
        ("tests/wiring/test_resume.py::test_what_torchrun_starts_again_after_an_alarm_does_not_go_on",),
    ),
    (
        "folders of a run before its configuration",
        "vpo_engine/runs/directory.py",
        "run = cls(root) run.write_config(config_yaml)",
        "run = cls(root)\n        run.checkpoints.mkdir()\n        run.write_config(config_yaml)",
        ("tests/wiring/test_full_disk.py",),
    ),
    (
        "what is left of a configuration blocks its folder",
        "vpo_engine/runs/directory.py",
        'item.name in (LOCK_NAME, f".{CONFIG_NAME}.tmp")',
        "item.name in (LOCK_NAME,)",
        (
            "tests/runs/test_start.py::test_what_was_killed_before_its_configuration_was_in_place_starts_again",
        ),
    ),
    (
        "the log is not on the disk before a checkpoint",
        "vpo_engine/trainer.py",
        "self._log.sync()",
        "pass",
        (
            "tests/wiring/test_killed_anywhere.py::test_rows_and_pairs_are_on_the_disk_before_the_checkpoint_of_their_step",
        ),
    ),
    (
        "pairs are not on the disk before a checkpoint",
        "vpo_engine/trainer.py",
        "self._recorder.sync()",
        "pass",
        (
            "tests/wiring/test_killed_anywhere.py::test_rows_and_pairs_are_on_the_disk_before_the_checkpoint_of_their_step",
        ),
    ),
    (
        "latents are not on the disk before a checkpoint",
        "vpo_engine/data/preference_dataset.py",
        "(*self._unsynced, lines, self._folder, latents)",
        "(lines, self._folder, latents)",
        (
            "tests/wiring/test_killed_anywhere.py::test_rows_and_pairs_are_on_the_disk_before_the_checkpoint_of_their_step",
        ),
    ),
    (
        "the configuration is not on the disk",
        "vpo_engine/runs/directory.py",
        "write_whole(self.config, text, sync=True)",
        "write_whole(self.config, text)",
        (
            "tests/wiring/test_killed_anywhere.py::test_rows_and_pairs_are_on_the_disk_before_the_checkpoint_of_their_step",
        ),
    ),
    (
        "evaluations of other clips are compared after a resume",
        "vpo_engine/metrics/reward_monitor.py",
        'self._comparable = state.get("clips", self._clips) == self._clips',
        "self._comparable = True",
        ("tests/test_reward_monitor.py",),
    ),
    (
        "the alarms of an evaluation are written after its row",
        "vpo_engine/trainer.py",
        "self._raise_alarms(alarms)  # before the row, by which the next start takes the evaluation for made",
        "alarms, late = (), alarms",
        (
            "tests/wiring/test_resume.py::test_an_alarm_outlives_a_kill_while_the_clips_of_its_evaluation_are_shown",
        ),
    ),
    (
        "an evaluation that is made again does not raise its alarm",
        "vpo_engine/trainer.py",
        "step - (due and not made)",
        "step",
        (
            "tests/wiring/test_resume.py::test_an_alarm_outlives_a_kill_while_the_clips_of_its_evaluation_are_shown",
        ),
    ),
    (
        "alarms of steps that were given up count as raised",
        "vpo_engine/trainer.py",
        '[each for each in known if each["step"] <= step - (due and not made)]',
        "list(known)",
        ("tests/wiring/test_resume.py::test_a_run_that_goes_back_behind_an_alarm_is_stopped_by_it_again",),
    ),
    (
        "a damaged checkpoint is noticed when the result is gone",
        "vpo_engine/training.py",
        "verify_checkpoint(checkpoint)",
        "pass",
        ("tests/wiring/test_faults.py::test_a_run_that_is_refused_to_go_on_keeps_its_result",),
    ),
    (
        "the newest checkpoint goes first",
        "vpo_engine/runs/checkpoint.py",
        "sorted(_all_saved(folder).items()):",
        "_all_saved(folder).items():",
        (
            "tests/runs/test_start.py::test_a_kill_among_the_deletions_of_a_run_that_goes_back_does_not_turn_it_round",
        ),
    ),
    (
        "an alarm of an earlier job ends a later one",
        "vpo_engine/runs/attempts.py",
        'lines[-1].get("ended") == "alarm" and _is_ours(begun)',
        'lines[-1].get("ended") == "alarm"',
        ("tests/runs/test_attempts.py",),
    ),
    (
        "commands of one Slurm job are the same",
        "vpo_engine/runs/attempts.py",
        'name != "none" else f"{socket.gethostname()}:{os.getppid()}"',
        'True else ""',
        (
            "tests/runs/test_start.py::test_another_command_of_a_slurm_job_goes_back_though_its_first_attempt_left_no_word",
        ),
    ),
    (
        "pairs that are sampled once are not on the disk",
        "vpo_engine/offline_dpo.py",
        "recorder.sync()",
        "pass",
        (
            "tests/wiring/test_sampled_pairs.py::test_sampled_pairs_are_on_the_disk_before_the_first_checkpoint",
        ),
    ),
    (
        "a process ends with an error while the report is written",
        "vpo_engine/trainer.py",
        "self._processes.wait()  # torchrun ends",
        "pass  # torchrun ends",
        (
            "tests/wiring/test_resume.py::test_no_process_ends_with_an_error_before_the_report_of_an_alarm_is_written",
        ),
    ),
    (
        "a disk that is full when rows are synced is not named",
        "vpo_engine/line_files.py",
        "with writing(self.path): os.fsync(self._file) def close",
        "os.fsync(self._file)\n\n    def close",
        ("tests/runs/test_log.py",),
    ),
]
