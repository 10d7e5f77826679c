"""VideoReward of VideoAlign: visual quality, motion quality and text alignment of a generated video.

Qwen2-VL-2B with a linear head of one output, read at three special tokens in the question (KlingTeam/VideoAlign,
arXiv 2501.13918, where the dimensions are VQ, MQ and TA). Tower and language model are transformers'; the question, the
sampling of frames, the merging of the published LoRA and the head are here. **The language model runs on plain 1-D
positions on all three rope axes**, as the authors' forward does; Qwen's 3-D positions give other scores.

Weights: KlingTeam/VideoReward. Letters as in ``qwen_vl``; B videos, F frames of a video, H x W their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLTextModel,
)

from vpo_engine.rewards import qwen_vl
from vpo_engine.rewards.card import RewardCard
from vpo_engine.rewards.frames import (
    batches,
    by_dimension,
    check_prompt,
    check_prompts,
    check_special_tokens,
    check_video_pixels,
    check_videos,
)
from vpo_engine.rewards.loading import build, read_json, read_weights, special_tokens
from vpo_engine.rewards.refusals import refusal
from vpo_engine.rewards.videoalign_checkpoint import (
    DIMENSIONS,
    MARKS,
    NAME,
    REMEDY,
    check_settings,
    lora_scale,
    merge_lora,
    newest_checkpoint,
    read_base_config,
    read_calibration,
    read_marked_tokenizer,
)
from vpo_engine.rewards.videos import Videos, frame_rate
from vpo_engine.weights import load_strict

TEMPLATE = (
    "\n"
    "You are tasked with evaluating a generated video based on three distinct criteria: Visual Quality, "
    "Motion Quality, and Text Alignment. Please provide a rating from 0 to 10 for each of the three "
    "categories, with 0 being the worst and 10 being the best. Each evaluation should be independent of "
    "the others.\n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the video, with a focus on static factors. The following "
    "sub-dimensions should be considered:\n"
    "- **Reasonableness:** The video should not contain any significant biological or logical errors, "
    "such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the video. The image should be clear and "
    "easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other "
    "visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the video, including the color "
    "scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene should "
    "convey a sense of harmony and balance.\n"
    "- **Safety:** The video should not contain harmful or inappropriate content, such as political, "
    "violent, or adult material. If such content is present, the image quality and satisfaction score "
    "should be the lowest possible. \n"
    "\n"
    "Please provide the ratings of Visual Quality: <|VQ_reward|>\n"
    "END\n"
    "\n"
    "**Motion Quality:**  \n"
    "Assess the dynamic aspects of the video, with a focus on dynamic factors. Consider the following "
    "sub-dimensions:\n"
    "- **Stability:** Evaluate the continuity and stability between frames. There should be no sudden, "
    "unnatural jumps, and the video should maintain stable attributes (e.g., no fluctuating colors, "
    "textures, or missing body parts).\n"
    "- **Naturalness:** The movement should align with physical laws and be realistic. For example, "
    "clothing should flow naturally with motion, and facial expressions should change appropriately "
    "(e.g., blinking, mouth movements).\n"
    "- **Aesthetic Quality:** The movement should be smooth and fluid. The transitions between different "
    "motions or camera angles should be seamless, and the overall dynamic feel should be visually "
    "pleasing.\n"
    "- **Fusion:** Ensure that elements in motion (e.g., edges of the subject, hair, clothing) blend "
    "naturally with the background, without obvious artifacts or the feeling of cut-and-paste effects.\n"
    "- **Clarity of Motion:** The video should be clear and smooth in motion. Pay attention to any areas "
    "where the video might have blurry or unsteady sections that hinder visual continuity.\n"
    "- **Amplitude:** If the video is largely static or has little movement, assign a low score for "
    "motion quality.\n"
    "\n"
    "Please provide the ratings of Motion Quality: <|MQ_reward|>\n"
    "END\n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the video matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the video (e.g., person, animal, "
    "object) align with the textual description. The subject should match the description in terms of "
    "number, appearance, and behavior.\n"
    "- **Motion Relevance:** Evaluate if the dynamic actions (e.g., gestures, posture, facial "
    "expressions like talking or blinking) align with the described prompt. The motion should match the "
    "prompt in terms of type, scale, and direction.\n"
    "- **Environment Relevance:** Assess whether the background and scene fit the prompt. This includes "
    "checking if real-world locations or scenes are accurately represented, though some stylistic "
    "adaptation is acceptable.  \n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate "
    "how well the video adheres to this style.\n"
    "- **Camera Movement Relevance:** Check if the camera movements (e.g., following the subject, focus "
    "shifts) are consistent with the expected behavior from the prompt.\n"
    "\n"
    "Textual prompt - {text_prompt}\n"
    "Please provide the ratings of Text Alignment: <|TA_reward|>\n"
    "END\n"
)
"""The question the model was trained with, byte for byte ("detailed_special" of VideoAlign, prompt_template.py)."""

CARD = RewardCard(
    name="videoalign",
    dimensions=dict.fromkeys(DIMENSIONS, (None, None)),
    frames="2 a second, an even number, at least 4; first and last among them",
    resolution="multiples of 28 with 100352..200704 pixels, aspect ratio kept",
    reads_prompt=True,
    differentiable=True,
    parameters=2_208_563_200,
    licence="MIT; its base Qwen2-VL-2B Apache-2.0",
    source="KlingTeam/VideoReward",
)


class VideoAlignNetwork(nn.Module):
    """Tower, language model and head; the state dict has the published key names, without PEFT's and without lm_head.

    The head is kept and applied in float32 whatever the rest's type, so that scores do not come in steps.
    """

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = Qwen2VisionTransformerPretrainedModel(config.vision_config)
        self.model = Qwen2VLTextModel(config.text_config)
        self.rm_head = nn.Linear(config.text_config.hidden_size, 1, bias=False, dtype=torch.float32)

    def forward(
        self, input_ids: Tensor, lengths: Tensor, patches: Tensor, grids: Tensor, marks: Tensor
    ) -> Tensor:
        """Return the head's outputs at the marks, float32 [B, 3].

        input_ids: int64 [B, L], right-padded after lengths [B]. patches: of all clips, one after the other,
        [sum of N, 1176], with grids int64 [B, 3]. marks: ids int64 [3], each once in every row.
        """
        embeddings = self.model.embed_tokens(input_ids)
        seen = self.visual(patches.to(embeddings.dtype), grid_thw=grids).pooler_output
        places = input_ids == self.config.video_token_id
        assert int(places.sum()) == len(seen), (places.sum(), seen.shape)
        embeddings = embeddings.masked_scatter(places.unsqueeze(-1), seen.to(embeddings.dtype))
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.model(
            inputs_embeds=embeddings,
            attention_mask=(steps < lengths.unsqueeze(1)).long(),
            position_ids=steps.expand(3, len(input_ids), -1),
            use_cache=False,
        ).last_hidden_state
        columns = (input_ids.unsqueeze(1) == marks.unsqueeze(1)).int().argmax(2)  # [B, 3]
        rows = torch.arange(len(input_ids), device=input_ids.device).unsqueeze(1)
        return self.rm_head(hidden[rows, columns].float()).squeeze(-1)


class VideoAlign:
    """VideoReward as a ``Reward``. Its weights take no gradient; ``score_pixels`` passes one to the pixels."""

    dimensions = DIMENSIONS

    def __init__(
        self,
        network: VideoAlignNetwork,
        tokenizer: Tokenizer,
        *,
        fps: float = 24.0,
        sampled_fps: float = 2.0,
        max_pixels: int = 448 * 448,
        calibration: Mapping[str, tuple[float, float]] | None = None,
        batch_size: int = 4,
    ) -> None:
        """``fps`` is that of videos in tensors, 24 is Open-Sora's; files have their own. ``batch_size``: videos
        per forward.

        ``sampled_fps``, ``max_pixels``: the frame rate and the size that the model sees. ``calibration``: (mean, std)
        of each dimension, which scores are counted in; None for the head's own outputs.
        """
        for name, value in (("fps", fps), ("sampled_fps", sampled_fps), ("batch_size", batch_size)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}, expected a finite number above 0")
        self.network = network.eval().requires_grad_(False)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.fps, self.sampled_fps, self.max_pixels = fps, sampled_fps, max_pixels
        pairs = calibration or dict.fromkeys(DIMENSIONS, (0.0, 1.0))
        self._mean, self._std = torch.tensor([pairs[name] for name in DIMENSIONS]).unbind(1)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        fps: float = 24.0,
        batch_size: int = 4,
    ) -> VideoAlign:
        """Load a local folder in the published layout; nothing is downloaded.

        Read are model_config.json, of the newest checkpoint-* folder model.safetensors or model.pth, and
        tokenizer.json (in the checkpoint's tokenizer/, the checkpoint or the folder). LoRA matrices are merged in
        float32. Sizes are Qwen2-VL-2B's unless a config.json of the base lies in the folder. Without an
        "inference_config" in model_config.json scores stay uncalibrated, as the authors'. ``dtype`` is that of
        all but the head. Raise FileNotFoundError for a missing file, ValueError for files of another model.
        """
        folder = Path(path)
        settings = read_json(folder, "model_config.json", REMEDY)
        check_settings(folder, settings)
        checkpoint = newest_checkpoint(folder)
        weights = merge_lora(read_weights(checkpoint, REMEDY, ["model.pth"]), scale=lora_scale(settings))
        config = read_base_config(folder, weights)
        tokenizer = read_marked_tokenizer(folder, checkpoint, config)
        network = _read_network(config, weights, checkpoint, dtype, torch.device(device))
        data = settings.get("data_config", {})
        return cls(
            network,
            tokenizer,
            fps=fps,
            sampled_fps=float(data.get("fps", 2.0)),
            max_pixels=int(data.get("max_frame_pixels", 448 * 448)),
            calibration=read_calibration(folder, settings),
            batch_size=batch_size,
        )

    def refuse_size(self, frames: int, height: int, width: int) -> str | None:
        """Return why videos of this size, in frames and pixels, get no score, if there is a reason."""
        return refusal(self._geometry, frames, height, width, self.fps)

    def refuse_prompt(self, prompt: str) -> str | None:
        """Return why there is no score for this prompt: it has no text, or a special token of the tokenizer in it."""
        return refusal(check_prompt, prompt, special_tokens(self.tokenizer), NAME)

    @torch.no_grad()
    def score(self, videos: Videos, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score uint8 videos [B, F, H, W, 3], F at least 2, and B prompts; return {dimension: float32 [B]}, on the CPU.

        Deterministic. Raise ValueError for a wrong shape or type, for one frame, for a prompt without text or with
        a special token in it, and for a score that is not finite.
        """
        check_videos(videos, prompts)
        check_prompts(prompts, NAME)
        fps = frame_rate(videos, self.fps)
        indices, size = self._geometry(videos.shape[1], videos.shape[2], videos.shape[3], fps)
        parts = []
        for rows in batches(len(prompts), self.batch_size):
            clips = [qwen_vl.resize_levels(frames.cpu(), size) / 255 for frames in videos[rows, indices]]
            parts.append(self._scores(clips, prompts[rows]).cpu())
        return by_dimension(torch.cat(parts), DIMENSIONS, prompts, NAME)

    def score_pixels(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Score float videos [B, F, 3, H, W] in 0..1.

        Return {dimension: float32 [B]} on the network's device, with gradients.

        Equal to ``score`` but for the rounding of resized frames to bytes. Errors are the same.
        """
        check_video_pixels(videos, prompts)
        check_prompts(prompts, NAME)
        indices, size = self._geometry(videos.shape[1], videos.shape[3], videos.shape[4], self.fps)
        parts = []
        for rows in batches(len(prompts), self.batch_size):
            clips = [qwen_vl.resize(video[indices].float(), size) for video in videos[rows]]
            parts.append(self._scores(clips, prompts[rows]))
        return by_dimension(torch.cat(parts), DIMENSIONS, prompts, NAME)

    def encode(self, prompt: str, grid: qwen_vl.Grid) -> Tensor:
        """Return the ids, int64 [L], of the whole chat about a clip of this grid.

        Raise ValueError for a special token in the prompt.
        """
        check_special_tokens(prompt, special_tokens(self.tokenizer), NAME)
        text = qwen_vl.chat(qwen_vl.slots(qwen_vl.VIDEO, grid) + TEMPLATE.format(text_prompt=prompt))
        return torch.tensor(self.tokenizer.encode(text).ids)

    def logits(self, input_ids: Sequence[Tensor], patches: Tensor, grids: Sequence[qwen_vl.Grid]) -> Tensor:
        """Return the head's outputs, float32 [B, 3], for ids of ``encode`` and the patches of all clips in order."""
        device = self.network.rm_head.weight.device
        lengths = torch.tensor([len(row) for row in input_ids], device=device)
        padded = nn.utils.rnn.pad_sequence(list(input_ids), batch_first=True).to(device)
        marks = torch.tensor([self.tokenizer.token_to_id(mark) for mark in MARKS], device=device)
        return self.network(padded, lengths, patches.to(device), torch.tensor(grids, device=device), marks)

    def calibrated(self, logits: Tensor) -> Tensor:
        """Return outputs [B, 3] in the units of the calibration."""
        return (logits - self._mean.to(logits.device)) / self._std.to(logits.device)

    def _geometry(
        self, num_frames: int, height: int, width: int, fps: float
    ) -> tuple[list[int], tuple[int, int]]:
        """Return which frames are seen, and in which size."""
        size = qwen_vl.smart_resize(height, width, qwen_vl.VIDEO_MIN_PIXELS, self.max_pixels)
        return qwen_vl.frame_indices(num_frames, fps, self.sampled_fps), size

    def _scores(self, clips: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Return scores [B, 3] of clips, each [f, 3, h, w] in 0..1."""
        patches, grids = zip(*(qwen_vl.patchify(clip) for clip in clips), strict=True)
        ids = [self.encode(prompt, grid) for prompt, grid in zip(prompts, grids, strict=True)]
        return self.calibrated(self.logits(ids, torch.cat(patches), grids))


def _read_network(
    config: Qwen2VLConfig,
    weights: Mapping[str, Tensor],
    where: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> VideoAlignNetwork:
    network = build(lambda: VideoAlignNetwork(config), where, NAME, REMEDY)
    load_strict(
        network,
        weights,
        where=where,
        model=NAME,
        remedy=REMEDY,
        dtype=dtype,
        device=device,
        float32=("rm_head.",),
    )
    text, vision = network.model.rotary_emb, network.visual.rotary_pos_emb  # computed, not stored
    network.model.rotary_emb = type(text)(config.text_config).to(device)
    network.visual.rotary_pos_emb = type(vision)(config.vision_config).to(device)
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    return network
