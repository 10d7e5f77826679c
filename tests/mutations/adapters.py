"""Mistakes in adapters, in the frozen base below them, and in the moving average of the policy."""

LORA = "vpo_engine/models/lora.py"
POLICY = "vpo_engine/models/policy.py"
BASE = "vpo_engine/memory/quantised_base.py"
EMA = "vpo_engine/memory/ema.py"
OPTIMIZER = "vpo_engine/memory/optimizer.py"
NETWORK = "vpo_engine/reference/network.py"
ALGORITHM = "vpo_engine/online_vpo.py"
METHOD = "vpo_engine/method.py"
STATE = "vpo_engine/run_state.py"
TRAINER = "vpo_engine/trainer.py"
CONFIG = "vpo_engine/config/run.py"

TESTS_LORA = ("tests/test_lora.py",)
TESTS_BASE = ("tests/memory/test_quantised_base.py", "tests/reference/test_adapter_reference.py")
TESTS_EMA = ("tests/memory/test_ema.py",)
EMA_RUNS = ("tests/test_ema_runs.py",)
EMA_RESUMED = (f"{EMA_RUNS[0]}::test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit",)

MUTATIONS = [
    (
        "an adapter of the type of its base",
        LORA,
        "part.weight = nn.Parameter(start.to(device))",
        "part.weight = nn.Parameter(start.to(layer.base_layer.weight))",
        TESTS_LORA,
    ),
    (
        "the adapter rounded with its base",
        POLICY,
        "hold_in_bfloat16(network, config.memory.weights, dtype, card.float32_modules) layers = inject_adapter("
        "network, lora, chosen_targets(lora, card), config.seed, config.model.policy)",
        "layers = inject_adapter(network, lora, chosen_targets(lora, card), config.seed, config.model.policy)\n"
        "    hold_in_bfloat16(network, config.memory.weights, dtype, card.float32_modules)",
        TESTS_LORA,
    ),
    (
        "the adapter stepped as if it were bfloat16",
        CONFIG,
        'self.memory.model_copy(update={"weights": "float32"})',
        "self.memory",
        TESTS_LORA,
    ),
    (
        "the family's targets for every set",
        LORA,
        "return sets[targets]",
        "return card.lora_targets",
        TESTS_LORA,
    ),
    (
        "a reference with codes of its own",
        NETWORK,
        "memo |= base",
        "pass",
        TESTS_BASE,
    ),
    (
        "the gradient of the input by the codes' own numbers",
        BASE,
        "return gradient @ ctx.layer.dequantised(gradient.dtype), None",
        "return gradient @ ctx.layer.dequantised(gradient.dtype).sign(), None",
        TESTS_BASE,
    ),
    (
        "the zeros of the last block taken for weights",
        BASE,
        "return weight.flatten()[: math.prod(shape)].view(shape)",
        "return weight.flatten()[-math.prod(shape) :].view(shape)",
        TESTS_BASE,
    ),
    (
        "scales cast with the network",
        BASE,
        "if after.dtype != before.dtype:",
        "if False:",
        TESTS_BASE,
    ),
    (
        "every layer alive until the last is rounded",
        BASE,
        "names = self.layers(network) for name",
        "names, kept = self.layers(network), block_linears(network)\n        for name",
        TESTS_BASE,
    ),
    (
        "layers rounded that must stay precise",
        BASE,
        'if not set(name.split(".")) & set(self.keep)',
        "if name",
        TESTS_BASE,
    ),
    (
        "decay and its complement exchanged",
        EMA,
        "average.lerp_(weight.detach().to(average), 1 - self.decay)",
        "average.lerp_(weight.detach().to(average), self.decay)",
        TESTS_EMA,
    ),
    (
        "no warm-up of the average",
        EMA,
        "return min(decay, (1 + updates) / (10 + updates))",
        "return decay",
        TESTS_EMA,
    ),
    (
        "the average of rounded weights",
        OPTIMIZER,
        'return self._weights if self._mode == "fp32_master" else self._parameters',
        "return self._parameters",
        TESTS_EMA,
    ),
    (
        "training goes on from the average",
        EMA,
        "finally: self._write(trained)",
        "finally:\n            pass",
        TESTS_EMA,
    ),
    ("the average is never updated", "vpo_engine/method.py", "self.average.update()", "pass", EMA_RUNS),
    (
        "evaluations in between see the policy",
        TRAINER,
        "with self._algorithm.evaluated_weights(): found =",
        "if True:\n                found =",
        EMA_RUNS,
    ),
    (
        "the evaluation at the end sees the policy",
        TRAINER,
        "with self._algorithm.evaluated_weights(): final =",
        "if True:\n                final =",
        EMA_RUNS,
    ),
    (
        "the policy saved for its average",
        STATE,
        "with average.in_place(): algorithm.model.save_policy(folder)",
        "algorithm.model.save_policy(folder)",
        EMA_RUNS,
    ),
    (
        "a resumed run averages from its policy",
        STATE,
        "with algorithm.average.loaded(): algorithm.model.load_policy(average)",
        "pass",
        EMA_RESUMED,
    ),
    (
        "a resumed run warms its average up again",
        STATE,
        "algorithm.average.updates = algorithm.optimizer_steps",
        "pass",
        EMA_RESUMED,
    ),
]
