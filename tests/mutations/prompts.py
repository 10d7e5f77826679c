"""Mistakes in what a run reads, says and keeps of its prompts."""

PROMPTS = "vpo_engine/data/prompts.py"
LINES = "vpo_engine/data/prompt_lines.py"
JSON = "vpo_engine/data/prompt_json.py"
CHECKS = "vpo_engine/data/prompt_checks.py"
RECORD = "vpo_engine/data/prompt_record.py"
BUILD = "vpo_engine/build.py"
SUMMARY = "vpo_engine/metrics/summary.py"
LAYOUT_TESTS = ("tests/data_layer/test_prompt_layouts.py",)
RUN_TESTS = ("tests/test_run_prompts.py",)
ASKED = (
    "tests/test_run_prompts.py::test_the_judge_and_rewards_of_ones_own_are_asked_too",
    "tests/test_run_prompts.py::test_of_a_long_file_all_prompts_are_asked_that_the_run_takes",
)
RESUMED = ("tests/test_run_prompts.py::test_other_prompts_are_refused_when_a_run_is_resumed",)
OPENSORA_TESTS = ("tests/test_opensora_run.py",)

MUTATIONS = [
    (
        "lines of prompts cut at U+2028",
        LINES,
        "while raw := self._file.readline(self._longest + 1):",
        "for raw in [line.encode() for line in self._file.read().decode().splitlines(True)]:",
        LAYOUT_TESTS,
    ),
    (
        "a key twice in a row of prompts",
        "vpo_engine/texts.py",
        "if len(found) < len(pairs):",
        "if len(found) > len(pairs):",
        LAYOUT_TESTS,
    ),
    (
        "one row read as names with texts",
        JSON,
        "kinds == {str} and (column in keys",
        "kinds == {int} and (column in keys",
        LAYOUT_TESTS,
    ),
    (
        "lines of JSON counted from the wrong place",
        JSON,
        'text.count("\\n", counted, place)',
        'text.count("\\n", counted, place - 1)',
        LAYOUT_TESTS,
    ),
    ("a plain TSV with quoted fields", PROMPTS, "raise error from None", "pass", LAYOUT_TESTS),
    (
        "the line after that of a prompt",
        PROMPTS,
        "self._counted = (0, 1)",
        "self._counted = (0, 2)",
        LAYOUT_TESTS,
    ),
    ("captions cleaned to nothing taken", CHECKS, "if not _letters(left):", "if not left:", OPENSORA_TESTS),
    (
        "scores count as letters of a caption",
        "vpo_engine/models/opensora/model.py",
        "without_scores(prepare_prompt(prompt, aes=settings.aesthetic_score))",
        "prepare_prompt(prompt, aes=settings.aesthetic_score)",
        OPENSORA_TESTS,
    ),
    (
        "only the first prompts are asked about",
        CHECKS,
        "sorted(used.union(range(LOOKED_AT)))",
        "range(LOOKED_AT)",
        ASKED,
    ),
    (
        "training prompts are not asked about",
        BUILD,
        "_ask(reward, train, _rows_of(config, train), who, change)",
        "pass",
        RUN_TESTS,
    ),
    (
        "held-out prompts are not asked about",
        BUILD,
        "_ask(reward, held_out, range(len(held_out)), who, change)",
        "pass",
        RUN_TESTS,
    ),
    (
        "the judge is not asked",
        BUILD,
        "_ask(judge, prompts, range(len(prompts)), who, change)",
        "pass",
        ASKED,
    ),
    ("numbers of the answers taken for rows", BUILD, "{rows[number]:", "{number:", ASKED),
    (
        "prompts behind others count as others",
        RECORD,
        "fingerprint(texts, before.count) == before",
        "fingerprint(texts) == before",
        RESUMED,
    ),
    (
        "the order of prompts may change",
        "vpo_engine/data/fingerprint.py",
        "for index in range(len(prompts) if count is None else count):",
        "for index in sorted(range(len(prompts) if count is None else count), key=lambda row: prompts[row]):",
        RESUMED,
    ),
    ("no record of prompts", "vpo_engine/training.py", "write_record(run.root, texts)", "pass", RUN_TESTS),
    (
        "bounds of one clip",
        SUMMARY,
        "if len(before) == 1:",
        "if len(before) == 0:",
        ("tests/test_run_prompts.py::test_one_held_out_clip_has_values_and_no_bounds",),
    ),
    (
        "a file of prompts that is as long as before counts as unchanged",
        PROMPTS,
        "return now.st_size, now.st_mtime_ns",
        "return now.st_size, 0",
        ("tests/data_layer/test_prompts.py::test_file_changed_after_indexing",),
    ),
    (
        "each process divides the texts in an order of its own",
        "vpo_engine/data/text_source.py",
        "sorted({self._rewrite(prompt) for prompt in prompts})",
        "list({self._rewrite(prompt) for prompt in prompts})",
        ("tests/data_layer/test_embeddings.py::test_processes_divide_the_same_list_of_texts",),
    ),
    (
        "the column is forgotten for a list under a name",
        "vpo_engine/data/prompt_json.py",
        "column = None if inner.key == column else column",
        "column = None",
        ("tests/data_layer/test_prompt_layouts.py",),
    ),
    (
        "a row whose prompt is missing is read by its only other key",
        "vpo_engine/data/prompt_json.py",
        "if column is None and key is None and _is_name_with_text(row):",
        "if column is None and _is_name_with_text(row):",
        ("tests/data_layer/test_prompt_layouts.py",),
    ),
    (
        "a list under a known name is not found beside other entries",
        "vpo_engine/data/prompt_json.py",
        "if not named: named",
        "if column is None:\n        named",
        ("tests/data_layer/test_prompt_layouts.py",),
    ),
    (
        "all held-out prompts of a file are used whatever their number",
        "vpo_engine/data/prompts.py",
        "range(len(file))[:count]",
        "range(len(file))",
        ("tests/test_run_prompts.py::test_so_many_held_out_prompts_of_a_file_are_used",),
    ),
]
