"""Read the votes of a study back, and report how often the policy won and how far people agree."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpo_engine.evaluation.paired import krippendorff, wilson
from vpo_engine.evaluation.study import SIDES, TIE, StudyFiles
from vpo_engine.full_disk import write_whole
from vpo_engine.metrics.summary import aligned
from vpo_engine.texts import one_line, read_json, shortened, why_no_file

POLICY, BASELINE = "policy", "baseline"
_RATER = 60
"""Letters of a rater's name in the table; the study's page takes no more."""


@dataclass(frozen=True)
class Ballot:
    """The votes of one person: {pair: "left", "right" or "tie"}."""

    file: Path
    rater: str
    votes: Mapping[str, str]


def read_ballot(file: Path, key: Mapping[str, Any]) -> Ballot:
    """Read a file that the study's page saved. Raise ValueError, naming file and vote, for what is not valid."""
    if not os.path.exists(file):
        raise ValueError(f"there is no file of votes at {file}; check the path (relative to {Path.cwd()})")
    if reason := why_no_file(file, "file of votes"):
        raise ValueError(reason)
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(
            f"{file} is no file of votes ({error}); give one that the study's page has saved"
        ) from error
    if not isinstance(content, dict) or not {"study", "rater", "votes"} <= set(content):
        raise ValueError(f"{file} is no file of votes; give a file that the study's page has saved")
    if content["study"] != key["study"]:
        raise ValueError(
            f"{file} holds votes on the study {_quoted(content['study'])}, and this one is {key['study']!r}; give "
            "votes on this study, or the folder of that one"
        )
    rater, rows = content["rater"], content["votes"]
    if not isinstance(rater, str) or not rater.strip() or not isinstance(rows, list):
        raise ValueError(
            f"{file} has no rater's name, or no list of votes; give the file as the page has saved it"
        )
    votes: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        pair, choice = (row.get("pair"), row.get("choice")) if isinstance(row, dict) else (None, None)
        if not isinstance(pair, str) or pair not in key["pairs"] or choice not in (*SIDES, TIE):
            raise ValueError(
                f"{file}, vote {number} is {_quoted(choice)} on {_quoted(pair)}; expected left, right or tie on a pair "
                "of this study; give the file as the page has saved it"
            )
        if pair in votes:
            raise ValueError(f"{file} has two votes on {pair}; give the file as the page has saved it")
        votes[pair] = choice
    if not votes:
        raise ValueError(f"{file} holds no vote; leave it out")
    return Ballot(file, rater.strip(), votes)


def _quoted(value: Any) -> str:
    return shortened(repr(value), 60)


