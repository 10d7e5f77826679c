"""The comparison of ways to divide a run among GPUs: memory, bytes, times, refusals, and what is recommended."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from vpo_engine import plan
from vpo_engine.config_file import load_config
from vpo_engine.distributed.sequence_traffic import sequence_traffic
from vpo_engine.distributed.traffic import Division, Exchanged, Transfer, step_transfers
from vpo_engine.planning import strategies
from vpo_engine.planning.estimate import PhasePlan, Plan
from vpo_engine.planning.gpus import GIB, GPUS
from vpo_engine.planning.links import EFFICIENCY, Cluster, make_cluster
from vpo_engine.planning.parts import Assumed, blueprint_of
from vpo_engine.planning.planner import plan_run
from vpo_engine.planning.scaling_report import comparison, started
from vpo_engine.planning.sequence_bytes import sequence_bytes
from vpo_engine.planning.strategies import Refused, Row, Strategy, compare, divided, recommended

A100 = GPUS["a100-80g"]


def cluster(gpus: int, nodes: int = 1) -> Cluster:
    return make_cluster(gpus, nodes, "a100-80g", None, None)


def row(
    name: str, gib: float, seconds: float | None, engine: str = "data_parallel", limit: float = 80.0
) -> Row:
    phase = PhasePlan("update", {"weights": int(gib * GIB)}, 0, 0.0, seconds)
    config = load_config(None, [f"distributed.engine={engine}"])
    planned = Plan((phase,), int(limit * GIB), "a test", A100, ())
    return Row(Strategy(name, {}), config, 8, planned, (), {})


class TestRecommendation:
    def test_the_fastest_of_those_that_fit_is_taken(self) -> None:
        rows = [row("whole", 90, 1.0), row("zero", 40, 3.0, "deepspeed"), row("other", 60, 2.0, "deepspeed")]
        chosen, why = recommended(rows)
        assert chosen is rows[2]
        assert why == "it fits and is the fastest; where every process holds everything, nothing fits"

    def test_of_equally_fast_ones_the_simplest_is_taken(self) -> None:
        rows = [row("whole", 60, 1.015), row("zero", 40, 1.0, "deepspeed")]
        chosen, why = recommended(rows)
        assert chosen is rows[0]
        assert "none is faster by more than 2%" in why
        assert recommended([row("whole", 60, 1.03), rows[1]])[0] is rows[1]

    def test_where_nothing_fits_the_one_that_takes_least_is_named(self) -> None:
        chosen, why = recommended([row("whole", 90, 1.0), row("zero", 85, 3.0)])
        assert chosen is None
        assert "the least memory takes zero (85.0 GiB in update)" in why

    def test_without_rates_the_simplest_that_fits_is_taken(self) -> None:
        rows = [row("whole", 90, None), row("zero", 40, None)]
        assert recommended(rows)[0] is rows[1]


@pytest.fixture(scope="module")
def sprites() -> list[Row]:
    """Every strategy of the sprites world, with four candidates, on four GPUs."""
    config = load_config(None, ["rollout.guidance=4", "rollout.batch_size=1", "processes.per_prompt=2"])
    rows, refused = compare(config, A100, cluster(4))
    assert [one.strategy.name for one in refused] == ["data parallel, own prompts, a GPU for the reward"]
    assert "pairs_per_step=16 cannot be shared equally by 3 processes" in refused[0].reason
    return rows


def of(rows: list[Row], name: str) -> Row:
    return next(row for row in rows if row.strategy.name == name)


def category(row: Row, name: str, phase: str = "update") -> int:
    return next(one for one in row.plan.phases if one.name == phase).bytes.get(name, 0)


@pytest.mark.long
class TestComparison:
    def test_each_stage_divides_what_it_says(self, sprites: list[Row]) -> None:
        whole = of(sprites, "data parallel, own prompts")
        zero = [of(sprites, f"ZeRO {stage}, own prompts") for stage in (1, 2, 3)]
        weights, optimizer = category(whole, "weights"), category(whole, "optimizer")
        for one in zero:  # moments, and the float32 copy of float32 weights
            assert category(one, "optimizer") == (optimizer + weights) // 4
        gradients = category(whole, "gradients")
        assert [category(one, "gradients") for one in zero] == [gradients, gradients // 4, gradients // 4]
        assert category(zero[2], "weights") == weights // 4 + weights, "up to 1e9 weights are whole at once"
        assert category(zero[2], "weights", "rollout") == weights
        offload = of(sprites, "ZeRO 2 with offload, own prompts")
        assert category(offload, "optimizer") == 0
        assert offload.waits["host"] > 0

    def test_processes_that_share_candidates_compute_as_much_and_send_more(self, sprites: list[Row]) -> None:
        whole, team = (of(sprites, f"data parallel, {name}") for name in ("own prompts", "candidates over 2"))
        assert team.computing == pytest.approx(whole.computing, rel=0.05)
        assert team.sent > whole.sent
        assert {transfer.purpose for transfer in team.sends} == {"gradients", "candidates"}
        assert whole.seconds == pytest.approx((whole.computing or 0) + sum(whole.waits.values()))

    def test_processes_that_share_videos_have_slices_of_more_of_them_and_exchange_tokens(
        self, sprites: list[Row]
    ) -> None:
        whole, shared = (of(sprites, f"data parallel, {name}") for name in ("own prompts", "a video over 2"))
        # Halves of twice as many pairs: of five latent frames one process has three, and each has the whole text.
        ratio = category(shared, "activations") / category(whole, "activations")
        assert 1 < ratio < 2 * 3 / 5, "whole videos would be twice as much"
        assert {transfer.purpose: transfer.ranks for transfer in shared.sends} == {
            "gradients": 4,
            "sequence": 2,
        }

    def test_the_optimizer_of_a_divided_run_steps_its_part(self, sprites: list[Row]) -> None:
        whole, zero = (of(sprites, name) for name in ("data parallel, own prompts", "ZeRO 2, own prompts"))
        phase = next(one for one in whole.plan.phases if one.name == "optimizer")
        assert whole.computing is not None
        assert zero.computing == pytest.approx(whole.computing - 0.75 * (phase.seconds or 0), rel=1e-6)


class TestStrategies:
    def test_the_simplest_is_first_and_zero_comes_with_the_smallest_teams_that_work(self) -> None:
        config = load_config(None, ["pairs_per_step=8", "rollout.guidance=4"])
        names = [one.name for one in strategies.strategies(config, 16)]
        assert names[:5] == [
            "data parallel, own prompts",
            "data parallel, candidates over 2",
            "data parallel, candidates over 4",
            "data parallel, candidates over 4, guidance over 2",
            "data parallel, a video over 2",
        ]
        assert "ZeRO 2, candidates over 2" in names

    def test_guidance_is_split_where_candidates_are_too_few_for_all_gpus(self) -> None:
        config = load_config(None, ["pairs_per_step=8", "rollout.guidance=4"])
        found = {}
        for one in strategies.strategies(config, 64):
            try:
                found[one.name] = divided(config, one.settings, 64)
            except ValueError as error:
                found[one.name] = str(error)
        assert (
            "pairs_per_step=8 cannot be shared equally by 64 processes" in found["data parallel, own prompts"]
        )
        split = found["data parallel, candidates over 4, guidance over 2"]
        assert (split.processes.per_prompt, split.processes.split_guidance) == (8, True)
        zero = found["ZeRO 1, candidates over 4, guidance over 2"]
        assert (zero.processes.per_prompt, zero.distributed.zero_stage) == (8, 1)

    def test_without_guidance_there_is_nothing_to_split(self) -> None:
        names = [one.name for one in strategies.strategies(load_config(None), 64)]
        assert not [name for name in names if "guidance" in name]

    def test_settings_of_the_configuration_that_divide_it_give_way(self) -> None:
        config = load_config(None, ["distributed.engine=deepspeed", "distributed.zero_stage=3"])
        changed = divided(config, {}, 2)
        assert (changed.distributed.engine, changed.distributed.zero_stage) == ("data_parallel", None)

    def test_what_a_setting_excludes_is_left_out_with_the_reason(self) -> None:
        config = load_config(None, ["memory.offload_idle=true"])
        with pytest.raises(
            ValueError, match=r"^distributed.engine=deepspeed excludes memory.offload_idle=true: "
        ):
            divided(config, {"distributed.engine": "deepspeed"}, 2)
        with pytest.raises(ValueError, match=r"the reward model would have the only GPU"):
            divided(config, {"processes.reward": True}, 1)


class TestSequence:
    @pytest.mark.long
    def test_a_process_that_holds_a_slice_computes_and_keeps_a_part(self) -> None:
        """Of two processes each has one prompt of its own, or a slice of both: at most three of five latent frames."""
        words = [
            "pairs_per_step=2",
            "rollout.candidates=2",
            "rollout.steps=2",
            "objective.micro_batch_size=1",
        ]
        own, slices = (
            {phase.name: phase for phase in plan_run(config, GPUS["h200"], 2).phases}
            for config in (
                load_config(None, [*words, f"distributed.sequence_parallel={size}"]) for size in (1, 2)
            )
        )
        for name in ("rollout", "update"):
            assert 0.95 < slices[name].flops / own[name].flops < 2 * 3 / 5 * 1.05
        assert slices["update"].bytes["activations"] < 0.8 * own["update"].bytes["activations"]

    def test_bytes_of_a_pass_without_values_are_those_of_the_formulas(self) -> None:
        """The slices of the sprites world's five latent frames are three and two: the first process sends of three."""
        config = load_config(None, ["distributed.sequence_parallel=2", "model.dtype=float32"])
        blueprint = blueprint_of(config, Assumed())
        network, latents = blueprint.model.network, blueprint.model.latent_shape
        forward, backward = sequence_bytes(config)
        tokens = latents[1] * latents[2] * latents[3] // math.prod(network.settings.patch_size)
        expected = sequence_traffic(
            "axes",
            processes=2,
            blocks=2 * blueprint.depth,
            tokens=tokens,
            width=network.settings.hidden_size,
            element_size=4,
            output_tokens=tokens,
            output_values=math.prod(network.settings.patch_size)
            * network.settings.in_channels
            * (1 + network.settings.pred_sigma),
            output_size=4,
        )
        unequal = 1 / latents[1]  # halves of an odd number of frames differ by one
        assert forward == pytest.approx(expected.forward, rel=unequal)
        assert backward == pytest.approx(expected.backward, rel=unequal)

    def test_a_pair_takes_its_passes(self) -> None:
        step = Exchanged(trained=0, weight_bytes=4, forward=10.0, backward=20.0, predicted=6)
        shared = Division(ranks=4, sequence=2, team=2, prompts=3, samples=5)
        (transfer,) = step_transfers(replace(step, latents=0), replace(shared, team=1))
        assert transfer == Transfer("sequence", 3 * 6 * 10 + 5 * (4 * 10 + 2 * 20), 2)
        (transfer,) = step_transfers(replace(step, sequential=True), replace(shared, team=1))
        assert transfer.nbytes == 3 * 6 * 10 + 5 * (5 * 10 + 2 * 20)
        (transfer,) = step_transfers(step, shared)
        assert transfer.nbytes == 3 * 6 / 2 * 10 + 5 * (4 * 10 + 2 * 20)


