"""Peak memory of an update of OnlineVPO and of its optimizer step: planned, and measured on a GPU with random weights.

``gpu_measure.py memory`` compares both at the sizes of the paper's Figure 7. Policy, reference, optimizer and VAE
count; text encoder, reward model, CUDA's context and fragmentation do not. ``python -m vpo_engine.reproduce figure7``
plans whole steps of all methods.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

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
from vpo_engine.planning.parts import Assumed, blueprint_of, configured_depth, materialise_model
from vpo_engine.planning.repeats import repeated_steps
from vpo_engine.planning.stand_ins import HostCopies, without_collections
from vpo_engine.planning.tracker import Tracker
from vpo_engine.protocols import TextEmbedding
from vpo_engine.reference.store import build_reference
from vpo_engine.reproducing.memory import METHODS as LINES
from vpo_engine.values import Candidate, Pair, Prompt

METHODS = {label: settings for label, settings in LINES.items() if label.startswith("OnlineVPO")}
"""The lines of Figure 7 whose update is measured here."""


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

    def __init__(self, config: Config, model: OpenSora, tracker: Tracker) -> None:
        self._config, self._model = config, model
        network = model.network
        hold_in_bfloat16(network, config.memory.weights, model.dtype)
        self._trained = [p for p in network.parameters() if p.requires_grad]
        with tracker.making("reference"):
            self._reference = build_reference(config.reference.storage, network)
        self._optimizer = PolicyOptimizer(
            self._trained,
            config.optimizer,
            config.memory,
            seed=0,
            preserve_reference=self._reference.preserve,
        )
        self._optimizer.begin(0.0)
        torch.stack([parameter.sum() for parameter in self._trained]).sum().backward()
        self._optimizer.step()
        tracker.label([*network.parameters(), *network.buffers()], "weights")
        tracker.label(self._optimizer.state_dict().values(), "optimizer")

    def stay_by(self, idle_offload: IdleOffload) -> None:
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
        objective = DPO(self._model, self._config.objective, 1.0, 0, self._config.memory.sequential)
        prompt = Prompt("", text, 0)
        pair = Pair(*(Candidate(prompt, number, latents[0], {}) for number in range(2)))
        objective.backward([pair], self._reference, total=8)

    def step(self) -> None:
        self._optimizer.step()


def planned(config: Config) -> list[float]:
    """Return the peak bytes of the gradients and of the optimizer's step, extrapolated from two depths."""
    low, high = (_planned(config, depth) for depth in (SHALLOW, DEEPER))
    scale = (configured_depth(config) - SHALLOW) / (DEEPER - SHALLOW)
    return [a + (b - a) * scale for a, b in zip(low, high, strict=True)]


def _planned(config: Config, depth: int) -> list[int]:
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
        update = Update(config, model, tracker)
        for run, sent_away in ((update.gradients, {"vae", "optimizer"}), (update.step, {"vae"})):
            with tracker.making("activations"), tracker.phase() as phase:
                run()
            absent = frozenset({"host"} | (sent_away if elsewhere else set()))
            peaks.append(sum(tracker.peak(phase, absent).values()))
    return peaks


def measured(config: Config) -> int:
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
            update = Update(config, model, tracker)
            update.stay_by(idle_offload)
        torch.cuda.reset_peak_memory_stats()
        with idle_offload.phase("update"):
            update.gradients()
        with idle_offload.phase("optimizer"):
            update.step()
    return torch.cuda.max_memory_allocated()
