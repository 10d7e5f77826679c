"""The pair policy in a step: resampling of ties, gap weights, Pareto, normalised dimensions, the preference dataset and
training from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from power_cut import copy_cut
from process_group import run_in_group
from safetensors.torch import load_file
from step_case import candidates_of, sample_candidates, step_on
from torch import Tensor

from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.data.preference_dataset import StoredPair, read_dataset
from vpo_engine.distributed.processes import Processes
from vpo_engine.method import Step
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.protocols import TextEmbedding
from vpo_engine.reference.store import build_reference
from vpo_engine.rollout.preference_dataset import StoredPairs
from vpo_engine.runs.log import read_metrics
from vpo_engine.values import Prompt

PROMPTS = ("a red circle moving left", "a blue square moving up", "a green triangle moving right")
POSITIONS = (5, 6, 7)
Make = Callable[..., Config]


class Scripted:
    """Scores the videos of each call by a row of the script, the same for every dimension but what ``more`` gives."""

    def __init__(self, *rows: Sequence[float], more: dict[str, Sequence[float]] | None = None) -> None:
        self.rows, self.more = list(rows), more or {}
        self.dimensions = ("temporal_consistency", *self.more)
        self.asked: list[list[str]] = []

    def score(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.asked.append(list(prompts))
        row = torch.tensor(self.rows.pop(0))
        assert len(row) == len(videos) == len(prompts)
        return {"temporal_consistency": row} | {name: torch.tensor(each) for name, each in self.more.items()}


def make(config: Config, reward: object) -> OnlineVPO:
    torch.manual_seed(0)
    processes = Processes.start("cpu")
    model = build_model(config, processes, lambda _: None)
    model.prepare(PROMPTS)
    return OnlineVPO(config, model, reward, build_reference("copy", model.network), processes)  # type: ignore[arg-type]


def run_step(algorithm: OnlineVPO, count: int = 3) -> Step:
    return step_on(algorithm, PROMPTS[:count], POSITIONS[:count])


def numbers_of(step: Step) -> list[list[int]]:
    """Return the numbers of the candidates of each prompt."""
    return [[candidate.number for candidate in choice.candidates] for choice in step.choices]


# --- Resampling of ties ---


def test_only_tied_prompts_get_more_candidates_and_pairs_are_of_all(small: Make) -> None:
    config = small("rollout.candidates=2", "pairs.resample=2")
    # Round 0: prompts 1 and 2 tie. Round 1: prompt 1 is told apart by a new best; prompt 2 ties again. Round 2: a new
    # worst for prompt 2.
    reward = Scripted([1.0, 3.0, 2.0, 2.0, 4.0, 4.0], [2.0, 9.0, 4.0, 4.0], [4.0, 0.5])
    result = run_step(make(config, reward))
    assert [len(asked) for asked in reward.asked] == [6, 4, 2]
    assert reward.asked[1] == [PROMPTS[1]] * 2 + [PROMPTS[2]] * 2
    assert [pair.winner.number for pair in result.pairs] == [1, 3, 0]
    assert [pair.loser.number for pair in result.pairs] == [0, 0, 5]
    assert [pair.gap for pair in result.pairs] == [2.0, 7.0, 3.5]
    assert numbers_of(result) == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert result.metrics["tie_rate"] == 0
    assert result.metrics["tie_rate_before_resample"] == pytest.approx(2 / 3)
    assert result.metrics["reward/temporal_consistency"] == pytest.approx(
        16 / 6
    )  # of all prompts' first candidates
    assert result.metrics["pairs"] == 3


@pytest.mark.long
def test_what_refill_samples_is_a_function_of_seed_position_and_number(small: Make) -> None:
    """New noise in every round, the same in every run, whatever else is in the batch; first rounds as without it."""
    config = small("rollout.candidates=2", "pairs.resample=1")
    tie = [1.0] * 4
    both = run_step(make(config, Scripted(tie, [1.0, 2.0, 3.0, 4.0])), 2)
    alone = run_step(make(config, Scripted([5.0, 6.0, 1.0, 1.0], [3.0, 4.0])), 2)
    plain = run_step(make(small("rollout.candidates=2"), Scripted([5.0, 6.0, 1.0, 1.0])), 2)
    assert numbers_of(both) == [[0, 1, 2, 3]] * 2
    assert numbers_of(alone) == [[0, 1], [0, 1, 2, 3]]
    assert numbers_of(plain) == [[0, 1]] * 2

    def latents(step: Step, row: int, count: int = 4) -> Tensor:
        return torch.stack([candidate.latents for candidate in step.choices[row].candidates[:count]])

    torch.testing.assert_close(latents(both, 1), latents(alone, 1), rtol=0, atol=2e-5)
    for row in range(2):
        torch.testing.assert_close(latents(plain, row), latents(alone, row, 2), rtol=0, atol=2e-5)
    flat = candidates_of(both).flatten(0, 1).flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(1e9).min() > 1
    again = run_step(make(config, Scripted(tie, [1.0, 2.0, 3.0, 4.0])), 2)
    assert torch.equal(candidates_of(again), candidates_of(both))


def test_prompts_that_stay_a_tie_are_skipped_and_counted(small: Make) -> None:
    config = small("rollout.candidates=2", "pairs.resample=2", "pairs.min_gap=0.5")
    result = run_step(make(config, Scripted([1.0, 1.4, 1.0, 2.0], [1.1, 1.3], [1.45, 1.2])), 2)
    assert [choice.tied for choice in result.choices] == [True, False]
    assert result.metrics["tie_rate"] == 0.5
    assert result.metrics["pairs"] == 1
    assert [(pair.prompt.position, pair.weight) for pair in result.pairs] == [(6, 1.0)]


def test_pruned_candidates_keep_their_numbers(small: Make) -> None:
    config = small(
        "rollout.candidates=4", "rollout.steps=4", "rollout.prune={after: 0.5, keep: 2}", "pairs.resample=1"
    )
    previews, tie = [0.0, 3.0, 1.0, 2.0], [1.0, 1.0]
    reward = Scripted(previews, tie, [5.0, 6.0, 7.0, 4.0], [1.0, 0.0])
    result = run_step(make(config, reward), 1)
    assert numbers_of(result) == [[0, 1, 6, 7]]
    assert [(pair.winner.number, pair.loser.number) for pair in result.pairs] == [(0, 7)]


# --- Weights ---


@pytest.mark.long
def test_gap_weights_scale_each_pairs_gradient(small: Make) -> None:
    """The step's gradient is the mean of the pairs' own gradients, each times gap / mean gap."""
    scores = [0.0, 1.0, 0.0, 3.0]

    def gradient(*overrides: str, script: list[float], count: int, shift: int = 0) -> list[Tensor]:
        config = small("rollout.candidates=2", "optimizer.clip=null", *overrides)
        algorithm = make(config, Scripted(script))
        with torch.no_grad():
            for parameter in algorithm.parameters:  # away from the reference, where margins differ
                parameter.add_(
                    0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
        found: list[Tensor] = []
        algorithm.optimizer.step = lambda: found.extend(p.grad.clone() for p in algorithm.parameters) or 0.0  # type: ignore[method-assign, func-returns-value, union-attr]
        prompts, positions = PROMPTS[shift : shift + count], POSITIONS[shift : shift + count]
        result = step_on(algorithm, prompts, positions)
        if count == 2:
            expected = [0.5, 1.5] if "pairs.gap_power=1" in overrides else [1.0, 1.0]
            assert [pair.weight for pair in result.pairs] == expected
        return found

    first = gradient(script=scores[:2], count=1)
    second = gradient(script=scores[2:], count=1, shift=1)
    weighted = gradient("pairs.gap_power=1", script=scores, count=2)
    plain = gradient(script=scores, count=2)
    for one, two, both, alike in zip(first, second, weighted, plain, strict=True):
        size = float(both.abs().max())
        torch.testing.assert_close(both, (0.5 * one + 1.5 * two) / 2, rtol=2e-3, atol=1e-4 * size + 1e-9)
        torch.testing.assert_close(alike, (one + two) / 2, rtol=2e-3, atol=1e-4 * size + 1e-9)


# --- Rules ---


def test_pareto_and_normalised_dimensions_reach_the_choice(small: Make) -> None:
    scores = [1.0, 2.0, 3.0]
    other = [300.0, 200.0, 250.0]
    dimensions = "reward.dimensions=[temporal_consistency, dynamic_degree]"

    def chosen(*overrides: str) -> tuple[int, int]:
        config = small("rollout.candidates=3", dimensions, *overrides)
        (pair,) = run_step(make(config, Scripted(scores, more={"dynamic_degree": other})), 1).pairs
        return pair.winner.number, pair.loser.number

    assert chosen() == (0, 1)  # the larger numbers rule
    assert chosen("pairs.rule=pareto") == (2, 1)  # 0 is better than 1 in the one, worse in the other
    assert chosen("reward.normalise=group") == (2, 1)
    weights = "reward.dimensions={temporal_consistency: 1, dynamic_degree: 0.001}"
    assert chosen(weights) == (2, 0)


# --- Preference dataset ---

DATASET = (
    "pairs.dataset=latents",
    "pairs.resample=1",
    "pairs.gap_power=1",
    "pairs.min_gap=0.02",
    "reward.dimensions=global",
    "evaluation.every=null",
    "evaluation.prompts=2",
)


def policy(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoints/step_00000004/policy/model.safetensors")


@pytest.fixture(scope="module")
def written(smallest: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with the whole pair policy."""
    run = tmp_path_factory.mktemp("written") / "run"
    assert entry.main([*smallest, *DATASET, f"run_dir={run}"]) == 0
    return run


