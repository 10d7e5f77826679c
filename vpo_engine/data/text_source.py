"""The text embeddings of a run: they are encoded before training, then read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.distributed.processes import Processes
from vpo_engine.protocols import TextEmbedding
from vpo_engine.video_model import Encoder

_BATCH = 16


class TextSource:
    """Provides the embeddings of a run's prompts. The text encoder is in memory only while it encodes them.

    ``rewrite`` turns a prompt into the text that is encoded (cleaning, score suffixes). With a cache on disk the
    processes divide the work, on CPUs one process of each machine; with a cache in memory each process encodes all
    prompts.
    """

    def __init__(
        self,
        cache: EmbeddingCache,
        load_encoder: Callable[[], Encoder],
        processes: Processes,
        rewrite: Callable[[str], str] = str,
    ) -> None:
        self._cache, self._load_encoder = cache, load_encoder
        self._processes, self._rewrite = processes, rewrite

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are missing in the cache; the encoder is loaded only if there are any."""
        texts = sorted({self._rewrite(prompt) for prompt in prompts})
        if self._cache.folder is not None:
            texts = texts[self._processes.encoder_share()]
        missing = [text for text in texts if text not in self._cache]
        if missing:
            self._cache.fill(missing, self._load_encoder().encode, _BATCH)
        self._processes.wait()

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        """Return the embeddings of prepared prompts, on the CPU; ValueError for other prompts."""
        return self._cache.get([self._rewrite(prompt) for prompt in prompts])
