"""Plans: closed forms, published sizes, what fits and what is refused, and that nothing is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from real_trace import assert_traced_as_real

from vpo_engine import plan, train, training
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.planning import answer
from vpo_engine.planning.estimate import (
    CONTEXT,
    FRAGMENTATION,
    MATRIX_EFFICIENCY,
    TRAFFIC_EFFICIENCY,
    PhasePlan,
    Plan,
    estimate,
)
from vpo_engine.planning.fit import most_frames, with_granted_batch_size, with_setting
from vpo_engine.planning.gpus import GIB, GPUS, find_gpu
from vpo_engine.planning.parts import Assumed, blueprint_of, build_reward_network
from vpo_engine.planning.planner import check_fits, plan_run
from vpo_engine.planning.trace import Trace, trace_step
from vpo_engine.rewards.registry import reward_card

CPU = torch.device("cpu")
A100 = GPUS["a100-80g"]
TRAINED = 1_207_643_972 - 36 - 6_048_000
"""Of STDiT3-XL/2: without rope and caption projection (tests/models/test_real_size.py)."""


FEW = ("pairs_per_step=2", "rollout.candidates=2", "evaluation.prompts=2", "evaluation.samples_per_prompt=1")
"""Settings of sprites runs whose plans take half of the time."""


def xl(*overrides: str, size: str = "720p") -> Config:
    """Paths of this configuration do not exist, here or anywhere: nothing can be loaded."""
    return load_config(f"opensora_v1_2_{size}.yaml", overrides)


@pytest.fixture(scope="module")
def sprites() -> Trace:
    return trace_step(load_config(None), on_gpu=False, depth=1)


def test_published_sizes_stand_in_for_files_that_are_not_here():
    assumed = Assumed()
    config = xl()
    blueprint, reward = blueprint_of(config, assumed), build_reward_network(config, assumed)
    assert blueprint.depth == 28
    trained = [p.numel() for p in blueprint.model.network.parameters() if p.requires_grad]
    assert sum(trained) == TRAINED
    assert blueprint.text_encoder is not None
    assert sum(p.numel() for p in blueprint.text_encoder().parameters()) == 4_762_310_656
    assert reward is not None
    assert sum(p.numel() for p in reward.parameters()) == 8_271_704_309
    assert [note.partition(" has no ")[0] for note in assumed.notes] == [
        "checkpoints/OpenSora-STDiT-v3",
        "checkpoints/OpenSora-VAE-v1.2",
        "checkpoints/VideoScore",
        "checkpoints/t5-v1_1-xxl",
    ]


def test_weights_optimizer_and_gradients_are_counted_in_full(sprites: Trace):
    config = load_config(None)
    model = blueprint_of(config, Assumed(), 1).model
    numbers = [p.numel() for p in model.network.parameters() if p.requires_grad]
    sizes = [-(-4 * n // 512) * 512 for n in numbers]
    blocks = sum(sizes)
    peak = sprites.peak("optimizer")
    assert blocks - 2 * max(sizes) <= peak["gradients"] <= blocks  # each is gone once it has been used
    steps = 512 * len(numbers)  # AdamW's counters, one block each
    assert peak["optimizer"] == 2 * blocks + steps
    assert peak["weights"] >= blocks


def test_a_plan_adds_allowances_on_gpus_only(sprites: Trace):
    config = load_config(None)
    on_cpu = estimate(config, sprites, None, 2**40, "a test")
    on_gpu = estimate(config, sprites, A100, 2**40, "a test")
    for bare, allowed in zip(on_cpu.phases, on_gpu.phases, strict=True):
        assert bare.bytes["allowance"] == 0
        assert allowed.bytes["allowance"] == CONTEXT + int(FRAGMENTATION * bare.total)
        assert bare.seconds is None
        assert allowed.seconds is not None


def test_offload_of_idle_parts_leaves_out_what_a_phase_does_not_need(sprites: Trace):
    config = load_config(None, ["memory.offload_idle=true"])
    phases = {phase.name: phase for phase in estimate(config, sprites, A100, 2**40, "a test").phases}
    assert set(phases["decode"].bytes) >= {"vae", "activations"}
    assert not {"weights", "optimizer", "reference"} & set(phases["decode"].bytes)
    assert not {"vae", "optimizer"} & set(phases["update"].bytes)
    assert "optimizer" in phases["optimizer"].bytes


@pytest.mark.long
def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded(monkeypatch, capsys):
    def loads(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(training, "build_model", loads)
    assert train.main(["memory.limit_gib=0.001", "model.device=cpu", *FEW]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the run needs 0.")
    assert "GiB in update, the largest part activations" in error
    assert "may take 0.00 GiB (memory.limit_gib=0.001)" in error
    assert "no single setting makes it fit" in error
    assert "memory.overcommit=true" in error


@pytest.mark.long
def test_the_nearest_change_that_fits_is_named_and_true():
    peaks = plan_run(load_config(None, FEW), None)
    limit = f"memory.limit_gib={0.8 * peaks.peak.total / GIB}"
    with pytest.raises(ValueError, match="it fits with ") as refused:
        check_fits(load_config(None, [*FEW, limit]), CPU)
    named = str(refused.value).split("it fits with ")[1].split(" (")[0]
    assert "plan: " in check_fits(load_config(None, [*FEW, limit, named]), CPU)[1]


def test_on_a_gpu_a_run_begins_with_the_plan_that_the_command_prints(monkeypatch, capsys):
    monkeypatch.setattr("vpo_engine.planning.planner.present_gpu", lambda: A100)
    _, said = check_fits(load_config(None, ["rollout.batch_size=64"]), torch.device("cuda"))
    assert plan.main(["rollout.batch_size=64", "--gpu", "a100-80g"]) == 0
    assert said == capsys.readouterr().out.rstrip() + "; 64 candidates at once"


@pytest.mark.long
def test_overcommit_goes_on():
    _, line = check_fits(load_config(None, [*FEW, "memory.limit_gib=0.001", "memory.overcommit=true"]), CPU)
    assert "limit 0.00 GiB" in line


@pytest.mark.parametrize("candidates", [4, 6])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_rows_are_granted_in_whole_prompts_or_even_parts_of_one(candidates: int, processes: int):
    config = load_config(None, ["pairs_per_step=8", f"rollout.candidates={candidates}"])
    everything = 8 // processes * candidates
    update = PhasePlan("update", {"activations": 10**9}, 0, 0.0, None)  # which rows do not lessen

    def granted_of(most: int) -> int | None:
        def planner(changed: Config) -> Plan:
            rows = min(changed.rollout.batch_limit or everything, everything)
            phases = (PhasePlan("rollout", {"activations": rows}, 0, 0.0, None), update)
            return Plan(phases, most, "a test", None, ())

        return with_granted_batch_size(config, planner, processes).rollout.batch_limit

    for most in range(everything):
        rows = granted_of(most)
        assert rows is not None
        assert 1 <= rows <= max(1, most)
        assert 2 * rows > most / 2, "a half, rounded, of what would fit at least"
        assert rows % candidates == 0 or rows < candidates
    assert granted_of(everything) is granted_of(10**6) is None
    fixed = load_config(None, ["rollout.batch_size=7"])
    assert with_granted_batch_size(fixed, pytest.fail) is fixed


@pytest.mark.long
def test_a_run_takes_the_rows_that_its_plan_grants(monkeypatch, capsys, tmp_path):
    class ThatIsAll(Exception):  # noqa: N818
        pass

    def build(config: Config, *_: object) -> None:
        raise ThatIsAll(config.rollout.batch_size)

    monkeypatch.setattr(training, "build_model", build)
    phases = plan_run(load_config(None, ["rollout.batch_size=16"]), None).phases
    enough = max(phase.total for phase in phases if phase.name in ("rollout", "decode")) / GIB
    for limit, rows, words in (
        (enough, 16, "16 candidates at once"),
        (0.01, 1, "one candidate at a time"),
        (20, None, ""),
    ):
        settings = ["model.device=cpu", "memory.overcommit=true", f"memory.limit_gib={limit}"]
        with pytest.raises(ThatIsAll) as built:
            train.main([*settings, f"run_dir={tmp_path / 'run'}"])
        assert built.value.args == (rows,)
        said = capsys.readouterr().out
        assert f"; {words}" in said if words else "candidate" not in said


def test_rewards_that_are_known_by_their_cards_count_with_their_weights():
    """The training reward in its own phase, unless it has a process; the held-out reward in none of a step's."""
    names = [
        "reward.kind=pickscore",
        "reward.path=p",
        "reward.dimensions=global",
        "guards.reward.kind=hpsv2",
        "guards.reward.path=h",
    ]
    trace = trace_step(load_config(None, names), on_gpu=True, depth=1)
    assert sum("only its weights are planned" in note for note in trace.notes) == 2
    held = {}
    for idle, process in ((False, False), (True, False), (True, True)):
        settings = [f"memory.offload_idle={str(idle).lower()}", f"reward.process={str(process).lower()}"]
        phases = estimate(load_config(None, [*names, *settings]), trace, A100, 2**40, "a test").phases
        for part in ("reward", "judge"):
            held[idle, process, part] = {phase.name: phase.bytes.get(part, 0) for phase in phases}
    reward, judge = (-(-2 * reward_card(name).parameters // 512) * 512 for name in ("pickscore", "hpsv2"))
    assert set(held[False, False, "reward"].values()) == {reward}
    assert set(held[False, False, "judge"].values()) == {judge}
    assert {name for name, size in held[True, False, "reward"].items() if size} == {"reward"}
    assert set(held[True, True, "reward"].values()) == {reward}
    assert set(held[True, False, "judge"].values()) == {0}


def test_scoring_beside_the_sampling_takes_its_memory_there(sprites: Trace):
    """On a GPU; a CPU scores between two groups."""
    one_by_one, beside = (load_config(None, [f"rollout.overlap={value}"]) for value in ("false", "true"))
    before, after = (
        estimate(config, sprites, A100, 2**40, "a test").phases for config in (one_by_one, beside)
    )
    _, rollout, decode, *others = before
    together = after[1]
    assert (rollout.name, decode.name, together.name) == ("rollout", "decode", "rollout")
    scoring = decode.bytes["activations"] + decode.bytes.get("workspace", 0)
    assert together.bytes["activations"] == rollout.bytes["activations"] + scoring
    assert together.total > rollout.total + scoring
    assert [*after[2:]] == [decode, *others]
    assert (
        estimate(beside, sprites, None, 2**40, "").phases
        == estimate(one_by_one, sprites, None, 2**40, "").phases
    )


def test_changes_that_are_made_or_excluded_are_not_proposed():
    config = load_config(None)
    assert with_setting(config, "memory.optimizer_bits", 32) is None
    assert with_setting(config, "reference.storage", "exact8") is None
    changed = with_setting(config, "memory.activation_checkpointing", "block")
    assert changed is not None
    assert changed.memory.activation_checkpointing == "block"


class Straight:
    """A planner whose peak is 1 GiB and 2 GiB for each chunk of 17 frames."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, config: Config) -> Plan:
        self.calls += 1
        size = int(GIB * (1 + 2 * config.model.num_frames // 17))
        phase = PhasePlan("update", {"activations": size}, 0, 0.0, None)
        return Plan((phase,), int(10.5 * GIB), "a test", None, ())


def test_the_most_frames_are_whole_chunks_and_confirmed():
    planner = Straight()
    assert most_frames(xl(), "720p", planner) == 4 * 17
    assert planner.calls <= 5


def test_frames_at_each_resolution_follow_the_plan(monkeypatch, capsys):
    """Settings after options count too."""
    monkeypatch.setattr(answer, "plan_run", lambda config, gpu: Straight()(config))
    monkeypatch.setattr(answer, "ProcessPoolExecutor", lambda count, _: ThreadPoolExecutor(count))
    command = ["opensora_v1_2_720p.yaml", "--gpu", "h200", "model.fps=17", "rollout.batch_size=auto"]
    assert plan.main(command) == 0
    said = capsys.readouterr().out
    clip = "68 frames, played in 4.0 s at 17 frames per second"
    assert said.endswith(f"  240p  {clip}\n  360p  {clip}\n  480p  {clip}\n  720p  {clip}\n")
    assert "longest clips that fit with these settings and rollout.batch_size=1; this takes minutes" in said
    assert plan.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["most_frames"] == dict.fromkeys(
        ("240p", "360p", "480p", "720p"), 68
    )
    assert plan.main([*command, "--no-frames"]) == 0
    assert "longest clips" not in capsys.readouterr().out


def test_json_and_text_say_the_same(capsys):
    assert plan.main(["rollout.batch_size=64", "--gpu", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert plan.main(["rollout.batch_size=64", "--gpu", "h200"]) == 0
    text = capsys.readouterr().out
    assert f"{found['peak_bytes'] / GIB:.2f}" in text
    assert "estimates, not measured by this project" in text
    assert found["fits"] is True
    for name, size in found["disk"]["parts"].items():
        said = f"{size / GIB:.2f} GiB" if size >= GIB / 20 else f"{size / 2**20:.1f} MiB"
        assert f"{name} {said}" in text
    assert list(found["phases"]) == ["text", "rollout", "decode", "update", "optimizer", "refresh"]


def test_unknown_gpus_are_refused(capsys):
    assert plan.main(["--gpu", "abacus"]) == 1
    assert "--gpu abacus is not known; it must be one of: a100-40g, a100-80g" in capsys.readouterr().err
    assert plan.main(["--gpu", "A100"]) == 1
    assert "did you mean a100-" in capsys.readouterr().err
    assert find_gpu("h200").capacity > 139 * GIB


def test_a_wrong_word_is_refused_before_torch_is_loaded():
    """Words may stand in any order, and each error comes at once."""
    program = (
        "import sys; from vpo_engine import plan; code = plan.main(sys.argv[1:]); assert 'torch' not in sys.modules;"
        "sys.exit(code)"
    )
    for words, said in (
        (["stps=4", "sprites_fast.yaml"], "did you mean steps"),
        (["sprites", "sprites_fast"], "sprites and sprites_fast are both taken for configuration files"),
        (["--gpu", "abacus"], "--gpu abacus is not known"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
        )
        assert (done.returncode, said in done.stderr) == (1, True), done.stderr


@pytest.mark.long
def test_the_trace_of_real_tensors_takes_the_bytes_of_the_trace_of_fakes():
    """The engine's own step, sprites at two pairs."""
    assert_traced_as_real(load_config(None, ["pairs_per_step=2", "objective.timesteps_per_pair=1"]))


@pytest.mark.long
def test_720p_and_68_frames_fit_in_24_gib():
    plan_24 = plan_run(xl("memory.limit_gib=24"), A100)
    assert plan_24.fits
    assert plan_24.peak.total < 24 * GIB
    assert not plan_run(xl("memory.limit_gib=24", "memory.offload_idle=false"), A100).fits


def test_the_sprites_world_has_no_other_sizes(capsys):
    assert plan.main(["rollout.batch_size=64", "--gpu", "h200"]) == 0
    assert "longest clips" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"the sprites world has videos of one size"):
        most_frames(load_config(None, []), "720p", Straight())


def test_adapters_are_planned():
    config = load_config(None, ["model.lora.rank=4", "reference.storage=adapter", "pairs_per_step=2"])
    found = trace_step(config, on_gpu=False, depth=1, network_only=True)
    model = blueprint_of(config, Assumed(), 1).model
    from vpo_engine.models.lora import adapter_parameters, inject_adapter

    assert config.model.lora is not None
    inject_adapter(model.network, config.model.lora, model.card.lora_targets, config.seed)
    sizes = [-(-4 * p.numel() // 512) * 512 for p in adapter_parameters(model.network).values()]
    peak = found.peak("optimizer")
    assert peak["optimizer"] == 2 * sum(sizes) + 512 * len(sizes)
    assert peak["reference"] >= sum(sizes)


@pytest.mark.long
def test_weights_of_dimensions_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """They are a dictionary, which plans are found by."""
    weighted = load_config(None, ["reward.dimensions={temporal_consistency: 2, visual_quality: 1}"])
    _, plan = check_fits(weighted, torch.device("cpu"))
    assert plan.startswith("plan: ")


def test_a_run_of_several_processes_is_planned_as_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def planner(config: Config, gpu: object, processes: int = 1) -> Plan:
        asked.append(processes)
        return Plan((PhasePlan("rollout", {"activations": 1}, 0, 0.0, None),), 10, "a test", None, ())

    monkeypatch.setattr("vpo_engine.planning.planner.plan_run", planner)
    monkeypatch.setattr("vpo_engine.planning.planner.planned_disk", lambda *_: "")
    check_fits(load_config(None, ["memory.preset=balanced"]), CPU, 4)
    assert len(asked) >= 3
    assert set(asked) == {4}


def test_a_step_takes_the_seconds_of_its_products_and_bytes_without_the_text(sprites: Trace):
    found = estimate(load_config(None), sprites, A100, 2**40, "a test")
    expected = {
        name: sprites.flops(name) / (MATRIX_EFFICIENCY * A100.flops)
        + sprites.traffic(name) / (TRAFFIC_EFFICIENCY * A100.bandwidth)
        for name in sprites.names
    }
    assert {phase.name: phase.seconds for phase in found.phases} == pytest.approx(expected)
    assert expected.pop("text") > 0
    assert found.seconds == pytest.approx(sum(expected.values()))