def rows(run: Path) -> list[dict[str, object]]:
    return [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]


def test_a_run_writes_what_an_audit_needs(written: Path) -> None:
    pairs = list(read_dataset(written))
    assert [pair.position for pair in pairs] == list(range(8))
    assert [pair.step for pair in pairs] == [1, 1, 2, 2, 3, 3, 4, 4]
    for pair in pairs:
        assert set(pair.scores) > {"visual_quality", "text_alignment"}
        means = torch.tensor(list(pair.scores.values())).mean(0)
        torch.testing.assert_close(means, torch.tensor(pair.selected))
        selected = dict(zip(pair.candidates, pair.selected, strict=True))
        if pair.kept:
            assert selected[pair.winner] == max(pair.selected)
            assert selected[pair.loser] == min(pair.selected)
            assert pair.gap == pytest.approx(selected[pair.winner] - selected[pair.loser], abs=1e-6)
            assert pair.gap > 0.02
        first = pair.selected[:2]
        assert len(pair.candidates) == (2 if abs(first[0] - first[1]) > 0.02 else 4)
    for step, row in enumerate(rows(written), start=1):
        kept = [pair for pair in pairs if pair.step == step and pair.kept]
        assert row["pairs"] == len(kept)
        assert row["tie_rate"] == 1 - len(kept) / 2
        assert sum(pair.weight for pair in kept) == pytest.approx(len(kept))


