"""Repeat Figure 7 of OnlineVPO (arXiv 2412.15159): peak memory of OnlineVPO and ReFL by resolution and frames.

    python bench/figure7.py            # writes docs/memory.md and docs/memory.png

Without a GPU the peaks are planned (vpo_engine.planning). With a GPU they are measured on random weights of full size,
by torch.cuda.max_memory_allocated. The peak is that of an update and an optimizer step with policy, reference,
optimizer and VAE. Text encoder, reward model, CUDA context and fragmentation are left out for both methods.

ReFL (arXiv 2304.05977) means here: one prediction of the policy with its graph, the clean latents that follow from it,
all frames decoded inside the graph, and a gradient from the pixels to the policy. The activations of a reward model
would be added, so the curve is a lower bound.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.memory.idle_offload import IdleOffload
from vpo_engine.memory.offload import OffloadedInputs
from vpo_engine.memory.optimizer import PolicyOptimizer
from vpo_engine.memory.rounding import hold_in_bfloat16
from vpo_engine.models.opensora.model import OpenSora
from vpo_engine.objectives.dpo import DPO
from vpo_engine.planning.extrapolate import DEEPER, SHALLOW
from vpo_engine.planning.gpu_rules import as_on_gpu
from vpo_engine.planning.gpus import GIB
from vpo_engine.planning.parts import Assumed, blueprint_of, configured_depth, materialise_model
from vpo_engine.planning.repeats import repeated_steps
from vpo_engine.planning.trace import HostCopies, without_collections
from vpo_engine.planning.tracker import Tracker
from vpo_engine.protocols import TextEmbedding
from vpo_engine.reference.store import HeldReference, build_reference
from vpo_engine.values import Candidate, Pair, Prompt

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
RESOLUTIONS, FRAMES = ("240p", "360p", "480p", "720p"), (17, 34, 51, 68)
A100_GIB = 79.2
PLAIN = (
    "memory.weights=fp32_master",
    "memory.activation_checkpointing=block",
    "memory.sequential=false",
    "memory.mlp_chunks=1",
    "memory.offload_idle=false",
    "reference.storage=copy",
)
"""Probable settings of the paper: bfloat16 with fp32 master weights, checkpointed blocks, winner and loser in one
batch."""

LEANEST = (
    "memory.weights=stochastic_rounding",
    "memory.optimizer_bits=8",
    "memory.offload_activations=true",
    "memory.mlp_chunks=8",
)
"""The settings with the least memory that can still accumulate the gradients of several pairs."""

METHODS: dict[str, tuple[str, ...]] = {
    "OnlineVPO, leanest": LEANEST,
    "OnlineVPO, recommended": (),
    "OnlineVPO, plain": PLAIN,
    "ReFL, VAE checkpointed": PLAIN,
    "ReFL": PLAIN,
}


PLANNED = """All points
are planned, not measured: for 2 and for 4 pairs of blocks, and extrapolated linearly to 28."""

PAGE = """# Memory of an update

Full fine-tuning of STDiT3-XL/2, one pair at a time, as in Figure 7 of OnlineVPO (arXiv 2412.15159): GiB at the peak
of an update or of the optimizer's step, bold beyond what an A100 of 80 GB has ({limit} GiB). {how}
`python bench/figure7.py` writes this page.

- Policy, gradients, optimizer, reference and VAE count. Text encoder, reward model, CUDA's context and fragmentation
  do not; `python -m vpo_engine.plan` adds them.
- *OnlineVPO, leanest* is the recommended configuration with `memory.weights=stochastic_rounding memory.optimizer_bits=8
  memory.offload_activations=true memory.mlp_chunks=8`.
- *OnlineVPO, recommended* is `configs/opensora_v1_2_720p.yaml`. *Plain* has bfloat16 weights with fp32 master weights,
  checkpointed blocks, a copied reference, winner and loser in one batch, and everything resident.
- *ReFL* has plain's settings without a reference: one prediction with its graph, the clean latents that it implies,
  all frames decoded in the graph, a gradient from the pixels. What a reward model keeps for that gradient comes on
  top. *VAE checkpointed* computes the decoder again, a micro-batch of 4 frames at a time.
- The recommended configuration lies flat: at nearly all sizes its peak is the optimizer's step, where fp32
  master weights and moments (13.4 GiB), weights and gradients are together. So it is with the leanest up to 480p x 34.

![Peak memory against frames](memory.png)

{table}

