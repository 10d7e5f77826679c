"""UnifiedReward: judges that grade a video in words, or say which of two is better.

CodeGoat24/UnifiedReward (arXiv 2503.05236), Qwen2.5-VL fine-tuned. Version 1 sees a video and gives VideoScore's five
dimensions from 1 to 4 and a final score to 10; version 2 sees 16 single frames and gives three from 1 to 5. Slow and
without gradients: for ranking and evaluation, not for training. Questions and frames are those of the authors'
inference_qwen/ scripts, decoding is greedy; they leave the reading of answers to the user. Their JPEG compression of
version 2's frames is left out.

Weights: CodeGoat24/UnifiedReward-qwen-7b (1), CodeGoat24/UnifiedReward-2.0-qwen-3b, -7b, -32b, -72b (2). The Qwen3-VL
models are of another architecture. B videos of F frames, H x W.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from vpo_engine.rewards import qwen_vl
from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import check_moving, check_prompt, check_prompts, check_videos
from vpo_engine.rewards.loading import special_tokens
from vpo_engine.rewards.qwen_judge import Clip, QwenJudge, shown
from vpo_engine.rewards.refusals import refusal
from vpo_engine.rewards.videos import Videos, frame_rate

Version = Literal[1, 2]
NAME = "UnifiedReward"
REMEDY = (
    "UnifiedReward needs a whole local copy of CodeGoat24/UnifiedReward-qwen-7b (version 1) or of a "
    "CodeGoat24/UnifiedReward-2.0-qwen model (version 2)"
)
FPS, MAX_PIXELS = 2.0, 768 * qwen_vl.CELL**2
NUM_IMAGES, IMAGE_MIN_PIXELS, IMAGE_MAX_PIXELS = 16, 4 * qwen_vl.CELL**2, 16384 * qwen_vl.CELL**2

QUESTION_1 = (
    "Suppose you are an expert in judging and evaluating the quality of AI-generated videos, please "
    "watch the frames of "
    "a given video and see the text prompt for generating the video.\n"
    "Then give scores from 5 different dimensions:\n"
    "(1) visual quality: the quality of the video in terms of clearness, resolution, brightness, and color\n"
    "(2) temporal consistency, the consistency of objects or humans in video\n"
    "(3) dynamic degree, the degree of dynamic changes\n"
    "(4) text-to-video alignment, the alignment between the text prompt and the video content\n"
    "(5) factual consistency, the consistency of the video content with the common-sense and factual "
    "knowledge\n"
    "\n"
    "For each dimension, output a number from [1,2,3,4], \n"
    "in which '1' means 'Bad', '2' means 'Average', '3' means 'Good', \n"
    "'4' means 'Real' or 'Perfect' (the video is like a real video)\n"
    "Finally, based on above 5 dimensions, assign a score from 1 to 10 after 'Final Score:'\n"
    "Here is an output example:\n"
    "visual quality: 4\n"
    "temporal consistency: 4\n"
    "dynamic degree: 3\n"
    "text-to-video alignment: 1\n"
    "factual consistency: 2\n"
    "Final Score: 6\n"
    "\n"
    "**Note: In the example above, scores are placeholders meant only to demonstrate the format. Your "
    "actual evaluation "
    "should be based on the quality of the given video.**\n"
    "Your task is provided as follows: Text Prompt: [$prompt]"
)
QUESTION_2 = (
    "You are presented with a generated video and its associated text caption. Your task is to analyze "
    "the video across "
    "multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the video along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the video matches the caption in terms of content.\n"
    "- Physics Score: How well the gravity, movements, collisions, and interactions make physical sense.\n"
    "- Style Score: How visually appealing the video looks, regardless of caption accuracy.\n"
    "\n"
    "Output your evaluation using the format below:\n"
    "\n"
    "Alignment Score (1-5): X\n"
    "Physics Score (1-5): Y\n"
    "Style Score (1-5): Z\n"
    "\n"
    "Your task is provided as follows:\n"
    "Text Caption: [$prompt]"
)
QUESTION_PAIR = (
    "Imagine you are an expert tasked with evaluating AI-generated videos. You are provided with a text "
    "caption and two "
    "videos generated based on that caption. Your job is to assess and compare these videos based on the "
    "following two "
    "main factors:\n"
    "\n"
    "1. Caption Alignment: Evaluate how closely each video matches the description provided in the "
    "caption. Pay "
    "attention to the accuracy of objects depicted, their relationships, and any attributes described in "
    "the caption.\n"
    "\n"
    "2. Overall Video Quality: Look at the overall visual appeal of each video, considering clarity, the "
    "level of "
    "detail, color accuracy, and how aesthetically pleasing the video is.\n"
    "\n"
    "Using these factors, compare the two videos and determine which one better reflects the caption and "
    "exhibits better "
    "visual quality.\n"
    "\n"
    "Give your final judgment, such as 'Video 1 is better,' 'Video 2 is better,' or 'Both videos are "
    "equally good.'\n"
    "\n"
    "Your task is as follows:\n"
    "Text Caption: [$prompt]\n"
)
"""The authors' questions, byte for byte (inference_qwen/); $prompt stands for the prompt."""


