"""Mistakes in how files of strangers are read."""

SETTINGS = "vpo_engine/foreign_settings.py"
SETTINGS_TESTS = ("tests/test_foreign_settings.py",)
MODEL_TESTS = ("tests/fuzz/test_hostile_models.py",)

MUTATIONS = [
    (
        "numbers out of their range are taken",
        SETTINGS,
        "is_number and self._numbers(kind).has(value)",
        "is_number",
        SETTINGS_TESTS,
    ),
    (
        "true is a number",
        SETTINGS,
        " and not isinstance(value, bool)",
        "",
        SETTINGS_TESTS,
    ),
    (
        "numbers beyond those of float32 are taken",
        SETTINGS,
        "_FLOAT32 = 3.4e38",
        "_FLOAT32 = math.inf",
        SETTINGS_TESTS,
    ),
    (
        "null where the engine needs a value",
        SETTINGS,
        " or (value is None and name in needed)",
        "",
        SETTINGS_TESTS,
    ),
    (
        "patches of any number of dimensions",
        SETTINGS,
        "len(value) == len(self.default) if self.fixed else",
        "True if self.fixed else",
        SETTINGS_TESTS,
    ),
    (
        "whole numbers of 0 where the class's default is larger",
        SETTINGS,
        "min([0 if lists and not default else 1,",
        "min([0,",
        SETTINGS_TESTS,
    ),
    (
        "a text encoder's other names are not checked",
        SETTINGS,
        "return found | {name: found[meant] for name, meant in aliases.items() if meant in found}",
        "return found",
        SETTINGS_TESTS,
    ),
    (
        "settings of a part within a part are not checked",
        SETTINGS,
        "part = CONFIG_MAPPING[model] found[name] = part",
        "part = CONFIG_MAPPING[model]",
        SETTINGS_TESTS,
    ),
    (
        "settings that stand beside the part that they are of are not checked",
        SETTINGS,
        'if "text_config" in parts and "text_config" not in settings:',
        "if False:",
        SETTINGS_TESTS,
    ),
    (
        "the settings of a transformer are not checked",
        "vpo_engine/models/diffusers_folder.py",
        "check_settings(config, kind, where, AGAIN, needed=needed)",
        "pass",
        MODEL_TESTS,
    ),
    (
        "the settings of a text encoder are not checked",
        "vpo_engine/models/diffusers_text.py",
        "check_settings(config, kind, where, AGAIN)",
        "pass",
        MODEL_TESTS,
    ),
    (
        "the solver of a flow is not rehearsed",
        "vpo_engine/models/diffusers_flow.py",
        "rehearse_solver(solver, source)",
        "pass",
        MODEL_TESTS,
    ),
    (
        "noise that does not fall passes the rehearsal",
        "vpo_engine/models/rehearsal.py",
        " and level < before",
        "",
        MODEL_TESTS,
    ),
    (
        "the solver of CogVideoX-2B is not rehearsed",
        "vpo_engine/models/cogvideox/model.py",
        "rehearse_solver(solver, source)",
        "pass",
        ("tests/models/test_diffusers_folder.py",),
    ),
    (
        "a policy takes memory before its sizes are compared with its weights",
        "vpo_engine/data/sprites/assets.py",
        'with torch.device("meta"):',
        "if True:",
        ("tests/models/test_published_weights.py",),
    ),
]