## How many frames fit in 80 GB

`python -m vpo_engine.plan opensora_v1_2_720p.yaml --gpu a100-80g`, with *plain*'s settings for the second row;
here text encoder, VideoScore, CUDA's context and fragmentation count too. Whole chunks of 17 frames at 24 a second;
planned, not measured.

| | 240p | 360p | 480p | 720p |
|---|---|---|---|---|
| recommended | 3281 | 1445 | 833 | 357 |
| plain | 833 | 357 | 204 | 85 |
"""


@contextmanager
def _nothing(_: Sequence[nn.Parameter]) -> Iterator[None]:
    yield


def config_of(method: str, resolution: str, frames: int) -> Config:
    size = (f"model.resolution={resolution}", f"model.num_frames={frames}")
    return load_config("opensora_v1_2_720p.yaml", [*METHODS[method], *size])


def model_of(config: Config, depth: int | None = None) -> OpenSora:
    """Build policy and VAE without weights."""
    model = blueprint_of(config, Assumed(), depth).model
    assert isinstance(model, OpenSora)
    return model


class Update:
    """Policy, reference, optimizer and VAE of one update; ``tracker`` records what is allocated."""

    def __init__(self, method: str, config: Config, model: OpenSora, tracker: Tracker) -> None:
        self._method, self._config, self._model = method, config, model
        network = model.network
        hold_in_bfloat16(network, config.memory.weights, model.dtype)
        self._trained = [p for p in network.parameters() if p.requires_grad]
        self._reference: HeldReference | None = None
        if not method.startswith("ReFL"):
            with tracker.making("reference"):
                self._reference = build_reference(config.reference.storage, network)
        preserve = _nothing if self._reference is None else self._reference.preserve
        self._optimizer = PolicyOptimizer(
            self._trained, config.optimizer, config.memory, seed=0, preserve_reference=preserve
        )
        self._optimizer.begin(0.0)
        torch.stack([parameter.sum() for parameter in self._trained]).sum().backward()
        self._optimizer.step()
        tracker.label([*network.parameters(), *network.buffers()], "weights")
        tracker.label(self._optimizer.state_dict().values(), "optimizer")
        if method == "ReFL, VAE checkpointed":
            for decoder in model.decoders:
                decoder.forward = functools.partial(checkpoint, decoder.forward, use_reentrant=False)

    def stay_by(self, idle_offload: IdleOffload) -> None:
        if self._reference is not None:
            idle_offload.register("reference", self._reference.tensors)
        idle_offload.register("optimizer", self._optimizer.tensors)

    def gradients(self) -> None:
        """Compute the gradients of a step's second pair, which are added to those of the first."""
        latents = torch.zeros(1, *self._model.latent_shape)
        text = TextEmbedding(
            torch.zeros(1, 300, 4096, dtype=torch.bfloat16), torch.ones(1, 300, dtype=torch.bool)
        )
        self._optimizer.begin(0.0)
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)
        if self._reference is None:
            self._refl(latents, text)
            return
        objective = DPO(self._model, self._config.objective, 1.0, 0, self._config.memory.sequential)
        prompt = Prompt("", text, 0)
        pair = Pair(*(Candidate(prompt, number, latents[0], {}) for number in range(2)))
        objective.backward([pair], self._reference, total=8)

    def _refl(self, latents: Tensor, text: TextEmbedding) -> None:
        t = torch.full((1,), 500.0)
        velocity = self._model.predict(self._model.network, latents, t, text)
        clean = latents + velocity * (t / 1000)
        self._model.vae.decode(clean, self._model.num_frames).float().mean().backward()

    def step(self) -> None:
        self._optimizer.step()


def planned(method: str, config: Config) -> list[float]:
    """Return the peak bytes of the gradients and of the optimizer's step, extrapolated from two depths."""
    low, high = (_planned(method, config, depth) for depth in (SHALLOW, DEEPER))
    scale = (configured_depth(config) - SHALLOW) / (DEEPER - SHALLOW)
    return [a + (b - a) * scale for a, b in zip(low, high, strict=True)]