class TestLinks:
    def test_a_group_within_a_machine_uses_its_links_and_others_the_slowest(self) -> None:
        machines = make_cluster(8, 2, "a100-80g", "nvlink3", "1x-hdr")
        assert machines.rate(2) == machines.rate(8) == EFFICIENCY * 300e9
        assert machines.rate(16) == EFFICIENCY * 25e9
        assert machines.rate(3) == EFFICIENCY * 25e9, "some group of three is on both machines"
        assert machines.seconds(Transfer("gradients", 20e9, 16)) == pytest.approx(1.0)

    def test_machines_have_the_links_that_are_usual_for_their_gpus(self) -> None:
        usual = [make_cluster(8, 2, name, None, None) for name in ("a100-80g", "h200", "rtx4090")]
        assert [(one.within.name, one.between.name) for one in usual] == [
            ("nvlink3", "8x-hdr"),
            ("nvlink4", "8x-ndr"),
            ("pcie4", "100gbe"),
        ]

    def test_the_process_of_the_reward_model_receives_all_videos(self) -> None:
        machines = cluster(4)
        assert machines.seconds(Transfer("videos", 1e9, 4)) == pytest.approx(3.0)


class TestCommand:
    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["--gpus", "0"], "--gpus 0 must be at least 1"),
            (["--gpus", "8", "--nodes", "0"], "--nodes 0 must be at least 1"),
            (["--nodes", "2"], "--nodes 2 describes several GPUs; give the GPUs of each machine as --gpus"),
            (["--gpus", "8", "--link", "nvlink9"], "--link nvlink9 is not known; did you mean nvlink"),
            (
                ["--gpus", "8", "--network", "modem"],
                "--network modem is not known; it must be one of: 8x-hdr",
            ),
        ],
    )
    def test_what_makes_no_sense_is_one_line(
        self, words: list[str], text: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert plan.main(words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line

    def test_a_strategy_that_does_not_fit_is_marked_and_the_command_is_given(self) -> None:
        machines = cluster(8, 2)
        rows = [row("whole", 90, 1.0), replace(row("zero", 40, 3.0, "deepspeed"))]
        settings = {"distributed.engine": "deepspeed", "distributed.offload_optimizer": True}
        words = "distributed.engine=deepspeed distributed.offload_optimizer=true"
        rows[1] = replace(rows[1], strategy=Strategy("zero", settings), arguments=words)
        refused = [Refused(Strategy(name, {}), "because") for name in ("one", "two")]
        given = ["mine.yaml", "prompts.train=my prompts.txt"]
        said = comparison(machines, rows, refused, given)
        lines = said.splitlines()
        assert lines[0] == "16 GPUs (2 machines of 8; nvlink3 within, 8x-hdr between them)"
        assert "NO" in next(line for line in lines if line.startswith("whole"))
        assert "yes" in next(line for line in lines if line.startswith("zero"))
        assert "left out: one; two: because" in lines
        assert "a model, not a measurement" in said
        command = started(rows[1], machines, given)
        assert lines[-1] == f"  {command}"
        assert max(map(len, lines[:-1])) <= 118
        assert command == (
            "torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-id=mine --rdzv-endpoint=FIRST_MACHINE:29500 "
            "--nproc-per-node=8 -m vpo_engine.train mine.yaml 'prompts.train=my prompts.txt' " + words
        )

    @pytest.mark.long
    def test_the_command_compares_for_people_and_for_machines(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--gpus", "2", "--gpu", "a100-80g", "rollout.batch_size=1"]
        assert plan.main([*words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["recommended"] == "data parallel, own prompts"
        assert found["gpu"] == "a100-80g"
        names = [one["name"] for one in found["strategies"]]
        assert names[0] == "data parallel, own prompts"
        assert all(one["fits"] for one in found["strategies"])
        assert plan.main(words) == 0
        said = capsys.readouterr().out
        assert said.startswith("2 GPUs (one machine of 2; nvlink3 within)\n")
        assert all(name in said for name in names)
        assert "recommended: data parallel, own prompts: " in said


def test_the_process_of_the_reward_model_scores_for_all_and_sampling_hides_a_part() -> None:
    phases = tuple(
        PhasePlan(name, {}, 0, 0.0, seconds) for name, seconds in (("rollout", 5.0), ("reward", 2.0))
    )
    known = replace(row("whole", 40, 1.0), plan=Plan(phases, GIB, "a test", A100, ()))
    for overlap, expected in (("false", 16.0), ("true", 11.0)):
        config = load_config(None, ["processes.reward=true", f"rollout.overlap={overlap}"])
        given = (Exchanged(trained=1, weight_bytes=4), Division(ranks=3), (), [known])
        assert strategies._waits(config, cluster(4), *given) == {"reward": expected}


def test_an_optimizer_that_the_json_file_keeps_on_the_host_takes_the_time_of_one(tmp_path: Path) -> None:
    """Its steps are not those of the GPU, and gradients and weights are copied."""
    file = tmp_path / "ds.json"
    phase = PhasePlan("optimizer", {}, 0, 0.0, 4.0)
    found = []
    for device in ("cpu", "none"):
        file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": device}}}))
        config = load_config(None, ["distributed.engine=deepspeed", f"distributed.deepspeed_config={file}"])
        step, shared = Exchanged(trained=10**9, weight_bytes=4), Division(ranks=8, stage=2)
        waits = strategies._waits(config, cluster(8), step, shared, (), [])
        one = Row(Strategy("zero", {}), config, 8, Plan((phase,), GIB, "a test", A100, ()), (), waits)
        found.append((one.computing, set(waits)))
    assert found == [(0.0, {"host"}), (0.5, set())]
