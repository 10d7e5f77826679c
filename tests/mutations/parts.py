"""Mistakes in what a step is made of: the optimizer, batches, the 8-bit copy and the reference's storages."""

from mutations.tests_of import FAULTS, REPLAY, RESUME

OPTIMIZER = "vpo_engine/memory/optimizer.py"
BATCHES = "vpo_engine/memory/batches.py"
COPY = "vpo_engine/rollout/quantised_copy.py"
WEIGHTS = "vpo_engine/reference/weights.py"
NETWORK = "vpo_engine/reference/network.py"
EXACT = "vpo_engine/reference/exact.py"
STORES = ("tests/reference/test_reference_store.py", "tests/reference/test_int8.py")
OPTIMIZER_TESTS = ("tests/memory/test_policy_optimizer.py", "tests/memory/test_policy_optimizer_state.py")
BATCH_TESTS = ("tests/rollout/test_rollout_memory.py",)

MUTATIONS = [
    # The optimizer.
    (
        "the norm is a sum of norms",
        OPTIMIZER,
        "torch.linalg.vector_norm(torch.stack(norms))",
        "torch.stack(norms).sum()",
        REPLAY,
    ),
    (
        "gradients of the update before kept",
        OPTIMIZER,
        "self._library.set_rate(rate) for parameter in self._parameters: parameter.grad = None",
        "self._library.set_rate(rate)",
        OPTIMIZER_TESTS,
    ),
    (
        "the rate of the first parameter alone",
        OPTIMIZER,
        "for library in self._libraries: library",
        "for library in self._libraries[:1]:\n            library",
        REPLAY,
    ),
    (
        "the same rounding in every step",
        OPTIMIZER,
        "rounding_offsets(weight, self._seed, self.steps, number)",
        "rounding_offsets(weight, self._seed, 0, number)",
        OPTIMIZER_TESTS,
    ),
    (
        "the same rounding in every parameter",
        OPTIMIZER,
        "rounding_offsets(weight, self._seed, self.steps, number)",
        "rounding_offsets(weight, self._seed, self.steps, 0)",
        OPTIMIZER_TESTS,
    ),
    (
        "a norm that is not finite is stepped by",
        OPTIMIZER,
        "self._check(value)",
        "pass",
        OPTIMIZER_TESTS,
    ),
    (
        "moments not restored, but the count of their steps",
        OPTIMIZER,
        "name: value.to(places[name], copy=True) for",
        "name: value.to(places[name], copy=True) * (name == STEP) for",
        RESUME,
    ),
    # Batches, the 8-bit copy and the reference's storages.
    (
        "a batch that did not fit computed last",
        BATCHES,
        "waiting.insert(0, batch)",
        "waiting.append(batch)",
        BATCH_TESTS,
    ),
    (
        "halved again and again",
        "vpo_engine/memory/batches.py",
        "if self._halved or size == 1 or",
        "if size == 1 or",
        BATCH_TESTS,
    ),
    (
        "batches of one more than fits",
        BATCHES,
        "size is None or len(self) <= size:",
        "size is None or len(self) <= size + 1:",
        BATCH_TESTS,
    ),
    (
        "scales of the copy by column",
        COPY,
        "x.abs().amax(1)",
        "x.abs().amax().expand(len(x))",
        (
            "tests/rewards/test_quantize.py",
            "tests/rollout/test_exact_rollout.py",
            "tests/rollout/test_explore.py",
        ),
    ),
    (
        "the copy's scales stay as they were",
        COPY,
        "self.scales.copy_(scales)",
        "pass",
        ("tests/rollout/test_approximations.py", "tests/wiring/test_samplers.py"),
    ),
    (
        "int8 codes refreshed without their scales",
        WEIGHTS,
        "self._scales.copy_(weight.abs().amax(dim=-1) / 127)",
        "self._scales.add_((weight.abs().amax(dim=-1) / 127) * (self._scales == 0))",
        STORES,
    ),
    ("int8 scales not restored", WEIGHTS, 'self._scales.copy_(parts["scales"])', "pass", (*STORES, *RESUME)),
    ("int8 codes not restored", WEIGHTS, 'self._codes.copy_(parts["codes"])', "pass", (*STORES, *RESUME)),
    ("a bfloat16 matrix not restored", WEIGHTS, 'self._weight.copy_(parts[""])', "pass", STORES),
    (
        "buffers shared with the policy",
        NETWORK,
        "{id(buffer): buffer.detach().clone() for buffer",
        "{id(buffer): buffer for buffer",
        STORES,
    ),
    (
        "trained parameters shared with the policy",
        NETWORK,
        "elif id(parameter) not in encoded: memo[id(parameter)] = "
        "nn.Parameter(parameter.detach().clone(), requires_grad=False)",
        "elif id(parameter) not in encoded:\n                memo[id(parameter)] = parameter",
        REPLAY,
    ),
    (
        "an exact reference encoded from the policy before",
        EXACT,
        "encode_delta(reference, self.policy.detach().bfloat16(), out=old)",
        "encode_delta(reference, reference.clone(), out=old)",
        FAULTS,
    ),
    (
        "an exact reference not restored",
        EXACT,
        'self._held = OrderedDelta(**own) if "difference" in own else own["bfloat16"]',
        "pass",
        RESUME,
    ),
]
