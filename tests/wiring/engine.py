"""The only place where the wiring tests touch names inside the engine.

``train`` runs ``vpo_engine.train`` with the toy as model.kind and a toy reward. ``Recording`` keeps what the model was
asked for and what reached the loss. When the engine's inside changes, this file changes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor
from toy import SHAPE, ToyModel, ToyReward, toy_change, toy_motion

from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.data.preference_dataset import StoredPair, read_dataset
from vpo_engine.distributed.processes import Processes
from vpo_engine.metrics.held_out import HeldOut, HeldOutScorers
from vpo_engine.metrics.throughput import CountedRows
from vpo_engine.protocols import SamplerSettings, SamplerState, TextEmbedding
from vpo_engine.runs.gallery import HeldOutGallery, PairGallery, read_held_out, read_pairs
from vpo_engine.seeding import normal

LOSSES = ("vpo_engine.objectives.dpo.paired_dpo_loss", "vpo_kernels.paired_dpo.sequential.paired_dpo_loss")
"""Where the paired loss is called from: jointly, and for one member after the other."""

PROMPTS = (
    "red",
    "green square",
    "a tie",
    "blue circle moves left",
    "coarse one",
    "coarse second thing",
    "a long prompt of eight words about cats",
    "coarse tie breaker three",
    "yellow triangle",
    "coarse number four goes here",
    "white dog",
)
HELD_OUT = ("held out cat", "held out yellow dog")
SETTINGS = (
    "model.kind=engine:RecordingModel",
    "reward.kind=toy:ToyReward",
    "prompts.train=train.txt",
    "prompts.held_out=held_out.txt",
    "steps=4",
    "pairs_per_step=4",
    "rollout.candidates=3",
    "rollout.steps=4",
    "rollout.guidance=1.0",
    "reward.dimensions={visual_quality: 3.0, temporal_consistency: 0.2, text_alignment: 1.0}",
    "pairs.dataset=latents",
    "objective.beta=20",
    "objective.timesteps_per_pair=1",
    "reference.refresh_every=3",
    "optimizer.lr=3e-3",
    "optimizer.warmup_steps=2",
    "optimizer.final_lr=0.3",
    "evaluation.every=null",
    "evaluation.samples_per_prompt=2",
    "checkpoint.every=1",
    "checkpoint.keep=50",
    "model.device=cpu",
)
OFFLINE = (
    "method=offline_dpo",
    "prompts.train=null",
    "rollout.candidates=4",
    "pairs.dataset=none",
    "reference.refresh_every=200",
)
"""What makes SETTINGS those of stored pairs: the method, and the defaults of all that it does not use."""


@dataclass
class Row:
    """One timestep of one pair as it reached the loss and the networks; what is not part of the loss is None."""

    winner: Tensor
    loser: Tensor
    noise: Tensor
    time: float
    caption: Tensor
    weight: float


@dataclass
class Recording:
    """A record of what one process of a run asked of the model, the reward and the loss, in order."""

    rows: list[Row] = field(default_factory=list)
    sampled: list[tuple[str, SamplerSettings, slice, Tensor]] = field(default_factory=list)
    """Who sampled ("policy", "reference", "copy"), how, which steps, from which latents [B, ...]."""
    scored: list[tuple[Tensor, str]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    """Calls of predict outside of sampling since the last loss."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """All of them."""


class RecordingModel(ToyModel):
    """The toy model, which notes what it is asked for: model.kind=engine:RecordingModel."""

    recording: ClassVar[Recording] = Recording()

    def predict(
        self, network: Any, latents: Tensor, t: Tensor, text: TextEmbedding, guidance: float = 1.0
    ) -> Tensor:
        call = {
            "who": self._name(network),
            "inputs": latents.detach().clone(),
            "times": t.detach().clone(),
            "text": text,
            "guidance": guidance,
        }
        self.recording.predictions.append(call)
        self.recording.asked.append(call)
        return super().predict(network, latents, t, text, guidance)

    def denoise(
        self,
        network: Any,
        state: SamplerState,
        text: TextEmbedding,
        settings: SamplerSettings,
        stop: int | None = None,
    ) -> SamplerState:
        latents = state.latents.detach().clone()
        self.recording.sampled.append((self._name(network), settings, slice(state.step, stop), latents))
        return super().denoise(network, state, text, settings, stop)

    def _name(self, network: Any) -> str:
        inner = network._network if isinstance(network, CountedRows) else network
        if inner is self.network:
            return "policy"
        return "reference" if hasattr(inner, "refresh") and hasattr(inner, "load_state_dict") else "copy"


def _recorded_loss(recording: Recording, loss: Callable[..., Any], sequential: bool) -> Callable[..., Any]:
    """``loss``, which notes its arguments beside those of the predictions that it compares."""

    def call(*tensors: Tensor, **options: Any) -> Any:
        calls, recording.predictions = recording.predictions, []
        if not (sequential and len(calls) == 1):  # the winner's second pass is the same pair again
            _note(recording, tensors, options, calls)
        return loss(*tensors, **options)

    return call


def _note(
    recording: Recording, tensors: tuple[Tensor, ...], options: dict[str, Any], calls: list[dict[str, Any]]
) -> None:
    clean = tensors[4:6] or (options["target_winner"], options["target_loser"])
    noise = options["target_noise"]
    count = len(noise)
    assert {call["who"] for call in calls} == {"policy", "reference"}
    members: dict[str, list[tuple[Tensor, float, Tensor]]] = {"policy": [], "reference": []}
    for call in calls:
        masks = call["text"].mask
        for number, (x, t) in enumerate(zip(call["inputs"], call["times"].tolist(), strict=True)):
            words = call["text"].embeddings[number, masks[number]]
            members[call["who"]].append((x, t, words))
    if len(calls) == 4 and calls[0]["who"] == "reference":  # one member at a time: winner, loser of each
        assert [call["who"] for call in calls] == ["reference", "reference", "policy", "policy"]
    for number in range(count):
        for member, latents in enumerate(clean):
            seen = [members[who][member * count + number] for who in ("policy", "reference")]
            (x, t, words), (other_x, other_t, other_words) = seen
            assert torch.equal(x, other_x), "policy and reference see other inputs"
            assert t == other_t, "policy and reference see other times"
            assert torch.equal(words, other_words), "policy and reference see other texts"
            share = t / 1000
            expected = (1 - share) * latents[number] + share * noise[number]
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
        winner_side, loser_side = (members["policy"][number], members["policy"][count + number])
        assert winner_side[1] == loser_side[1], "winner and loser have other times"
        assert torch.equal(winner_side[2], loser_side[2]), "winner and loser have other texts"
        weight = options.get("pair_weight")
        recording.rows.append(
            Row(
                clean[0][number].detach().clone(),
                clean[1][number].detach().clone(),
                noise[number].detach().clone(),
                winner_side[1],
                winner_side[2].mean(0),
                1.0 if weight is None else float(weight[number]),
            )
        )


class Silent:
    """Takes every call, and says nothing; to make a mock for each takes longer than the step that writes to it."""

    def __getattr__(self, name: str) -> Silent:
        return self

    def __call__(self, *_: object, **__: object) -> Silent:
        return self


@contextmanager
def _toy_parts(recording: Recording, reward: ToyReward) -> Iterator[None]:
    def build_held_out(
        config: Config, model: Any, prompts: Any, scorer: Any, processes: Processes
    ) -> HeldOut:
        instruments = HeldOutScorers(
            scorer, lambda videos, _: {"levels": videos.float().mean(dim=(1, 2, 3, 4))}
        )
        return HeldOut(config, model, prompts, instruments, processes)

    places = {
        "vpo_engine.training.build_reward": lambda *_, **__: reward,
        "vpo_engine.training.build_held_out": build_held_out,
        "vpo_engine.trainer.matrix_rate": lambda *_: 1.0,
        "vpo_engine.trainer.write_report": lambda run: run.root,
        "vpo_engine.rewards.guards.motion": toy_motion,
        "vpo_engine.metrics.candidate_statistics.motion": toy_change,  # its optical flow takes a tenth of a run
        "vpo_engine.distributed.processes._BUCKET_ELEMENTS": 600,  # several buckets of gradients
        "vpo_engine.runs.log.RunLog._tensorboard": lambda _: Silent(),
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(RecordingModel, "recording", recording))
        for place, replacement in places.items():
            stack.enter_context(mock.patch(place, replacement))
        for place in LOSSES:
            module, name = place.rsplit(".", 1)
            original = getattr(__import__(module, fromlist=[name]), name)
            wrapped = _recorded_loss(recording, original, "sequential" in place)
            stack.enter_context(mock.patch(place, wrapped))
        yield


def write_whole(path: Path, prompts: Sequence[str]) -> None:
    """Write a prompt file so that another process of the test, which writes the same, never reads half of it."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    own.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    own.replace(path)


