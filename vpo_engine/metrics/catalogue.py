"""The metrics that come with the engine: their cards, and where their classes are. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vpo_engine.metrics.metric_card import MetricCard

PROXY = "proxy_"
"""What the names of stand-ins begin with."""
AMT_INSTALL = "pip install --no-deps vbench==0.1.5"
MUSIQ_INSTALL = (
    "pip install --no-deps pyiqa==0.1.16 && pip install torchvision opencv-python-headless scipy requests"
)
_RAFT = "princeton-vl/RAFT (models.zip)"
_CLIP = "openai/CLIP, or openai/clip-vit-base-patch32 and openai/clip-vit-large-patch14"
_NO_DEVIL_SCORE = (
    "DEVIL's dynamics score needs seven parts, of which this is {part}; the others need DINOv2, ViCLIP, DINO-S and an "
    "x264 build, its regressions are in a file that is not published with the code, and naturalness was judged by a "
    "paid model"
)


@dataclass(frozen=True)
class Entry:
    """The place of a metric: a module of vpo_engine.metrics and a class in it, made by its ``make``."""

    module: str
    maker: str
    card: MetricCard


def _vbench(name: str, maker: str, title: str, measures: str, **facts: Any) -> Entry:
    card = MetricCard(
        name=name,
        group="vbench",
        dimension=name.removesuffix("_filtered"),
        title=title,
        measures=measures,
        **{"unit": "share", "least_frames": 2, **facts},
    )
    return Entry("vbench.dimensions", maker, card)


def _proxy(name: str, maker: str, title: str, measures: str, **facts: Any) -> Entry:
    card = MetricCard(
        name=PROXY + name,
        group="proxy",
        title=f"{title} (stand-in)",
        measures=measures,
        **{"unit": "share", "least_frames": 2, **facts},
    )
    return Entry("proxies", maker, card)


def _fvd(name: str, network: str, file: str, source: str, licence: str) -> Entry:
    card = MetricCard(
        name=f"fvd_{name}",
        group="fvd",
        title=f"FVD ({network})",
        measures=f"The Frechet distance of {network} features to those of reference videos, first 16 frames.",
        better=-1,
        needs=(file,),
        source=source,
        licence=licence,
        least_frames=16,
    )
    return Entry("fvd", "Fvd", card)


_DIMENSIONS = (
    _vbench(
        "subject_consistency",
        "SubjectConsistency",
        "Subject consistency",
        "How alike DINO finds each frame to the one before and to the first.",
        needs=("dino_vitbase16_pretrain.pth",),
        source="facebookresearch/dino",
        licence="Apache-2.0",
    ),
    _vbench(
        "background_consistency",
        "BackgroundConsistency",
        "Background consistency",
        "How alike CLIP ViT-B/32 finds each frame to the one before and to the first.",
        needs=("ViT-B-32.pt",),
        source=_CLIP,
        licence="MIT",
    ),
    _vbench(
        "temporal_flickering",
        "TemporalFlickering",
        "Temporal flickering, unfiltered",
        "How little neighbouring frames differ, 1 is no change; motion lowers it too.",
    ),
    _vbench(
        "temporal_flickering_filtered",
        "FilteredFlickering",
        "Temporal flickering",
        "How little neighbouring frames differ, of the videos that VBench's filter finds still.",
        needs=("raft-things.pth",),
        source=_RAFT,
        licence="BSD-3-Clause",
        least_side=121,
    ),
    _vbench(
        "motion_smoothness",
        "MotionSmoothness",
        "Motion smoothness",
        "How near each odd frame is to what AMT-S makes of its neighbours.",
        needs=("amt-s.pth",),
        source="lalala125/AMT",
        licence="CC BY-NC 4.0: not for commercial use",
        package="vbench",
        install=AMT_INSTALL,
        least_frames=3,
        least_side=113,
    ),
    _vbench(
        "dynamic_degree",
        "DynamicDegree",
        "Dynamic degree",
        "The share of videos in which RAFT finds much motion.",
        needs=("raft-things.pth",),
        source=_RAFT,
        licence="BSD-3-Clause",
        better=0,
        least_side=121,
    ),
    _vbench(
        "aesthetic_quality",
        "AestheticQuality",
        "Aesthetic quality",
        "A tenth of the rating that LAION's linear head gives to CLIP ViT-L/14's view of the frames.",
        needs=("ViT-L-14.pt", "sa_0_4_vit_l_14_linear.pth"),
        source=f"{_CLIP}; LAION-AI/aesthetic-predictor",
        licence="MIT",
        least_frames=1,
    ),
    _vbench(
        "imaging_quality",
        "ImagingQuality",
        "Imaging quality",
        "A hundredth of MUSIQ's score of the frames, trained on SPAQ.",
        needs=("musiq_spaq_ckpt-358bb6af.pth",),
        source="chaofengc/IQA-PyTorch",
        licence="PolyForm Noncommercial: not for commercial use",
        package="pyiqa",
        install=MUSIQ_INSTALL,
        least_frames=1,
    ),
)
_DISTANCES = (
    _fvd(
        "videomae",
        "VideoMAE",
        "vit_g_hybrid_pt_1200e_ssv2_ft.pth",
        "OpenGVLab/VideoMAEv2",
        "code MIT; for the weights see their page",
    ),
    _fvd("i3d", "I3D", "i3d_pretrained_400.pt", "songweige/TATS", "I3D Apache-2.0; for TATS see its page"),
)
_DYNAMICS = (
    Entry(
        "devil",
        "FrameChanges",
        MetricCard(
            name="devil_frame_changes",
            group="devil",
            title="Frame changes (part of DEVIL)",
            measures="SSIM of neighbouring frames, and the bits of perceptual hashes in which they differ.",
            better=0,
            least_frames=2,
            missing=_NO_DEVIL_SCORE.format(part="two"),
        ),
    ),
    Entry(
        "devil",
        "FlowStrength",
        MetricCard(
            name="devil_flow",
            group="devil",
            title="Flow strength (part of DEVIL)",
            measures="The mean motion that RAFT finds between frames of 512 pixels, levels given as 0..1.",
            unit="px",
            better=0,
            needs=("raft-things.pth",),
            source=_RAFT,
            licence="BSD-3-Clause",
            least_frames=2,
            missing=_NO_DEVIL_SCORE.format(part="one"),
        ),
    ),
)
_PROXIES = (
    _proxy(
        "flicker",
        "FlickerProxy",
        "Steadiness",
        "How little neighbouring frames differ, 1 is no change; motion lowers it too.",
    ),
    _proxy(
        "motion_smoothness_blend",
        "SmoothnessProxy",
        "Motion smoothness",
        "How near each odd frame is to the mean of its neighbours, 1 is equal.",
        least_frames=3,
    ),
    _proxy(
        "feature_consistency_pixels",
        "ConsistencyProxy",
        "Consistency",
        "How alike frames are to the one before and to the first, as pictures of 8 x 8 pixels.",
    ),
    _proxy(
        "dynamic_degree_flow",
        "MotionProxy",
        "Dynamic degree",
        "The share of videos that move, by VBench's rule over an optical flow without a network.",
        better=0,
        least_side=4,
    ),
)
ENTRIES = (*_DIMENSIONS, *_DISTANCES, *_DYNAMICS, *_PROXIES)