@pytest.mark.long
def test_latents_of_the_dataset_are_what_seed_and_number_sample_again(written: Path) -> None:
    """An audit: candidate numbers, seed and position give the stored latents back, from the policy of step 1."""
    config = load_config(written / "config.yaml")
    model = build_model(config, Processes.start("cpu"), lambda _: None)
    first = [pair for pair in read_dataset(written) if pair.step == 1 and pair.kept]
    assert first
    model.prepare([pair.prompt for pair in first])
    for pair in first:
        for number, stored in zip((pair.winner, pair.loser), pair.latents(), strict=True):
            block, place = divmod(number, config.rollout.candidates)
            text = model.embed([pair.prompt])
            sampled = sample_candidates(
                model,
                model.network,
                text,
                [pair.position],
                config.rollout,
                pair.seed,
                torch.device("cpu"),
                attempt=block,
            )
            torch.testing.assert_close(sampled[0, place], stored, rtol=0, atol=5e-5)


@pytest.mark.long
def test_training_from_the_dataset_repeats_the_run_bit_for_bit(
    written: Path, smallest: list[str], tmp_path: Path
) -> None:
    """Same pairs, draws and weights: the same losses, and the same policy, without a single candidate sampled."""
    run = tmp_path / "offline"
    unused = (
        "pairs.dataset",
        "pairs.resample",
        "rollout.candidates",
        "reference.refresh_every",
        "prompts.train",
    )
    online = [*smallest, *DATASET]
    offline = [setting for setting in online if not setting.startswith(unused)]
    every = [
        setting.partition("=")[2] for setting in online if setting.startswith("reference.refresh_every")
    ][-1]
    source = ["method=offline_dpo", f"offline_dpo.dataset={written}", f"offline_dpo.refresh_every={every}"]
    assert entry.main([*offline, *source, f"run_dir={run}"]) == 0
    numbers = (
        "loss",
        "margin",
        "implicit_accuracy",
        "winner_error_change",
        "loser_error_change",
        "grad_norm",
    )
    same = (*numbers, "pairs", "lr", "tie_rate", "reward/gap")
    for one, other in zip(rows(written), rows(run), strict=True):
        assert [other.get(name) for name in same] == [one.get(name) for name in same]
        assert "seconds/rollout" not in other
    trained = policy(run)
    assert all(torch.equal(value, trained[name]) for name, value in policy(written).items())