def make_config(folder: Path, *overrides: str) -> Config:
    """A run of the toy in ``folder``/run."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.txt", folder / "held_out.txt"
    write_whole(train, PROMPTS)
    write_whole(held_out, HELD_OUT)
    own = (f"prompts.train={train}", f"prompts.held_out={held_out}", f"run_dir={folder / 'run'}")
    return load_config(None, [*SETTINGS, *own, *overrides])


def train(config: Config, reward: ToyReward | None = None, exit_code: int = 0) -> Recording:
    """Run ``vpo_engine.train`` to its end; ValueError and what the reward raises pass."""
    recording, reward = Recording(), reward or ToyReward()
    with _toy_parts(recording, reward):
        assert entry.train(config) == exit_code
    recording.scored = reward.seen
    return recording


def lines_of(run: Path) -> list[StoredPair]:
    """Every line of a run's preference dataset, in the order of steps and positions."""
    return list(read_dataset(run))


def metrics_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The rows of the log without what a clock wrote."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds/", "speed/", "memory/")
    return [
        {name: value for name, value in row.items() if not name.startswith(clocks)}
        for row in rows
        if row["kind"] == kind
    ]


def work_of(run: Path) -> list[tuple[int, int, int]]:
    """The inputs that went through the network in rollout and update of each step, and its videos, by the speeds that
    the log has.

    An input of the toy costs one operation, with a backward pass too, and its device makes one a second.
    """
    found = []
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if row["kind"] == "train":
            inputs = [
                row.get(f"speed/{stage}_mfu", 0) * row[f"seconds/{stage}"] for stage in ("rollout", "update")
            ]
            between = sum(row.get(f"seconds/{stage}", 0) for stage in ("evaluate", "checkpoint"))
            videos = row["speed/samples_per_second"] * (row["seconds/step"] - between)
            found.append((round(inputs[0]), round(inputs[1]), round(videos)))
    return found


