"""Mistakes in what is known before a run begins: settings that are resolved or refused, and plans."""

MUTATIONS = [
    (
        "training prompts may be missing for any model",
        "vpo_engine/config/run.py",
        'and (name != "train" or self.card.prompts)',
        'and name != "train"',
        ("tests/test_config.py",),
    ),
    (
        "a preset is refused where a method does not use one of its settings",
        "vpo_engine/config/methods.py",
        'elif value != default and not (sections == ["memory"] and _of_preset(owner.preset, leaf, value)):',
        "elif value != default:",
        ("tests/test_config.py",),
    ),
    (
        "settings of the file that a method leaves out are not named",
        "vpo_engine/config_file.py",
        "Config.model_validate(settings.values).with_left_out(left_out)",
        "Config.model_validate(settings.values)",
        ("tests/test_config.py",),
    ),
    (
        "rewards take every model's videos for those of the sprites world",
        "vpo_engine/build.py",
        'fps=GEOMETRY.fps if config.model.kind == "sprites" else config.model.fps',
        "fps=GEOMETRY.fps",
        ("tests/test_build_reward.py",),
    ),
    (
        "the room that checkpoints have taken is needed again",
        "vpo_engine/disk_plan.py",
        "max(0, fixed - fixed_here)",
        "fixed",
        ("tests/test_disk_plan.py",),
    ),
    (
        "the run of all processes must fit one",
        "vpo_engine/planning/planner.py",
        "plan = plan_run(config, gpu, processes) if not plan.fits",
        "plan = plan_run(config, gpu)\n    if not plan.fits",
        ("tests/planning/test_plan.py::test_a_run_of_several_processes_is_planned_as_one_of_them",),
    ),
    (
        "the text is encoded in every planned step",
        "vpo_engine/planning/estimate.py",
        "[phase.seconds for phase in self.phases if phase.name not in self.before]",
        "[phase.seconds for phase in self.phases]",
        (
            "tests/planning/test_plan.py::test_a_step_takes_the_seconds_of_its_products_and_bytes_without_the_text",
        ),
    ),
    (
        "the process of the reward model scores for one process",
        "vpo_engine/planning/strategies.py",
        "scoring * known.processes - hidden",
        "scoring - hidden",
        (
            "tests/planning/test_strategies.py::test_the_process_of_the_reward_model_scores_for_all_and_sampling_hides_a_part",
        ),
    ),
    (
        "a plan takes no time for an optimizer that the JSON file keeps on the host",
        "vpo_engine/planning/strategies.py",
        "if offloads_optimizer(config, shared.ranks):",
        "if config.distributed.offload_optimizer:",
        (
            "tests/planning/test_strategies.py::test_an_optimizer_that_the_json_file_keeps_on_the_host_takes_the_time_of_one",
        ),
    ),
    (
        "offload that only the JSON file asks for is dropped",
        "vpo_engine/distributed/deepspeed_settings.py",
        'return device == "cpu"',
        "return bool(own)",
        ("tests/distributed/test_deepspeed_settings.py",),
    ),
]