@dataclass(frozen=True)
class Form:
    """The question and answer of a version. labels: {label in the answer, in any case: (dimension, lowest,
    highest)}."""

    question: str
    labels: dict[str, tuple[str, float, float]]

    @property
    def dimensions(self) -> tuple[str, ...]:
        return tuple(name for name, _, _ in self.labels.values())


FORMS: dict[Version, Form] = {
    1: Form(
        QUESTION_1,
        {
            "visual quality": ("visual_quality", 1, 4),
            "temporal consistency": ("temporal_consistency", 1, 4),
            "dynamic degree": ("dynamic_degree", 1, 4),
            "text-to-video alignment": ("text_alignment", 1, 4),
            "factual consistency": ("factual_consistency", 1, 4),
            "Final Score": ("final_score", 1, 10),
        },
    ),
    2: Form(
        QUESTION_2,
        {
            "Alignment Score (1-5)": ("text_alignment", 1, 5),
            "Physics Score (1-5)": ("physical_consistency", 1, 5),
            "Style Score (1-5)": ("style", 1, 5),
        },
    ),
}

_SLOW = "Slow: writes its answer in words"


def _card(version: Version, frames: str, resolution: str, source: str) -> RewardCard:
    return RewardCard(
        name=f"unified_reward_{version}",
        dimensions={name: (low, high) for name, low, high in FORMS[version].labels.values()},
        frames=f"{frames}. {_SLOW}",
        resolution=resolution,
        reads_prompt=True,
        differentiable=False,
        parameters=8_292_166_656,
        licence="MIT (code)",
        source=source,
        for_training=False,
    )


CARD_1 = _card(
    1,
    "2 a second, an even number, at least 4",
    "multiples of 28 with 100352..602112 pixels, aspect ratio kept",
    "CodeGoat24/UnifiedReward-qwen-7b",
)
CARD = _card(
    2,
    "16 at equal steps from the first",
    "the nearest multiples of 28",
    "CodeGoat24/UnifiedReward-2.0-qwen-7b",
)

_LINE = re.compile(r"^[ \t]*([A-Za-z][^:\n]*?)[ \t]*:[ \t]*(\d+(?:\.\d+)?)[ \t]*$", re.MULTILINE)
_VERDICTS = {
    1: re.compile(r"\bvideo 1 is better\b", re.IGNORECASE),
    2: re.compile(r"\bvideo 2 is better\b", re.IGNORECASE),
    0: re.compile(r"\bboth videos are equally good\b", re.IGNORECASE),
}


def parse_answer(text: str) -> dict[str, float]:
    """Return {label of either version: number} from the lines "label: number" of an answer; the last one counts."""
    known = {label.lower(): label for form in FORMS.values() for label in form.labels}
    lines = _LINE.findall(text)
    return {known[label.lower()]: float(number) for label, number in lines if label.lower() in known}


def parse_scores(text: str, version: Version) -> dict[str, float]:
    """Return {dimension: score} of an answer. Raise ValueError unless it has all of the version's, each in range."""
    answer, scores = parse_answer(text), {}
    for label, (name, low, high) in FORMS[version].labels.items():
        if label in answer:
            if not low <= answer[label] <= high:
                raise ValueError(
                    f"{NAME}'s answer has {label} {answer[label]:g}, expected {low:g} to {high:g}: {shown(text)}; "
                    "the video gets no score"
                )
            scores[name] = answer[label]
    missing = [name for name in FORMS[version].dimensions if name not in scores]
    if missing:
        raise ValueError(
            f"{NAME}'s answer holds no {', '.join(missing)}: {shown(text)}; the video gets no score. Is version "
            f"{version} the model's?"
        )
    return scores


def parse_preference(text: str) -> int:
    """Return 1 or 2 for the better video, 0 for equally good; raise ValueError if the text says none or several of
    these."""
    found = [verdict for verdict, pattern in _VERDICTS.items() if pattern.search(text)]
    if len(found) != 1:
        raise ValueError(
            f"{NAME}'s answer holds {len(found) or 'no'} verdicts, expected one: {shown(text)}; the pair gets none"
        )
    return found[0]