@pytest.mark.long
def test_two_processes_write_and_weigh_as_one(written: Path, smallest: list[str], tmp_path: Path) -> None:
    """Each its own file; read as one preference dataset, with weights whose mean is 1 over both."""
    run = tmp_path / "run"
    run_in_group(tmp_path, 2, entry.main, [*smallest, *DATASET, f"run_dir={run}"])
    assert sorted(path.name for path in (run / "preference_dataset").glob("*.jsonl")) == [
        "pairs_0000.jsonl",
        "pairs_0001.jsonl",
    ]
    for one, other in zip(read_dataset(written), read_dataset(run), strict=True):
        same = ("step", "position", "prompt", "seed", "candidates", "winner", "loser", "kept")
        assert [getattr(one, name) for name in same] == [getattr(other, name) for name in same]
        assert other.gap == pytest.approx(one.gap, abs=1e-3)
        assert other.weight == pytest.approx(one.weight, rel=1e-2)
        if one.kept:
            for first, second in zip(one.latents(), other.latents(), strict=True):
                torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-2)
    trained = policy(run)
    for name, value in policy(written).items():
        if not name.endswith("cross_attn.kv_linear.bias"):  # half of it has no gradient but rounding
            torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.long
def test_a_resumed_run_writes_the_same_dataset(written: Path, smallest: list[str], tmp_path: Path) -> None:
    """The run died after step 2 was saved, and while it wrote the last line of step 4."""
    run, name = tmp_path / "run", "preference_dataset/pairs_0000.jsonl"
    copy_cut(written, run, 2)
    (run / name).write_bytes((written / name).read_bytes()[:-40])
    assert entry.main([*smallest, *DATASET, f"run_dir={run}", "checkpoint.resume=true"]) == 0
    assert (run / name).read_bytes() == (written / name).read_bytes()

    def latents(pair: StoredPair) -> list[Tensor]:
        return list(pair.latents()) if pair.kept else []

    for one, other in zip(read_dataset(written), read_dataset(run), strict=True):
        assert all(map(torch.equal, latents(one), latents(other)))


def test_stored_pairs_go_round_and_know_a_wider_min_gap(written: Path) -> None:
    stored = StoredPairs(written)
    assert len(stored) == 8
    prompts = [pair.prompt for pair in read_dataset(written)]
    assert [item.text for item in stored.take(6, 4)] == [*prompts[6:], *prompts[:2]]
    gaps = sorted(pair.gap for pair in read_dataset(written) if pair.kept)
    shape = next(pair for pair in read_dataset(written) if pair.kept).latents()[0].shape
    text = TextEmbedding(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    stream = [Prompt(prompt, text, position) for position, prompt in enumerate(prompts)]
    choices = StoredPairs(written, gaps[-2]).choices(stream, shape, torch.device("cpu"))
    assert [choice.gap for choice in choices if not choice.tied] == [gaps[-1]]
    with pytest.raises(
        ValueError, match=r"all 8 pairs of the preference dataset at .* are ties; nothing is learned"
    ):
        StoredPairs(written, gaps[-1])
    with pytest.raises(
        ValueError, match=r"the preference dataset holds latents .*, but the model's are \[9, 9, 9, 9\]"
    ):
        stored.choices(stream, (9, 9, 9, 9), torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["rollout.source=dataset"], "argument rollout.source=dataset is now method=offline_dpo"),
        (
            ["method=offline_dpo", "offline_dpo.dataset=absent"],
            "offline_dpo.dataset=absent: there is no such folder",
        ),
        (
            ["method=offline_dpo", "offline_dpo.dataset=runs/a", "pairs.resample=1"],
            "pairs.resample=1 has no meaning for method=offline_dpo (offline Diffusion-DPO); leave it out, or give "
            "pairs.resample=0",
        ),
        (["reward.min_gap=0.5"], "unknown key reward.min_gap; did you mean pairs.min_gap?"),
        (["reward.dimensions={visual_quality: 0}"], "dimensions.visual_quality=0 is no weight"),
        (["pairs.gap_power=-1"], "pairs.gap_power=-1 must be at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    overrides: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([*overrides, f"run_dir={tmp_path / 'run'}"]) == 1
    assert text in capsys.readouterr().err
