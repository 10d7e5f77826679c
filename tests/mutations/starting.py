"""Mistakes in how a run begins, stops, goes on and is compared, and in how its settings are read."""

TRAINER = "vpo_engine/trainer.py"
START = "vpo_engine/runs/start.py"
STOPPING = "vpo_engine/distributed/stopping.py"
LOG = "vpo_engine/runs/log.py"
LOCK = "vpo_engine/runs/lock.py"
SIGNALS = "vpo_engine/runs/signals.py"
YAML = "vpo_engine/config/yaml_values.py"
CONFIG_FILE = "vpo_engine/config_file.py"
EVALUATE = "vpo_engine/evaluation/finished_runs.py"
STEP = "vpo_engine/online_vpo.py"
METHOD = "vpo_engine/method.py"
TRAINING = "vpo_engine/training.py"

STOPS = ("tests/wiring/test_stopping.py",)
AT_ANY_PLACE = (
    "tests/wiring/test_stopping.py::test_a_signal_at_any_place_loses_nothing",
    "tests/wiring/test_stopping.py::test_a_signal_between_two_steps_is_as_good",
)
STARTS = ("tests/runs/test_start.py",)
LOGS = ("tests/runs/test_log.py",)
LOCKS = ("tests/runs/test_lock.py",)
SETTINGS = ("tests/test_config.py",)
COMMANDS = ("tests/test_command.py",)
COMPARES = ("tests/test_evaluate.py",)