def summary_of(run: Path) -> dict[str, dict[str, float]]:
    """{measure: before, after, difference, ...} of a finished run."""
    return json.loads((run / "summary.json").read_text())["measures"]


def galleries_of(run: Path) -> dict[int, PairGallery]:
    """The pairs of some steps that the report shows, by step."""
    return {int(path.stem.split("_")[-1]): read_pairs(path) for path in (run / "gallery/pairs").iterdir()}


def held_out_gallery(run: Path) -> HeldOutGallery:
    """Held-out clips before and after."""
    return read_held_out(run / "gallery/held_out.safetensors")


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def policy_of(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(checkpoint(run, step) / "policy" / "model.safetensors")


def reference_of(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(checkpoint(run, step) / "reference.safetensors")


def state_of(run: Path, step: int) -> dict[str, Any]:
    return json.loads((checkpoint(run, step) / "state.json").read_text())


def saved_tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, by file and name."""
    found = {}
    folder = checkpoint(run, step)
    for file in sorted(folder.rglob("*.safetensors")):
        place = file.relative_to(folder).as_posix()
        found |= {f"{place}/{name}": value for name, value in load_file(file).items()}
    return found


def forget_after(run: Path, step: int) -> None:
    """Leave a run as if it had been killed some time after the checkpoint of ``step``."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)


@torch.no_grad()
def sampled_alone(
    run: Path,
    step: int,
    prompt: str,
    position: int,
    number: int,
    candidates: int,
    steps: int,
    guidance: float,
) -> Tensor:
    """Candidate ``number`` of a prompt, sampled by the policy after ``step`` (0: the one that runs start from)."""
    model = build_model(load_config(None, list(SETTINGS)), Processes.start("cpu"))
    if step:
        model.network.load_state_dict(policy_of(run, step))
    model.prepare([prompt])
    block, place = divmod(number, candidates)
    noise = normal((candidates, *SHAPE), 0, "rollout", position, *([block] if block else []))[place]
    return model.sample(model.network, noise[None], model.embed([prompt]), steps=steps, guidance=guidance)[0]
