"""Offline Diffusion-DPO (arXiv 2311.12908): the update of OnlineVPO, on pairs that are there before the first step.

once: read the pairs of a run or of a file                      rollout/preference_dataset.py, preferred_files.py
      or sample N videos per prompt from the policy of the start, and choose as OnlineVPO does
for each step:
    take the next pairs of winner and loser, again and again
    one Diffusion-DPO update on their latents                   objectives/dpo.py

The reference is the policy that the run starts from, and stays so, unless offline_dpo.refresh_every is set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vpo_engine.config import Config
from vpo_engine.data.preference_file import RowTexts
from vpo_engine.data.prompt_record import Texts
from vpo_engine.data.prompts import Prompts, Stream
from vpo_engine.method import embed_prompts
from vpo_engine.online_vpo import OnlineVPO
from vpo_engine.rollout.preference_dataset import PairRecorder, SampledPairs, StoredPairs
from vpo_engine.rollout.preferred_files import FilePairs
from vpo_engine.texts import counted
from vpo_engine.values import Choice, Prompt


class OfflineDPO(OnlineVPO):
    """OnlineVPO's update on pairs that no step samples."""

    stream: StoredPairs | FilePairs | SampledPairs

    @classmethod
    def open_stream(cls, config: Config, prompts: Prompts) -> tuple[Stream, Texts]:
        settings = config.offline_dpo
        assert settings is not None
        if settings.dataset is not None:
            stored = StoredPairs(settings.dataset, config.pairs.min_gap)
            return stored, {"offline_dpo.dataset": stored.texts()}
        if settings.file is not None:
            pairs = FilePairs(settings.file)
            return pairs, {"offline_dpo.file": RowTexts(pairs.rows)}
        stream, texts = super().open_stream(config, prompts)
        return SampledPairs(stream, settings.pairs or config.steps * config.pairs_per_step), texts

    def prepare(self, folder: Path, say: Callable[[str], None]) -> None:
        """Check stored pairs, encode the videos of a file, or sample what the run's directory does not have yet."""
        with self.timer("pairs"):
            if isinstance(self.stream, FilePairs):
                settings, beside = self.config.offline_dpo, folder.parent.parent
                assert settings is not None
                cache = settings.cache or beside / "encoded_videos"
                self.stream.encode(self.model, cache, self.processes, say)
            elif isinstance(self.stream, SampledPairs):
                self._sample_pairs(self.stream, folder, say)
            else:
                self.stream.check(self.model.latent_shape)
        self._say_pairs(len(self.stream), say)

    def _say_pairs(self, count: int, say: Callable[[str], None]) -> None:
        """Say how many pairs there are, and what follows where a step has room for more."""
        size = self.config.pairs_per_step
        ties = self.stream.ties
        say(f"pairs: {count}" + (f", of which {counted(ties, 'tie')} will not be trained on" if ties else ""))
        if count < size:
            say(
                f"note: that is fewer than pairs_per_step={size}, so every step trains on the same pairs, each "
                f"{size / count:.2g} times with noise of its own. The policy soon knows them by heart, and its videos "
                f"of other prompts may get worse. Give more pairs, or set pairs_per_step={count} and few steps"
            )

    def _sample_pairs(self, stream: SampledPairs, folder: Path, say: Callable[[str], None]) -> None:
        """Let the policy of the start sample, step by step as in OnlineVPO, what is not in ``folder`` yet."""
        size, asked, recorder = self.config.pairs_per_step, len(stream), None
        done = stream.find(folder, size, started=self.optimizer_steps > 0, processes=self.processes)
        if len(stream) < asked:
            say(
                f"note: {asked} pairs are asked for, but only the policy of the start may sample them, and it has been "
                f"trained; the {len(stream)} that it sampled are taken again"
            )
        if self.processes.first_of_team:
            recorder = PairRecorder(self.config.seed, folder, self.processes.rank, with_latents=True)
        if done * size < len(stream):
            say(
                f"sampling {len(stream)} pairs from the policy of the start, {done * size} of which are there"
            )
            self.model.prepare([item.text for item in stream.take(0, len(stream))])
        mine = self.processes.team_range(size, "pairs_per_step")
        for step in range(done, len(stream) // size):
            positions = range(step * size + mine.start, step * size + mine.stop)
            texts = [item.text for item in stream.take(positions.start, len(positions))]
            prompts = embed_prompts(self.model, texts, positions)
            with self.stopping.stoppable(together=self.processes.team.count > 1), self.optimizer.whole():
                choices = super()._choose(prompts)
            self.watched.forget()
            pairs = self.selector.pairs(choices)
            if recorder is not None:
                recorder.record(step + 1, choices, pairs)
        if recorder is not None:
            recorder.sync()  # a policy that a checkpoint has trained cannot sample them again
        self.processes.wait()
        stream.read(folder, self.config.pairs.min_gap)

    def _choose(self, prompts: Sequence[Prompt]) -> list[Choice]:
        return self.stream.choices(prompts, self.model.latent_shape, self.processes.device)

    def _check_learning(self, metrics: Mapping[str, float], choices: Sequence[Choice]) -> None:
        """Do nothing: the run has said how many pairs are ties, and was refused if all of them are."""

    @property
    def _videos(self) -> int:
        return 0
