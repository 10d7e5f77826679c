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
]
