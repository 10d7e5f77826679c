"""The base of the generative judges: Qwen2.5-VL is shown clips and asked a question, and answers in words.

Decoding is greedy, without sampling and without the repetition penalty of Qwen's generation_config.json: one input, one
answer. Network and 3-D positions are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLForConditionalGeneration,
)

from vpo_engine.rewards import qwen_vl
from vpo_engine.rewards.frames import check_special_tokens
from vpo_engine.rewards.loading import read_config, read_tokenizer, special_tokens
from vpo_engine.weights import weight_files

DIGITS = "12345"
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Clip:
    """A clip of uint8 frames [f, 3, h, w], sides multiples of 28. seconds: between pairs of frames; None for images."""

    frames: Tensor
    seconds: float | None


@dataclass(frozen=True)
class Answer:
    """The model's answer. ids: its n tokens. digits: logits of the tokens 1 to 5, float32 [n, 5]."""

    text: str
    ids: list[int]
    digits: Tensor


class _DigitRecorder(LogitsProcessor):
    """A processor of logits that keeps the digits' logits of every step and changes nothing."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.steps = list(ids), list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores[0, self.ids].float())
        return scores


class QwenJudge:
    """The model and its tokenizer, one question at a time. The weights take no gradient."""

    def __init__(
        self,
        network: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Tokenizer,
        *,
        name: str,
        max_new_tokens: int,
    ) -> None:
        """``name`` stands in errors. ``max_new_tokens``: an answer that does not end before is an error."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self.network = network.eval().requires_grad_(False)
        self.tokenizer, self.name, self.max_new_tokens = tokenizer, name, max_new_tokens
        self._digits = [index for digit in DIGITS if (index := tokenizer.token_to_id(digit)) is not None]
        assert len(self._digits) == len(DIGITS), self._digits
        self._end = tokenizer.token_to_id(qwen_vl.TURN_END)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        name: str,
        max_new_tokens: int,
        remedy: str,
    ) -> QwenJudge:
        """Load a local folder as transformers writes it (config.json, tokenizer.json, safetensors).

        Raise FileNotFoundError for a missing file, ValueError for files of another model; both end with ``remedy``.
        """
        folder = Path(path)
        read_config(folder, "qwen2_5_vl", remedy)
        if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
            raise FileNotFoundError(f"no model.safetensors and no index of its shards in {folder}; {remedy}")
        network = _read_network(folder, dtype, name, remedy)
        config = network.config
        qwen_vl.check_rope(config, folder / "config.json", remedy)
        expected = {qwen_vl.VIDEO: config.video_token_id, qwen_vl.IMAGE: config.image_token_id}
        marks = (qwen_vl.VISION_START, qwen_vl.VISION_END, qwen_vl.TURN_START, qwen_vl.TURN_END, *DIGITS)
        rows = config.text_config.vocab_size
        tokenizer = read_tokenizer(
            folder / "tokenizer.json", {**expected, **dict.fromkeys(marks)}, rows, remedy
        )
        return cls(network.to(device), tokenizer, name=name, max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def answer(self, clips: Sequence[Clip], question: str, prompt: str) -> Answer:
        """Show the clips, then ask; ``question`` has ``prompt`` in it. ValueError for an answer without an end."""
        check_special_tokens(prompt, special_tokens(self.tokenizer), self.name)
        inputs = self._inputs(clips, question)
        recorder = _DigitRecorder(self._digits)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self._end,
            pad_token_id=self._end,
        )
        out = self.network.generate(
            **inputs, generation_config=settings, logits_processor=LogitsProcessorList([recorder])
        )
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        if ids[-1] != self._end:
            raise ValueError(
                f"{self.name}'s answer about {prompt!r} has no end within {self.max_new_tokens} tokens: "
                f"{shown(self.tokenizer.decode(ids))}; leave the video out, or make the "
                "scorer yourself and raise max_new_tokens"
            )
        ids = ids[:-1]
        digits = torch.stack(recorder.steps)[: len(ids)].cpu()
        return Answer(self.tokenizer.decode(ids, skip_special_tokens=False), ids, digits)

    def step_of(self, answer: Answer, place: int) -> int:
        """Return which token is the single character at ``place`` of the answer; raise ValueError where none is."""
        for step in range(len(answer.ids)):
            if (
                self.tokenizer.decode(answer.ids[: step + 1], skip_special_tokens=False)
                == answer.text[: place + 1]
            ):
                return step
        raise ValueError(
            f"no token of {self.name}'s answer ends at character {place}: {shown(answer.text)}; "
            "its tokenizer must keep digits apart"
        )

    def _inputs(self, clips: Sequence[Clip], question: str) -> dict[str, Any]:
        """Return the arguments of ``generate``, on the network's device."""
        places, patches, grids = "", [], []
        images = clips[0].seconds is None
        assert all((clip.seconds is None) == images for clip in clips)
        for clip in clips:
            rows, grid = qwen_vl.patchify(clip.frames / 255)
            places += qwen_vl.slots(qwen_vl.IMAGE if images else qwen_vl.VIDEO, grid)
            patches.append(rows)
            grids.append(grid)
        ids = torch.tensor([self.tokenizer.encode(qwen_vl.chat(places + question)).ids])
        config = self.network.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": kinds,
            "pixel_values" if images else "pixel_values_videos": torch.cat(patches),
            "image_grid_thw" if images else "video_grid_thw": torch.tensor(grids),
        }
        if not images:
            inputs["second_per_grid_ts"] = torch.tensor([clip.seconds for clip in clips])
        return {key: value.to(self.network.device) for key, value in inputs.items()}


def shown(text: str, limit: int = 300) -> str:
    """Return a text as an error message quotes it, without its beginning where it is long."""
    return repr(text if len(text) <= limit else f"... {text[-limit:]}")


def _read_network(
    folder: Path, dtype: torch.dtype, name: str, remedy: str
) -> Qwen2_5_VLForConditionalGeneration:
    if (folder / _ADAPTER).is_file():
        raise ValueError(f"{folder} has an {_ADAPTER}, which would load another model beside it; {remedy}")
    try:
        weight_files(folder)  # refuses an index that leads out of the folder
        network, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # readers of damaged files can raise nearly anything
        raise ValueError(f"the weights in {folder} cannot be read ({error}); {remedy}") from error
    mismatched: Mapping[str, object] = {str(fault[0]): fault for fault in report["mismatched_keys"]}
    faults = [f"missing {key}" for key in sorted(report["missing_keys"])]
    faults += [f"unexpected {key}" for key in sorted(report["unexpected_keys"])]
    faults += [f"{key} of another shape" for key in sorted(mismatched)]
    if faults:
        raise ValueError(
            f"{folder} is not a checkpoint of {name}, {len(faults)} weights disagree: {'; '.join(faults[:4])}; {remedy}"
        )
    network.generation_config = GenerationConfig()  # else ``generate`` takes what the folder sets for chats
    return network