def report_votes(root: Path, files: Sequence[Path]) -> str:
    """Read votes on the study in ``root``, write study_results.json and a picture, and return the tables."""
    paths = StudyFiles(root)
    key = paths.read_key()
    ballots = [read_ballot(file, key) for file in files]
    for number, ballot in enumerate(ballots):
        for other in ballots[:number]:
            if other.rater == ballot.rater:
                raise ValueError(
                    f"{other.file} and {ballot.file} are both by {ballot.rater!r}, whose votes would count twice; "
                    "leave one out, or, for two people of one name, change the rater's name in one file"
                )
    results = tally(key, ballots)
    write_whole(paths.results, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    draw_votes(root / "study_results.png", results)
    return format_votes(results)


def tally(key: Mapping[str, Any], ballots: Sequence[Ballot]) -> dict[str, Any]:
    """Return the content of study_results.json."""
    by_pair: dict[str, dict[str, str]] = {pair: {} for pair in key["pairs"]}
    for ballot in ballots:
        for pair, choice in ballot.votes.items():
            by_pair[pair][ballot.rater] = TIE if choice == TIE else key["pairs"][pair][choice]
    everything = [winner for votes in by_pair.values() for winner in votes.values()]
    majorities = [_majority(list(votes.values())) for votes in by_pair.values() if votes]
    sides = Counter(choice for ballot in ballots for choice in ballot.votes.values() if choice != TIE)
    decided = sides["left"] + sides["right"]
    alpha = krippendorff(list(by_pair.values()))
    return {
        "study": key["study"],
        "arms": key["arms"],
        "pairs": len(key["pairs"]),
        "votes": _share(everything),
        "by_pair": _share(majorities),
        "by_rater": {
            ballot.rater: _share(
                [
                    TIE if choice == TIE else key["pairs"][pair][choice]
                    for pair, choice in ballot.votes.items()
                ]
            )
            for ballot in ballots
        },
        "agreement": {"krippendorff_alpha": alpha, "raters": len(ballots)},
        "left_chosen": {
            "share": sides["left"] / decided if decided else None,
            "bounds": list(wilson(sides["left"], decided)) if decided else None,
            "votes": decided,
        },
        "winners": {
            pair: {"prompt": key["pairs"][pair]["prompt"], "votes": votes} for pair, votes in by_pair.items()
        },
    }


def _share(winners: Sequence[str]) -> dict[str, Any]:
    """Return wins, ties, losses, and the policy's win rate with ties as half, with its Wilson interval."""
    wins, ties, losses = (winners.count(each) for each in (POLICY, TIE, BASELINE))
    low, high = wilson(wins + ties / 2, len(winners))
    rate = (wins + ties / 2) / len(winners)
    return {"wins": wins, "ties": ties, "losses": losses, "win_rate": rate, "low": low, "high": high}


def _majority(winners: Sequence[str]) -> str:
    """Return which policy more people prefer for a pair; a tie if as many prefer either."""
    lead = winners.count(POLICY) - winners.count(BASELINE)
    return POLICY if lead > 0 else BASELINE if lead < 0 else TIE


def format_votes(results: Mapping[str, Any]) -> str:
    """Format win rates with their intervals, and what tells how far they can be trusted."""
    arms, agreement, left = results["arms"], results["agreement"], results["left_chosen"]
    rows: list[tuple[str, ...]] = [("", "wins", "ties", "losses", "win rate", "95 % interval", "")]
    rows += [_row("all votes", results["votes"]), _row("pairs, by majority", results["by_pair"])]
    rows += [
        _row(f"  {shortened(one_line(rater), _RATER)}", share) for rater, share in results["by_rater"].items()
    ]
    alpha = agreement["krippendorff_alpha"]
    if alpha is not None:
        said = f"Krippendorff's alpha is {alpha:.3f} (1: all agree, 0: as by chance), {agreement['raters']} raters."
    elif agreement["raters"] < 2:
        said = "One rater: there is no agreement between raters to report."
    else:
        said = "Krippendorff's alpha is not defined: no pair has two votes, or all votes are the same."
    if left["share"] is not None:
        low, high = (100 * bound for bound in left["bounds"])
        said += (
            f"\nThe left video was chosen in {100 * left['share']:.0f} % of the votes [{low:.0f}, {high:.0f}]"
        )
        said += "; sides are balanced, so half is expected."
    return "\n".join(
        [
            f"{one_line(arms[POLICY])} against {one_line(arms[BASELINE])}, {results['pairs']} pairs. Ties count half.",
            "Votes of several people on one pair are not independent: the interval over pairs is the careful one.",
            "",
            *aligned(rows),
            "",
            said,
        ]
    )


def _row(name: str, share: Mapping[str, Any]) -> tuple[str, ...]:
    interval = f"[{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
    counts = (str(share[each]) for each in ("wins", "ties", "losses"))
    return (name, *counts, f"{100 * share['win_rate']:.1f} %", interval, "")


def draw_votes(path: Path, results: Mapping[str, Any]) -> None:
    """Draw wins, ties and losses as bars of 100 %, as the paper's Figure 4 does."""
    from matplotlib.figure import Figure

    bars = {"all votes": results["votes"], "pairs": results["by_pair"]}
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    axes = figure.subplots()
    for place, share in enumerate(bars.values()):
        total, start = share["wins"] + share["ties"] + share["losses"], 0.0
        for name, colour in (("wins", "#4269d0"), ("ties", "#c9c9c9"), ("losses", "#e7a33e")):
            width = 100 * share[name] / total
            axes.barh(place, width, left=start, color=colour, height=0.6)
            if width > 5:
                axes.text(start + width / 2, place, f"{width:.0f} %", ha="center", va="center", fontsize=9)
            start += width
        axes.plot(
            (100 * share["low"], 100 * share["high"]), (place - 0.38,) * 2, color="black", linewidth=1.5
        )
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set_xlabel(
        "blue: the policy is preferred; grey: no difference; orange: the baseline; line: 95 %", fontsize=8
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
