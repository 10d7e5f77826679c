"""Mistakes in the evaluation of policies: pairs, bounds, sides, what counts, and who is who in a study."""

PAIRED = "vpo_engine/evaluation/paired.py"
RESULTS = "vpo_engine/evaluation/results.py"
GENERATE = "vpo_engine/evaluation/generate.py"
MEASURING = "vpo_engine/evaluation/measuring.py"
RECORDS = "vpo_engine/evaluation/records.py"
STUDY = "vpo_engine/evaluation/study.py"
VOTES = "vpo_engine/evaluation/votes.py"
SUITES = "vpo_engine/evaluation/suites.py"
FOLDERS = "vpo_engine/evaluation/folders.py"
VBENCH = "vpo_engine/evaluation/vbench_form.py"
STATISTICS = ("tests/evaluation/test_paired.py",)
PARTIAL = ("tests/evaluation/test_partial.py",)
READ = ("tests/evaluation/test_folders.py",)
SAMPLED = ("tests/evaluation/test_policies.py",)
VOTED = ("tests/evaluation/test_votes.py",)

MUTATIONS = [
    (
        "baseline minus policy",
        PAIRED,
        "after - before for before, after",
        "before - after for before, after",
        STATISTICS,
    ),
    (
        "videos as the unit",
        PAIRED,
        "bootstrap(means, seed)",
        "bootstrap([value for each in differences for value in each], seed)",
        STATISTICS,
    ),
    (
        "a plain percentile bootstrap",
        PAIRED,
        "tail = 0.5 * math.erfc(quantile * math.sqrt(count / (count - 1)) / math.sqrt(2))",
        "tail = (1 - confidence) / 2",
        STATISTICS,
    ),
    ("two values that are resampled", PAIRED, "if count < FEWEST:", "if count < 2:", STATISTICS),
    ("ties win", PAIRED, "return 0.5 * (1 + _side(value))", "return float(value >= 0)", STATISTICS),
    ("wins whatever is better", PAIRED, "_win(sign * value)", "_win(value)", STATISTICS),
    (
        "a one-sided sign test",
        PAIRED,
        "min(1.0, 2 * tail / 2**count)",
        "min(1.0, tail / 2**count)",
        STATISTICS,
    ),
    (
        "Holm's steps are not kept in order",
        PAIRED,
        "largest = max(largest, min(1.0,",
        "largest = max(0.0, min(1.0,",
        STATISTICS,
    ),
    ("Bonferroni for all", PAIRED, "(count - place) * value", "count * value", STATISTICS),
    ("the verdict ignores the direction", PAIRED, "[better * (1 if", "[1 * (1 if", STATISTICS),
    ("Wald's interval", PAIRED, "middle = share + z * z / (2 * count)", "middle = share", STATISTICS),
    (
        "alpha without its correction for few values",
        PAIRED,
        "1 - (count - 1) * disagreement",
        "1 - count * disagreement",
        STATISTICS,
    ),
    (
        "policy and baseline exchanged in the pairs",
        RESULTS,
        "append((before[prompt, index], value))",
        "append((value, before[prompt, index]))",
        READ,
    ),
    (
        "a video that failed in one arm counts in the other",
        RESULTS,
        "if all(key in each.good for each in found)]",
        "]",
        ("tests/evaluation/test_partial.py",),
    ),
    ("stand-ins among the measures", RESULTS, 'items() if each["group"] != "proxy"}', "items()}", READ),
    (
        "a missing video is no reason to be partial",
        RESULTS,
        "or any(map(len, problems.values()))",
        "",
        PARTIAL,
    ),
    ("numbers of any settings in one column", MEASURING, "if one != other ]", "if False]", READ),
    ("videos of another size are measured", MEASURING, "if facts.shape != side.shape:", "if False:", READ),
    (
        "what failed is not tried again",
        RECORDS,
        "elif failures:\n            self._failed[key] = record",
        "else:\n            self._failed[key] = record",
        READ,
    ),
    (
        "a row that was cut off stops the evaluation",
        RECORDS,
        'file.read_bytes().rpartition(b"\\n")[0]',
        "file.read_bytes()",
        PARTIAL,
    ),
    (
        "other noise for the baseline",
        GENERATE,
        "starting_noise(model, seed, number,",
        'starting_noise(model, seed + (arm.role == "baseline"), number,',
        SAMPLED,
    ),
    (
        "only missing videos in a batch",
        GENERATE,
        "noise[[index for _, _, index in batch]]",
        "noise[: len(batch)]",
        ("tests/evaluation/test_policies.py",),
    ),
    ("videos are sampled again", GENERATE, "if not all((folder", "if True or not all((folder", SAMPLED),
    (
        "all dimensions on all prompts",
        SUITES,
        "return card.dimension in self.dimensions[prompt] and",
        "return",
        READ,
    ),
    (
        "five videos for the filter of flickering",
        SUITES,
        "if card.name != card.dimension else {}",
        "if False else {}",
        READ,
    ),
    (
        "dashes in a name become blanks",
        FOLDERS,
        'if found is not None and " " in found[1]:',
        "if False:",
        READ,
    ),
    ("stand-ins in VBench's form", VBENCH, "if not dimension or number is None", "if number is None", READ),
    ("the policy always on the left", STUDY, "draw.shuffle(lefts)", "lefts.sort(reverse=True)", VOTED),
    ("sides that are not balanced", STUDY, "_ROLES[number % 2]", "_ROLES[draw.randrange(2)]", VOTED),
    (
        "the key exchanges the sides",
        STUDY,
        "**dict(zip(SIDES, sides, strict=True))}",
        "**dict(zip(SIDES, sides[::-1], strict=True))}",
        VOTED,
    ),
    (
        "a tie is a win",
        VOTES,
        "wilson(wins + ties / 2, len(winners))",
        "wilson(wins + ties, len(winners))",
        VOTED,
    ),
    ("one person counts twice", VOTES, "if other.rater == ballot.rater:", "if False:", VOTED),
    ("votes on another study count", VOTES, 'if content["study"] != key["study"]:', "if False:", VOTED),
    (
        "an evaluation goes on with videos of other sampling settings",
        "vpo_engine/evaluation/arms.py",
        '"sampling": sampling_settings(self.source.config)',
        '"sampling": {}',
        (
            "tests/evaluation/test_policies.py::test_videos_of_other_sampling_settings_are_not_taken_for_these",
        ),
    ),
    (
        "all adapters of a base are one policy",
        "vpo_engine/evaluation/arms.py",
        "for path in (model.policy, source.adapter):",
        "for path in (model.policy,):",
        ("tests/evaluation/test_policies.py::test_an_adapter_that_was_written_anew_is_another_policy",),
    ),
    (
        "an evaluation samples with the steps of training",
        "vpo_engine/evaluation/arms.py",
        "if own else source.config.held_out_steps",
        "if True else source.config.held_out_steps",
        ("tests/evaluation/test_policies.py::test_a_policy_is_evaluated_with_as_many_steps_as_its_run_did",),
    ),
    (
        "one video of each held-out prompt whatever the run has",
        "vpo_engine/evaluation/session.py",
        "options.samples or arms[0].source.config.evaluation.samples_per_prompt",
        "options.samples or 1",
        (
            "tests/evaluation/test_policies.py::test_without_a_number_there_are_as_many_videos_as_the_run_evaluates",
        ),
    ),
    (
        "all processes of an evaluation share one GPU",
        "vpo_engine/evaluation/session.py",
        'devices[int(os.environ.get("LOCAL_RANK", "0")) % len(devices)] if devices',
        "devices[0] if devices",
        ("tests/evaluation/test_policies.py::test_each_process_of_an_evaluation_has_a_device_of_its_own",),
    ),
    (
        "results without a metric that was asked for are whole",
        "vpo_engine/evaluation/results.py",
        "bool(records.unloaded) or",
        "",
        ("tests/evaluation/test_partial.py",),
    ),
    (
        "equal videos of a prompt are one video",
        "vpo_engine/evaluation/results.py",
        "replace(record, video=video.name)",
        "record",
        ("tests/evaluation/test_partial.py",),
    ),
    (
        "records that other weights made are taken",
        "vpo_engine/evaluation/chosen_metrics.py",
        "dict(metric.weights), dict(metric.settings)",
        "dict(metric.settings)",
        ("tests/evaluation/test_folders.py::test_records_of_other_weights_or_settings_are_not_taken",),
    ),
    (
        "the share of the left video is that of the right one",
        "vpo_engine/evaluation/votes.py",
        'sides["left"] / decided',
        'sides["right"] / decided',
        ("tests/evaluation/test_votes.py",),
    ),
    (
        "seeds whose processes are divided otherwise are no seeds of one setting",
        "vpo_engine/evaluation/finished_runs.py",
        '"processes", "distributed",',
        '"processes",',
        ("tests/test_evaluate.py::test_seeds_of_one_setting_share_a_column",),
    ),
]