MUTATIONS = [
    # Stopping.
    (
        "a signal is not looked at inside of a step",
        STOPPING,
        "if self._inside and self.requested():",
        "if False:",
        STOPS,
    ),
    (
        "a step that was given up is trained on",
        STOPPING,
        "if self._processes.any(left or self.requested()): raise StepAbandonedError",
        "if False: raise StepAbandonedError",
        STOPS,
    ),
    (
        "the step that was given up is saved as finished",
        TRAINER,
        "step = self._done if step and self._saved_at != step:",
        "step = self._done + 1\n        if step and self._saved_at != step:",
        STOPS,
    ),
    (
        "the last finished step is not saved",
        TRAINER,
        "if step and self._saved_at != step:",
        "if False:",
        AT_ANY_PLACE,
    ),
    (
        "the evaluation that was given up is not made again",
        TRAINER,
        "if self._evaluation_missing:",
        "if False:",
        STOPS,
    ),
    ("an evaluation is made twice", TRAINER, "due and not evaluation", "due", STOPS),
    ("a stopped run ends with 0", SIGNALS, "return 128 + received", "return 0", STOPS),
    ("a second signal is ignored", SIGNALS, "raise KeyboardInterrupt(", "return  # (", STOPS),
    (
        "an update is given up after its first optimizer step",
        STEP,
        "unchanged = update == 0 and",
        "unchanged = True and",
        (
            "tests/wiring/test_stopping.py::test_a_signal_in_the_second_update_of_a_step_waits_for_the_end_of_the_step",
        ),
    ),
    (
        "a step that has changed weights in its backward pass is given up",
        STEP,
        "update == 0 and not self.config.memory.step_in_backward",
        "update == 0",
        (f"{STOPS[0]}::test_a_step_that_changes_weights_in_the_backward_pass_is_not_given_up",),
    ),
    (
        "a process leaves an update in lockstep alone",
        STEP,
        "self.stopping.stoppable(together) if unchanged",
        "self.stopping.stoppable() if unchanged",
        (f"{STOPS[0]}::test_a_process_does_not_leave_an_update_that_processes_make_in_lockstep",),
    ),
    (
        "a run that was stopped counts as finished",
        "vpo_engine/ending.py",
        '"finished" if self.stopped_by is None else',
        '"finished" if True else',
        (f"{STOPS[0]}::test_a_longer_run_that_is_stopped_in_its_last_evaluation_is_not_finished",),
    ),
    (
        "a run begins where it was before its lock was free",
        TRAINING,
        "start = find_start(config)  # another process may have ended meanwhile",
        "pass",
        (
            "tests/wiring/test_faults.py::"
            "test_a_run_begins_where_another_process_has_left_it_before_it_gave_the_lock",
        ),
    ),
    (
        "a resumed run does not check its reward",
        TRAINER,
        "self._check_reward(exchange=False)",
        "pass",
        (
            "tests/wiring/test_faults.py::"
            "test_a_reward_that_is_no_longer_deterministic_stops_a_run_when_it_is_resumed",
        ),
    ),
    (
        "a loss that is not finite is stepped by",
        "vpo_engine/method.py",
        "if not math.isfinite(loss):",
        "if False:",
        (*STOPS, "tests/test_online_vpo.py"),
    ),
    (
        "latents that are not finite are decoded",
        "vpo_engine/values.py",
        "if not torch.isfinite(latents).all():",
        "if False:",
        STOPS,
    ),
    # Going on.
    (
        "a finished run is trained again",
        START,
        "newest == config.steps and settings.from_ is None",
        "False",
        (*STARTS, *STOPS),
    ),
    (
        "resume without a run begins anew",
        START,
        "if asked: raise ValueError(_nothing_there(root, config.name))",
        "pass",
        STARTS,
    ),
    ("damaged checkpoints are no checkpoints", START, "if asked or broken:", "if asked:", STARTS),
    ("the oldest checkpoint", START, "return saved[max(saved)]", "return saved[min(saved)]", STARTS),
    (
        "any settings continue a run",
        START,
        'if different: raise ValueError( f"{saved_config.parent} holds',
        'if False: raise ValueError( f"{saved_config.parent} holds',
        STARTS,
    ),
    (
        "the saved configuration asks to resume",
        START,
        '"resume": "auto", "from_": None',
        '"resume": config.checkpoint.resume, "from_": config.checkpoint.from_',
        STARTS,
    ),
    (
        "a restarted process begins anew",
        START,
        '"TORCHELASTIC_RESTART_COUNT", "0")) > 0',
        '"TORCHELASTIC_RESTART_COUNT", "0")) > 9',
        STARTS,
    ),
    (
        "rows of the step itself are dropped",
        LOG,
        'step > 0 and int(row["step"]) <= step',
        'step > 0 and int(row["step"]) < step',
        LOGS,
    ),
    ("rows before the first step are kept", LOG, "return step > 0 and int", "return int", LOGS),
    ("the evaluation at the end stands twice", LOG, "last if step == last else None", "None", LOGS),
    ("a lock does not lock", LOCK, "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", LOCKS),
    ("a removed lock counts as held", LOCK, "if self._is_in_place(): break", "break", LOCKS),
    ("the lock stays after the end", LOCK, "self._path.unlink(missing_ok=True) os.close", "os.close", LOCKS),
    # Settings.
    (
        "the last of two equal keys wins",
        YAML,
        "if key.value in lines and key.tag != _MERGE:",
        "if False:",
        SETTINGS,
    ),
    (
        "text that looks like a number becomes one",
        YAML,
        "if kinds & {str, Path}: return text",
        "pass",
        SETTINGS,
    ),
    (
        "true is the number 1",
        YAML,
        "if _BOOL.fullmatch(text) and (bool in kinds or Any in kinds):",
        "if _BOOL.fullmatch(text):",
        SETTINGS,
    ),
    (
        "an argument ends at a comment",
        YAML,
        "text.strip(), style=None",
        "text.split(' #')[0].strip(), style=None",
        SETTINGS,
    ),
    ("tags are obeyed", YAML, "if node.tag not in _KNOWN_TAGS:", "if False:", SETTINGS),
    (
        "a missing path means the shipped file of its name",
        CONFIG_FILE,
        "if source.name == str(source):",
        "if True:",
        SETTINGS,
    ),
    ("an argument is blamed on the file", CONFIG_FILE, "settings.origins[key] = ARGUMENT", "pass", SETTINGS),
    ("missing files are found later", CONFIG_FILE, "if not os.path.exists(path):", "if False:", COMMANDS),
    (
        "the home folder is a folder called ~",
        "vpo_engine/config/section.py",
        "path = value.expanduser()",
        "path = value",
        SETTINGS,
    ),
    (
        "the warm-up goes beyond the run",
        "vpo_engine/memory/optimizer.py",
        "min(settings.warmup_steps, steps - 1)",
        "settings.warmup_steps",
        ("tests/memory/test_policy_optimizer.py",),
    ),
    # Comparing.
    (
        "runs of other settings are seeds",
        "vpo_engine/evaluation/finished_runs.py",
        "if different:",
        "if False:",
        COMPARES,
    ),
    (
        "a seed counts twice",
        "vpo_engine/evaluation/finished_runs.py",
        "if other.config.seed == run.config.seed:",
        "if False:",
        COMPARES,
    ),
    (
        "every process speaks",
        "vpo_engine/command.py",
        'if int(os.environ.get("LOCAL_RANK", "0")) == 0:',
        "if True:",
        COMMANDS,
    ),
    (
        "torchrun is told nothing",
        "vpo_engine/command.py",
        "tell_torchrun(printable(message))",
        "pass",
        COMMANDS,
    ),
    (
        "a full disk is noticed when it is full",
        "vpo_engine/checkpoint_size.py",
        "if free < number * size + SPARE_BYTES:",
        "if False:",
        ("tests/test_checkpoint_size.py",),
    ),
    (
        "a moving average may begin when a run goes on",
        START,
        '"distributed", "log", "memory.limit_gib",',
        '"distributed", "log", "ema", "memory.limit_gib",',
        ("tests/wiring/test_faults.py::test_a_run_is_not_resumed_with_other_settings",),
    ),
]