def _planned(method: str, config: Config, depth: int) -> list[int]:
    tracker = Tracker(scratch=True)
    model = model_of(config, depth)
    elsewhere = config.memory.offload_idle
    peaks = []
    with (
        without_collections(),
        FakeTensorMode(allow_non_fake_inputs=True),
        as_on_gpu(True),
        tracker,
        repeated_steps(tracker),
    ):
        materialise_model(model, tracker)
        model.network.offloaded = OffloadedInputs(lambda tensor: HostCopies(tensor.device, tracker))
        update = Update(method, config, model, tracker)
        for run, sent_away in ((update.gradients, {"vae", "optimizer"}), (update.step, {"vae"})):
            with tracker.making("activations"), tracker.phase() as phase:
                run()
            absent = frozenset({"host"} | (sent_away if elsewhere else set()))
            peaks.append(sum(tracker.peak(phase, absent).values()))
    return peaks


def measured(method: str, config: Config) -> int:
    """Measure the peak bytes on this machine's GPU, where the engine offloads idle parts itself."""
    device, tracker = torch.device("cuda"), Tracker()
    model = model_of(config)
    with torch.device(device):
        materialise_model(model, tracker, device)
        for tensor in (*model.network.parameters(), *model.vae.parameters()):
            torch.nn.init.normal_(tensor, std=0.02)
        model.network.choose_backends(dtype=model.dtype)
        idle_offload = IdleOffload.from_config(config, device)
        model.stay_by(idle_offload)
        with idle_offload.phase("refresh"):
            update = Update(method, config, model, tracker)
            update.stay_by(idle_offload)
        torch.cuda.reset_peak_memory_stats()
        with idle_offload.phase("update"):
            update.gradients()
        with idle_offload.phase("optimizer"):
            update.step()
    return torch.cuda.max_memory_allocated()


Peaks = dict[str, dict[str, list[float]]]
"""GiB by method and resolution, one number for every entry of FRAMES."""


def measured_peaks() -> Peaks:
    """Measure all peaks; a peak is nan if the GPU runs out of memory."""

    def gib(method: str, resolution: str, frames: int) -> float:
        try:
            return measured(method, config_of(method, resolution, frames)) / GIB
        except torch.cuda.OutOfMemoryError:
            return float("nan")

    return {
        method: {name: [gib(method, name, count) for count in FRAMES] for name in RESOLUTIONS}
        for method in METHODS
    }


def planned_peaks() -> Peaks:
    found: Peaks = {}
    for method in METHODS:
        for name in RESOLUTIONS:
            for count in FRAMES:
                gradients, step = planned(method, config_of(method, name, count))
                print(f"{method}, {name} x {count}: {gradients / GIB:.2f}, {step / GIB:.2f} GiB", flush=True)
                found.setdefault(method, {}).setdefault(name, []).append(max(gradients, step) / GIB)
    return found


def markdown(found: dict[str, dict[str, list[float]]]) -> str:
    lines = ["| | resolution | " + " | ".join(f"{count} frames" for count in FRAMES) + " |"]
    lines.append("|---" * (2 + len(FRAMES)) + "|")
    for method, rows in found.items():
        for resolution, row in rows.items():
            cells = (f"**{value:.1f}**" if value > A100_GIB else f"{value:.1f}" for value in row)
            lines.append(f"| {method} | {resolution} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(RESOLUTIONS), figsize=(13, 4), sharey=True, layout="constrained")
    styles = (":o", "-o", "--o", "--s", "-s")
    for axis, resolution in zip(axes, RESOLUTIONS, strict=True):
        for (method, rows), style in zip(found.items(), styles, strict=True):
            colour = "tab:blue" if method.startswith("OnlineVPO") else "tab:red"
            axis.plot(FRAMES, rows[resolution], style, color=colour, label=method, markersize=4)
        axis.axhline(A100_GIB, color="black", linewidth=1, linestyle=":")
        axis.set(title=resolution, xlabel="frames", xticks=FRAMES, yscale="log")
        axis.set_yticks(
            [5, 10, 20, 40, 80, 160, 320, 640], ["5", "10", "20", "40", "80", "160", "320", "640"]
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("peak of an update, GiB")
    axes[0].annotate("A100 80 GB", (FRAMES[0], A100_GIB), (0, 3), textcoords="offset points", fontsize=8)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(found), fontsize=9
    )
    figure.savefig(path, dpi=120)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    if torch.cuda.is_available():
        found, how = measured_peaks(), f"Measured on {torch.cuda.get_device_name()}."
    else:
        found, how = planned_peaks(), PLANNED
    picture(found, ROOT / "docs" / "memory.png")
    page = PAGE.format(how=how, limit=A100_GIB, table=markdown(found))
    (ROOT / "docs" / "memory.md").write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