def image_indices(num_frames: int) -> list[int]:
    """Return which frames version 2 sees: int(i F / 16), each once."""
    return list(dict.fromkeys(index * num_frames // NUM_IMAGES for index in range(NUM_IMAGES)))


class UnifiedReward:
    """UnifiedReward as a ``Reward``, with ``compare`` for pairs."""

    def __init__(self, judge: QwenJudge, *, version: Version = 2, fps: float = 24.0) -> None:
        """``version`` is the model's, ``fps`` that of videos in tensors, 24 is Open-Sora's; files have
        their own."""
        if version not in get_args(Version):
            raise ValueError(f"version is {version!r}, expected 1 or 2")
        if not 0 < fps < float("inf"):
            raise ValueError(f"fps is {fps}, expected a finite number above 0")
        self.judge, self.network, self.version, self.fps = judge, judge.network, version, fps

    @property
    def dimensions(self) -> tuple[str, ...]:
        return FORMS[self.version].dimensions

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        version: Version = 2,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        fps: float = 24.0,
        max_new_tokens: int = 1024,
    ) -> UnifiedReward:
        """Load a local folder in the published layout; nothing is downloaded. Errors are those of ``QwenJudge``."""
        judge = QwenJudge.from_pretrained(
            path, dtype=dtype, device=device, name=NAME, max_new_tokens=max_new_tokens, remedy=REMEDY
        )
        return cls(judge, version=version, fps=fps)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size, in frames and pixels, get no score, if there is a reason."""
        least, most = (
            (IMAGE_MIN_PIXELS, IMAGE_MAX_PIXELS)
            if self.version == 2
            else (qwen_vl.VIDEO_MIN_PIXELS, MAX_PIXELS)
        )
        too_short = refusal(check_moving, frames, NAME)
        return too_short or refusal(qwen_vl.smart_resize, height, width, least, most)

    def refuse_prompt(self, prompt: str) -> str | None:
        """Return why there is no score for this prompt: it has no text, or a special token of the tokenizer in it."""
        return refusal(check_prompt, prompt, special_tokens(self.judge.tokenizer), NAME)

    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 videos [B, F, H, W, 3], F >= 2, and B prompts; return {dimension: float32 [B]}, on the CPU.

        One answer after the other. Raise ValueError for a wrong shape or type, for a prompt without text or with a
        special token in it, for an answer without an end and for one that does not parse.
        """
        check_videos(videos, prompts)
        check_moving(videos.shape[1], NAME)
        check_prompts(prompts, NAME)
        rows = []
        for row, prompt in enumerate(prompts):
            clips = self._images(videos, row) if self.version == 2 else [self._clip(videos, row)]
            question = FORMS[self.version].question.replace("$prompt", prompt)
            rows.append(parse_scores(self.judge.answer(clips, question, prompt).text, self.version))
        return {name: torch.tensor([row[name] for row in rows]) for name in self.dimensions}

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> list[int]:
        """Say which of two videos is better, pair by pair: 1, 2, or 0 for equally good. Both uint8 [B, F, H, W, 3].

        As version 1 asks it; the order of the two can matter to the model. Raise ValueError as ``score`` does.
        """
        check_videos(first, prompts)
        check_videos(second, prompts)
        check_prompts(prompts, NAME)
        verdicts = []
        for row, prompt in enumerate(prompts):
            clips = [self._clip(first, row), self._clip(second, row)]
            answer = self.judge.answer(clips, QUESTION_PAIR.replace("$prompt", prompt), prompt)
            verdicts.append(parse_preference(answer.text))
        return verdicts

    def _clip(self, videos: Videos, row: int) -> Clip:
        """Return one of the videos [B, F, H, W, 3] at about 2 frames a second."""
        count, height, width = videos.shape[1:4]
        size = qwen_vl.smart_resize(height, width, qwen_vl.VIDEO_MIN_PIXELS, MAX_PIXELS)
        fps = frame_rate(videos, self.fps)
        indices = qwen_vl.frame_indices(count, fps, FPS)
        frames = videos[row : row + 1, indices][0].cpu()
        return Clip(qwen_vl.resize_levels(frames, size), qwen_vl.TEMPORAL / (len(indices) / count * fps))

    def _images(self, videos: Videos, row: int) -> list[Clip]:
        """Return single frames of one of the videos [B, F, H, W, 3]."""
        count, height, width = videos.shape[1:4]
        size = qwen_vl.smart_resize(height, width, IMAGE_MIN_PIXELS, IMAGE_MAX_PIXELS)
        frames = videos[row : row + 1, image_indices(count)][0].cpu()
        return [Clip(frame, None) for frame in qwen_vl.resize_levels(frames, size).split(1)]
