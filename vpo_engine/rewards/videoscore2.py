"""VideoScore2: a judge that reasons in words, then grades a video in three dimensions from 1 to 5.

TIGER-AI-Lab/VideoScore2 (arXiv 2509.22799, vs2_inference.py), a Qwen2.5-VL-7B. Slow, hundreds of tokens a video, and
without gradients: for ranking and evaluation, not for training. The authors sample at temperature 0.7; decoding here is
greedy. Their pattern misses the numbered list that the model writes; both forms are read here.

Weights: TIGER-Lab/VideoScore2. B videos of F frames, H x W.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vpo_engine.rewards import qwen_vl
from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import check_prompt, check_prompts, check_videos
from vpo_engine.rewards.loading import special_tokens
from vpo_engine.rewards.qwen_judge import Answer, Clip, QwenJudge, shown
from vpo_engine.rewards.refusals import refusal
from vpo_engine.rewards.videos import Videos, frame_rate

DIMENSIONS = ("visual_quality", "text_alignment", "physical_consistency")
QUESTION = (
    "\n"
    "    You are an expert for evaluating AI-generated videos from three dimensions:\n"
    "    (1) visual quality \N{EN DASH} clarity, smoothness, artifacts;\n"
    "    (2) text-to-video alignment \N{EN DASH} fidelity to the prompt;\n"
    "    (3) physical/common-sense consistency \N{EN DASH} naturalness and physics plausibility.\n"
    "\n"
    "    Video prompt: $t2v_prompt\n"
    "\n"
    "    Please output in this format:\n"
    "    visual quality: <v_score>; \n"
    "    text-to-video alignment: <t_score>, \n"
    "    physical/common-sense consistency: <p_score>\n"
    "    "
)
"""The authors' question, byte for byte (vs2_inference.py); $t2v_prompt stands for the prompt."""

LABELS = ("visual quality", "text-to-video alignment", "physical/common-sense consistency")
NAME, REMEDY = "VideoScore2", "VideoScore2 needs a whole local copy of TIGER-Lab/VideoScore2"
FPS, MAX_PIXELS = 2.0, 768 * qwen_vl.CELL**2

CARD = RewardCard(
    name="videoscore2",
    dimensions=dict.fromkeys(DIMENSIONS, (0.2, 5.0)),
    frames="2 a second, an even number, at least 4. Slow: writes up to 1024 tokens a video",
    resolution="multiples of 28 with 100352..602112 pixels, aspect ratio kept",
    reads_prompt=True,
    differentiable=False,
    parameters=8_292_166_656,
    licence="Apache-2.0",
    source="TIGER-Lab/VideoScore2",
    for_training=False,
)

_GRADE = r"([1-5])(?![./]*\d)"  # neither 4.5 nor 4/5 nor 40
_LIST = re.compile(
    ".*?".join(rf"\({index}\)\s*{re.escape(label)}\D*?{_GRADE}" for index, label in enumerate(LABELS, 1)),
    re.DOTALL | re.IGNORECASE,
)
_LINES = re.compile(
    ".*?".join(rf"{re.escape(label)}:\s*{_GRADE}" for label in LABELS), re.DOTALL | re.IGNORECASE
)


def parse(text: str) -> tuple[list[int], list[int]]:
    """Find the three grades of an answer, and where in the text their digits stand.

    Read is what follows the thoughts: the numbered list, or else the lines that the question asks for. Raise
    ValueError for any other text, and for grades outside 1..5.
    """
    thoughts, mark, _ = text.rpartition("</think>")
    start = len(thoughts) + len(mark)
    found = _LIST.search(text, start) or _LINES.search(text, start)
    if found is None:
        raise ValueError(
            f"{NAME}'s answer holds no grades from 1 to 5 in three dimensions: {shown(text)}; the video gets no score"
        )
    return [int(grade) for grade in found.groups()], [found.start(group) for group in (1, 2, 3)]


def soft_score(digits: Tensor) -> float:
    """Return the published score of logits [5] of the digits 1 to 5: the likeliest digit times its share of the five.

    At temperature 1, rounded to 4 decimals. Not an expectation, and not monotone: a 5 at 60 % is below a 4 at 90 %.
    """
    shares = digits.double().softmax(0)
    best = int(shares.argmax())
    return round((best + 1) * shares[best].item(), 4)


class VideoScore2:
    """VideoScore2 as a ``Reward``: soft scores of greedy answers."""

    dimensions = DIMENSIONS

    def __init__(self, judge: QwenJudge, *, fps: float = 24.0) -> None:
        """``fps`` is that of videos in tensors, 24 is Open-Sora's; files have their own."""
        if not 0 < fps < float("inf"):
            raise ValueError(f"fps is {fps}, expected a finite number above 0")
        self.judge, self.network, self.fps = judge, judge.network, fps

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        fps: float = 24.0,
        max_new_tokens: int = 1024,
    ) -> VideoScore2:
        """Load a local folder in the published layout; nothing is downloaded. Errors are those of ``QwenJudge``."""
        judge = QwenJudge.from_pretrained(
            path, dtype=dtype, device=device, name=NAME, max_new_tokens=max_new_tokens, remedy=REMEDY
        )
        return cls(judge, fps=fps)

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size, in frames and pixels, get no score, if there is a reason."""
        too_short = refusal(qwen_vl.frame_indices, frames, self.fps, FPS)
        return too_short or refusal(qwen_vl.smart_resize, height, width, qwen_vl.VIDEO_MIN_PIXELS, MAX_PIXELS)

    def refuse_prompt(self, prompt: str) -> str | None:
        """Return why there is no score for this prompt: it has no text, or a special token of the tokenizer in it."""
        return refusal(check_prompt, prompt, special_tokens(self.judge.tokenizer), NAME)

    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 videos [B, F, H, W, 3], F at least 2, and B prompts; return {dimension: float32 [B]}, on the CPU.

        One answer after the other. Raise ValueError for a wrong shape or type, for a prompt without text or with a
        special token in it, for an answer without an end and for one that does not parse.
        """
        check_videos(videos, prompts)
        check_prompts(prompts, NAME)
        rows = []
        fps = frame_rate(videos, self.fps)
        indices = qwen_vl.frame_indices(videos.shape[1], fps, FPS)
        for row, prompt in enumerate(prompts):
            answer = self._ask(videos[row : row + 1, indices][0], prompt)
            _, places = parse(answer.text)
            rows.append([soft_score(answer.digits[self.judge.step_of(answer, place)]) for place in places])
        return dict(zip(DIMENSIONS, torch.tensor(rows).unbind(1), strict=True))

    def ask(self, video: Tensor, prompt: str) -> Answer:
        """Return the whole answer about a uint8 video [F, H, W, 3], with its reasoning."""
        return self._ask(video[qwen_vl.frame_indices(len(video), self.fps, FPS)], prompt)

    def _ask(self, frames: Tensor, prompt: str) -> Answer:
        """Return the answer about the frames that are shown, uint8 [f, H, W, 3]."""
        size = qwen_vl.smart_resize(frames.shape[1], frames.shape[2], qwen_vl.VIDEO_MIN_PIXELS, MAX_PIXELS)
        clip = Clip(qwen_vl.resize_levels(frames.cpu(), size), qwen_vl.TEMPORAL / FPS)
        return self.judge.answer([clip], QUESTION.replace("$t2v_prompt", prompt), prompt)
