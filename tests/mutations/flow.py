"""Mistakes in the families of flow matching, in their solvers, and in the modules that stay float32."""

SOLVERS = "vpo_engine/models/solvers.py"
FLOW = "vpo_engine/models/diffusers_flow.py"
WAN = "vpo_engine/models/wan/model.py"
LTX = "vpo_engine/models/ltx.py"
MODEL = "vpo_engine/models/diffusers_model.py"
ROUNDING = "vpo_engine/memory/rounding.py"
OPTIMIZER = "vpo_engine/memory/optimizer.py"
BASE = "vpo_engine/memory/quantised_base.py"

TESTS_SOLVERS = ("tests/models/test_solvers.py",)
TESTS_WAN = ("tests/models/test_wan.py",)
TESTS_LTX = ("tests/models/test_ltx.py",)
TESTS_RUNS = ("tests/models/test_wan_ltx_runs.py",)
TESTS_ROUNDING = ("tests/memory/test_rounding.py", "tests/memory/test_policy_optimizer.py")

MUTATIONS = [
    (
        "flow: UniPC never corrects",
        SOLVERS,
        "latents = self._corrected(step, clean, *memory)",
        "pass",
        TESTS_SOLVERS,
    ),
    (
        "flow: UniPC ends in order 2",
        SOLVERS,
        "if memory and step < len(self.times) - 1:",
        "if memory:",
        TESTS_SOLVERS,
    ),
    (
        "flow: UniPC corrects from the latents that were not corrected",
        SOLVERS,
        "return after, (latents, clean, *memory[1:2])",
        "return after, (after, clean, *memory[1:2])",
        TESTS_SOLVERS,
    ),
    (
        "flow: a preview of the level after the step",
        SOLVERS,
        "return before - prediction * self.levels[step]",
        "return before - prediction * self.levels[step + 1]",
        TESTS_SOLVERS,
    ),
    (
        "flow: a given shift is forgotten",
        SOLVERS,
        "if flow_shift is not None:",
        "if flow_shift is None:",
        TESTS_SOLVERS,
    ),
    (
        "flow: schedulers of other settings are taken",
        SOLVERS,
        "if (found := scheduler.config[key]) != needed:",
        "if (found := scheduler.config[key]) is None:",
        TESTS_SOLVERS,
    ),
    (
        "flow: the target of the other sign",
        FLOW,
        "return -1.0, 1.0",
        "return 1.0, -1.0",
        TESTS_WAN,
    ),
    (
        "flow: times are not cut off",
        FLOW,
        "return t.floor() if self._whole_times else t",
        "return t",
        TESTS_WAN,
    ),
    (
        "flow: times are always cut off",
        FLOW,
        "return t.floor() if self._whole_times else t",
        "return t.floor()",
        TESTS_LTX,
    ),
    (
        "flow: training times are not shifted",
        FLOW,
        "return 1000 * self.shift * u / (1 + (self.shift - 1) * u)",
        "return 1000 * u",
        TESTS_WAN,
    ),
    (
        "flow: entities of prompts are resolved once",
        WAN,
        "html.unescape(html.unescape(ftfy.fix_text(prompt)))",
        "html.unescape(ftfy.fix_text(prompt))",
        TESTS_WAN,
    ),
    ("flow: 226 tokens", WAN, "MAX_TOKENS = 512", "MAX_TOKENS = 226", TESTS_WAN),
    ("flow: no mask for the text encoder", WAN, "encoder_mask=True", "encoder_mask=False", TESTS_WAN),
    (
        "flow: latents divided by their deviation",
        WAN,
        "return latents * deviation + mean",
        "return latents / deviation + mean",
        TESTS_WAN,
    ),
    (
        "flow: two experts are one model",
        WAN,
        'if index.get("boundary_ratio") is not None or second not in (None, [None, None]):',
        "if False:",
        TESTS_WAN,
    ),
    (
        "flow: a mask for the text encoder of LTX-Video",
        LTX,
        'padding="masked",',
        'padding="masked",\n        encoder_mask=True,',
        TESTS_LTX,
    ),
    (
        "flow: the scheduler's own levels for LTX-Video",
        LTX,
        "levels_from_one = True",
        "levels_from_one = False",
        TESTS_LTX,
    ),
    (
        "flow: the frame rate is not told",
        LTX,
        "(frame_stride / self.fps, side, side)",
        "(frame_stride / 25, side, side)",
        TESTS_LTX,
    ),
    (
        "flow: noise of another seed in every decode",
        LTX,
        "random = torch.Generator().manual_seed(DECODE_SEED)",
        "random = None",
        TESTS_LTX,
    ),
    (
        "flow: the network gets rows that are not contiguous",
        MODEL,
        "self.to_layout(latents).to(weights).contiguous()",
        "self.to_layout(latents).to(weights)",
        TESTS_RUNS,
    ),
    (
        "flow: modules that stay float32 are rounded",
        ROUNDING,
        'if not set(name.split(".")).isdisjoint(float32_modules):',
        "if False:",
        TESTS_ROUNDING,
    ),
    (
        "flow: weights that stay float32 get masters",
        OPTIMIZER,
        '["float32" if is_kept_in_float32(one) else self._mode for one in self._parameters]',
        "[self._mode for one in self._parameters]",
        TESTS_ROUNDING,
    ),
    (
        "flow: the reference encodes layers that stay float32",
        BASE,
        " and not is_kept_in_float32(module.weight)",
        "",
        ("tests/reference/test_reference_store.py",),
    ),
]
