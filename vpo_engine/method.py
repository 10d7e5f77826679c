"""The base class of all training methods: the policy, its optimizer, and what every step does around them.

A method is a file beside ``online_vpo.py`` with a class that derives from ``Method``; ``methods.py`` finds it by the
setting ``method``. What the rest of the engine has to know of it stands in its card, in ``config/methods.py``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from vpo_engine.config import Config
from vpo_engine.data.prompt_record import Texts
from vpo_engine.data.prompts import Prompts, PromptStream, Stream
from vpo_engine.distributed.processes import Processes
from vpo_engine.distributed.stopping import StopPoints
from vpo_engine.errors import NotFiniteError
from vpo_engine.memory.idle_offload import IdleOffload
from vpo_engine.memory.make_optimizer import Average, make_optimizer
from vpo_engine.memory.optimizer import learning_rate
from vpo_engine.metrics.stage_timer import StageTimer
from vpo_engine.metrics.throughput import Work
from vpo_engine.protocols import ReferenceStore, Reward, at_hand
from vpo_engine.values import Choice, Pair, Prompt
from vpo_engine.video_model import VideoModel


@dataclass
class Step:
    """The results of one step, for the log, the gallery and the preference dataset.

    metrics: for the log. choices: the candidates of this team's prompts, with the best and the worst of each, ties
    included. pairs: the pairs that were trained on. Methods that do not learn from pairs have neither. seconds: of each
    stage. work: see ``Work``.
    """

    metrics: dict[str, float]
    choices: Sequence[Choice] = ()
    pairs: Sequence[Pair] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    work: Work = field(default_factory=Work)


class Method(ABC):
    """A training method: the policy and its optimizer, the reward, and the reference if there is one.

    counters: the names of the attributes, numbers or texts, that a checkpoint keeps.
    """

    counters: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        config: Config,
        model: VideoModel,
        reward: Reward,
        reference: ReferenceStore | None,
        processes: Processes,
        idle_offload: IdleOffload | None = None,
        stream: Stream | None = None,
    ) -> None:
        """Build the optimizer. ``reference``: None for methods whose card has none. ``idle_offload`` knows the model's
        and the reward's tensors already (None: everything stays where it is). ``stream``: of ``open_stream``."""
        _check(config, processes)
        self.config, self.model, self.reward, self.reference = config, model, reward, reference
        self.processes, self.stream = processes, stream
        self.stopping = StopPoints(processes)
        self.idle_offload = idle_offload or IdleOffload.disabled()
        self.parameters = [p for p in model.network.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter of the policy requires a gradient; there is nothing to train")
        preserve = at_hand if reference is None else reference.preserve
        self.optimizer = make_optimizer(config, model.network, processes, preserve)
        self.average = self._build_average()
        if reference is not None:
            self.idle_offload.register("reference", reference.tensors)
        self.idle_offload.register("optimizer", self.optimizer.tensors)
        self.timer = StageTimer(processes.device, processes.stages)
        self._optimizer_step = self.idle_offload.during("optimizer", self._average_and_step)

    @classmethod
    def open_stream(cls, config: Config, prompts: Prompts) -> tuple[Stream, Texts]:
        """Return the prompts of the run's steps in their order, and the texts that the run's directory keeps a record
        of, by the setting that they come from. ``prompts``: those of prompts.train."""
        return PromptStream(prompts, config.seed), {"prompts.train": prompts}

    @classmethod
    def check(cls, config: Config, model: VideoModel) -> None:
        """Raise ValueError for settings of the method that do not fit the model's videos, before the run's directory is
        made. By default nothing is refused."""
        return

    @abstractmethod
    def step(self, prompts: Sequence[Prompt]) -> Step:
        """Make one step on this team's prompts.

        If the run is asked to stop before weights have changed, raise StepAbandonedError.
        """

    def prepare(self, folder: Path, say: Callable[[str], None]) -> None:
        """Do what comes before the first step of this process, also of a resumed run; by default, nothing.

        The prompts of the run can be embedded. folder: where the run keeps its preference dataset.
        """
        return

    # --- for checkpoints and evaluations ---------------------------------------------------------------------

    @property
    def optimizer_steps(self) -> int:
        return self.optimizer.steps

    def state(self) -> dict[str, Any]:
        """Return the method's own numbers for a checkpoint, in addition to those of ``run_state``."""
        return {name: getattr(self, name) for name in self.counters}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state`` returned, which stands among the other numbers of the checkpoint."""
        for name in self.counters:
            setattr(self, name, state[name])

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the policy's network has the weights that are evaluated; see ``EmaConfig``."""
        return nullcontext() if self.average is None else self.average.evaluated()

    # --- for steps -------------------------------------------------------------------------------------------

    def _begin_update(self) -> float:
        """Prepare an optimizer step, before its backward passes; return its learning rate."""
        rate = learning_rate(self.config.optimizer, self.optimizer_steps, self.config.optimizer_steps)
        self.optimizer.begin(rate)
        return rate

    def _end_update(self, loss: float) -> float:
        """Make the optimizer step and return the norm of the gradients. NotFiniteError if the loss is not finite."""
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss}")
        return self._optimizer_step()

    def _average_and_step(self) -> float:
        self.optimizer.average_gradients(self.processes)
        norm = self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return norm

    def _step_made(
        self,
        metrics: Mapping[str, float],
        work: Work,
        choices: Sequence[Choice] = (),
        pairs: Sequence[Pair] = (),
    ) -> Step:
        """Return the results of a step, with what every method measures."""
        seconds, peaks = self.timer.take()
        own = {} if self.average is None else {"ema/decay": self.average.decay}
        metrics = {**metrics, **own, "optimizer_steps": self.optimizer_steps, **peaks}
        return Step(metrics, choices, pairs, seconds, work)

    def _build_average(self) -> Average | None:
        settings = self.config.ema
        if settings.decay is None:
            return None
        average = self.optimizer.average(settings)
        if not settings.on_host:
            self.idle_offload.register("ema", average.tensors)
        return average


def embed_prompts(model: VideoModel, texts: Sequence[str], positions: Sequence[int]) -> list[Prompt]:
    """Return the prompts of a step: texts that the model has prepared, with their positions in the stream."""
    embedding = model.embed(texts)
    return [
        Prompt(text, embedding[row : row + 1], position)
        for row, (text, position) in enumerate(zip(texts, positions, strict=True))
    ]


def _check(config: Config, processes: Processes) -> None:
    if config.memory.step_in_backward and processes.count > 1:
        raise ValueError(
            f"memory.step_in_backward=true excludes {processes.count} processes: each would step by its own "
            "gradients, before their mean is known. Run one process, or set it to false"
        )
    if config.rollout.compile == "graphs" and processes.device.type != "cuda":
        raise ValueError(
            f"rollout.compile=graphs needs a CUDA device, but this is {processes.device.type}; set "
            "rollout.compile=none, or blocks"
        )
