"""Whole runs of the toy against an independent computation of the same runs (see ``oracle``)."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import engine
import pytest
import torch
from checks import CASES, check_lines, check_metrics, check_policies, check_rows, config_of, expected_of
from toy import ToyNetwork, caption_of, scores_of

from vpo_engine.objectives.dpo import DPO


@pytest.fixture(scope="module", params=CASES)
def replay(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, engine.Recording]:
    folder = tmp_path_factory.mktemp("replay")
    recording = engine.train(engine.make_config(folder, *CASES[request.param]))
    return request.param, folder / "run", recording


Replay = tuple[str, Path, engine.Recording]


def test_the_dataset_says_what_the_rules_give(replay: Replay) -> None:
    case, run, _ = replay
    check_lines(case, run)


def test_what_reaches_the_loss_is_what_the_dataset_and_the_seed_say(replay: Replay) -> None:
    case, run, recording = replay
    check_rows(recording.rows, expected_of(case).rows)
    latents = {line.position: line.latents() for line in engine.lines_of(run) if line.kept}
    for row, wanted in zip(recording.rows, expected_of(case).rows, strict=True):
        winner, loser = latents[wanted.position]
        assert torch.equal(row.winner, winner)
        assert torch.equal(row.loser, loser)


def test_policy_and_reference_become_what_the_rules_give(replay: Replay) -> None:
    case, run, _ = replay
    check_policies(case, run)


def test_the_log_says_what_the_rules_give(replay: Replay) -> None:
    case, run, _ = replay
    check_metrics(case, run)


def test_every_video_is_scored_once_with_its_own_prompt(replay: Replay) -> None:
    case, _, recording = replay
    scored = [one for one in recording.scored if one[1] not in engine.HELD_OUT]
    expected = expected_of(case).scored
    assert Counter(prompt for _, prompt in scored) == Counter(prompt for prompt, _ in expected)
    for prompt in {prompt for prompt, _ in expected}:
        ours = [video for video, name in scored if name == prompt]
        theirs = [video for name, video in expected if name == prompt]
        for one, other in zip(ours, theirs, strict=True):
            assert (one.int() - other.int()).abs().max() <= 1


def test_the_report_shows_the_widest_pairs_with_the_winner_as_the_winner(replay: Replay) -> None:
    case, run, _ = replay
    for step, gallery in engine.galleries_of(run).items():
        lines = [line for line in expected_of(case).lines if line.step == step and line.kept]
        lines = sorted(lines, key=lambda line: -line.gap)[:4]
        assert gallery.prompts == [line.prompt for line in lines]
        assert gallery.gap == pytest.approx([line.gap for line in lines], rel=2e-2, abs=1e-3)
        sides = (
            (gallery.winner_scores, gallery.winner, "winner"),
            (gallery.loser_scores, gallery.loser, "loser"),
        )
        for scores, clips, side in sides:
            for found, clip, line in zip(scores, clips, lines, strict=True):
                candidate = getattr(line, side)
                wanted = {name: found[name] for name in candidate.scores}
                assert wanted == pytest.approx(candidate.scores, rel=1e-3, abs=1e-3), (case, step, side)
                assert scores_of(clip, line.prompt)[0] == pytest.approx(found["visual_quality"], abs=1e-3)


def test_the_log_counts_every_input_of_the_networks_once(replay: Replay) -> None:
    """A sample of the update is a winner and a loser in the policy and the reference, and with guidance each twice."""
    case, run, recording = replay
    work = engine.work_of(run)
    branches = 2 if "objective.branch=guided" in CASES[case] else 1
    assert sum(update for _, update, _ in work) == 4 * branches * len(recording.rows)
    prompts, sampled = 4, {"plain": 3 * 4, "pruned by the first frames": 4 * 2 + 2 * 2}
    if case in sampled:
        assert {rollout for rollout, _, _ in work} == {prompts * sampled[case]}
    config = config_of(case)
    assert {videos for _, _, videos in work} == {config.pairs_per_step * config.rollout.candidates}


def test_predictions_of_the_update_are_as_the_branch_says(replay: Replay) -> None:
    case, _, recording = replay
    guided = "objective.branch=guided" in CASES[case]
    assert {call["guidance"] for call in recording.asked} == {2.5 if guided else 1.0}
    for call in recording.asked:
        assert len(call["inputs"]) == len(call["times"]) == len(caption_of(call["text"]))


def test_the_cases_hold_what_they_are_for() -> None:
    """Ties in the middle, unequal gaps, candidates that only a second round brought, pairs that the rules change."""
    for case in CASES:
        lines, rows = expected_of(case).lines, expected_of(case).rows
        assert any(line.kept for line in lines), case
        assert len({round(line.gap, 6) for line in lines if line.kept}) > 3, case
        assert len({row.caption.sum().item() for row in rows}) > 2, case
    plain = expected_of("draws, updates and weights").lines
    steps = [[line.kept for line in plain if line.step == step] for step in range(1, 6)]
    assert any(False in kept[1:-1] and kept[0] and kept[-1] for kept in steps), "a tie between two pairs"
    for case in ("more candidates for ties", "explored"):
        lines = expected_of(case).lines
        assert any(line.tied_at_first and line.kept for line in lines), case
        assert any(not line.kept for line in lines), case
    still = expected_of("still candidates never win").lines
    assert any(one.still for line in still for one in line.candidates)
    assert any(line.loser.still and line.kept for line in still)
    pareto = [line for line in still if line.kept]
    assert any(line.gap < max(line.selected) - min(line.selected) - 1e-3 for line in pareto)


def test_stored_pairs_are_trained_on_as_the_run_that_made_them_did(tmp_path: Path) -> None:
    """With the same rules the same rows reach the loss, in the same order, bit for bit; the policy becomes the same."""
    case = "draws, updates and weights"
    first = engine.make_config(tmp_path / "online", *CASES[case])
    online = engine.train(first)
    stored = [
        *engine.OFFLINE,
        f"offline_dpo.dataset={tmp_path / 'online' / 'run'}",
    ]
    second = engine.make_config(tmp_path / "offline", *CASES[case], *stored, "offline_dpo.refresh_every=3")
    offline = engine.train(second)
    assert len(online.rows) == len(offline.rows)
    for one, other in zip(online.rows, offline.rows, strict=True):
        for name in ("winner", "loser", "noise", "caption"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert (one.time, one.weight) == (other.time, other.weight)
    policies = [engine.policy_of(tmp_path / name / "run", 5) for name in ("online", "offline")]
    assert all(torch.equal(value, policies[1][name]) for name, value in policies[0].items())
    assert not any(prompt not in engine.HELD_OUT for _, prompt in offline.scored)


def test_a_gap_of_exactly_the_smallest_is_a_tie(tmp_path: Path) -> None:
    """Gaps of coarse scores are few numbers; with one of them as pairs.min_gap its pairs are ties, larger ones not."""
    settings = ("reward.dimensions=visual_quality", "steps=3", "checkpoint.every=null")
    engine.train(engine.make_config(tmp_path / "first", *settings))
    lines = engine.lines_of(tmp_path / "first" / "run")
    step = [line for line in lines if line.step == 1]
    gap = min(line.gap for line in step if line.kept)
    engine.train(engine.make_config(tmp_path / "second", *settings, f"pairs.min_gap={gap!r}"))
    again = [line for line in engine.lines_of(tmp_path / "second" / "run") if line.step == 1]
    assert [line.gap for line in again] == [line.gap for line in step]
    assert [line.kept for line in again] == [line.gap > gap for line in step]
    assert any(line.kept for line in again)
    assert math.isclose(sum(line.weight for line in again), sum(line.kept for line in again))


def test_stored_pairs_are_ties_up_to_a_wider_min_gap_and_go_round(tmp_path: Path) -> None:
    """Rows and weights are those of the pairs with wider gaps; after the last stored pair comes the first."""
    engine.train(engine.make_config(tmp_path / "online", "steps=2", "optimizer.warmup_steps=0"))
    lines = engine.lines_of(tmp_path / "online" / "run")
    gaps = sorted(line.gap for line in lines if line.kept)
    min_gap = gaps[len(gaps) // 2 - 1]
    settings = [
        *engine.OFFLINE,
        f"offline_dpo.dataset={tmp_path / 'online' / 'run'}",
    ]
    config = engine.make_config(
        tmp_path / "offline", *settings, "steps=3", f"pairs.min_gap={min_gap!r}", "pairs.gap_power=1"
    )
    rows = iter(engine.train(config).rows)
    for step in range(3):
        stored = [lines[position % len(lines)] for position in range(4 * step, 4 * step + 4)]
        kept = [line for line in stored if line.kept and line.gap > min_gap]
        for line in kept:
            row = next(rows)
            assert all(map(torch.equal, (row.winner, row.loser), line.latents()))
            mean = sum(one.gap for one in kept) / len(kept)
            assert row.weight == pytest.approx(line.gap / mean, rel=1e-5)
    assert next(rows, None) is None


def test_the_accuracy_is_logged_where_a_refresh_has_left_a_difference(tmp_path: Path) -> None:
    """Half-way to the policy the reference is another network still, so that margins are not 0."""
    rows = {}
    for share in (0.5, 1.0):
        settings = ("steps=2", "reference.refresh_every=1", f"reference.refresh_share={share}")
        engine.train(engine.make_config(tmp_path / str(share), *settings))
        first, rows[share] = engine.metrics_of(tmp_path / str(share) / "run")
        assert first["margin"] == 0
        assert "implicit_accuracy" not in first, "before the first update the reference is the policy"
    assert rows[0.5]["margin"] != 0
    assert 0 <= rows[0.5]["implicit_accuracy"] <= 1
    assert rows[1.0]["margin"] == 0
    assert "implicit_accuracy" not in rows[1.0]


def test_a_dataset_of_scores_holds_no_latents(tmp_path: Path) -> None:
    engine.train(engine.make_config(tmp_path, "steps=1", "pairs.dataset=scores"))
    lines = engine.lines_of(tmp_path / "run")
    assert any(line.kept for line in lines)
    assert all((line.row, line.latents_file) == (None, None) for line in lines)
    assert not (tmp_path / "run/preference_dataset/latents").exists()


@pytest.mark.parametrize("sequential", [False, True])
def test_winners_and_losers_go_through_the_networks_one_after_the_other_only_if_told(
    tmp_path: Path, sequential: bool
) -> None:
    run = engine.train(engine.make_config(tmp_path, "steps=1", f"memory.sequential={sequential}"))
    assert len(run.rows) > 1
    assert len(run.asked[-1]["inputs"]) == len(run.rows) * (1 if sequential else 2)


def test_the_average_takes_in_the_weights_that_a_step_has_made(tmp_path: Path) -> None:
    """The first update keeps a tenth of what was there, the second 2 / 11."""
    engine.train(engine.make_config(tmp_path, "steps=2", "ema.decay=0.9"))
    run = tmp_path / "run"
    assert [row["optimizer_steps"] for row in engine.metrics_of(run)] == [1, 2]
    expected = ToyNetwork().state_dict()
    for step, kept in ((1, 1 / 10), (2, 2 / 11)):
        policy, saved = engine.policy_of(run, step), engine.saved_tensors(run, step)
        expected = {name: kept * value + (1 - kept) * policy[name] for name, value in expected.items()}
        for name, value in expected.items():
            torch.testing.assert_close(saved[f"ema/model.safetensors/{name}"], value)


def test_the_error_of_a_mean_counts_pairs_and_not_their_timesteps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples of a pair resemble each other, so that they count as one."""
    means, counted = DPO.means, list[tuple[float, int]]()

    def noted(sums: list[float], samples: float, pairs: int) -> dict[str, float]:
        counted.append((samples, pairs))
        return means(sums, samples, pairs)

    monkeypatch.setattr(DPO, "means", staticmethod(noted))
    engine.train(engine.make_config(tmp_path, "steps=2", "objective.timesteps_per_pair=3"))
    pairs = [row["pairs"] for row in engine.metrics_of(tmp_path / "run") if row["pairs"]]
    assert counted == [(3 * number, number) for number in pairs]
    assert counted
