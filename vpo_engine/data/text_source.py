"""Where text embeddings come from while training: a cache that was filled before the encoder was let go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vpo_engine.data.embeddings import EmbeddingCache
from vpo_engine.distributed.processes import Processes
from vpo_engine.protocols import TextEmbedding
from vpo_engine.video_model import Encoder

_BATCH = 16


class TextSource:
    """Embeddings of the prompts of a run: encoded once by a text encoder that is resident only meanwhile.

    ``rewrite`` makes of a prompt the text that is encoded (cleaning, score suffixes). With a cache on disk the
    processes share the work; a cache in memory is filled by each.
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
        """Encode what is missing. The encoder is loaded only if something is, and dropped afterwards."""
        texts = sorted({self._rewrite(prompt) for prompt in prompts})
        if self._cache.folder is not None:
            texts = texts[self._processes.rank :: self._processes.count]
        missing = [text for text in texts if text not in self._cache]
        if missing:
            self._cache.fill(missing, self._load_encoder().encode, _BATCH)
        self._processes.wait()

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embeddings of prepared prompts, on the CPU; ValueError for others."""
        return self._cache.get([self._rewrite(prompt) for prompt in prompts])
