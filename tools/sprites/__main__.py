"""Rebuild the weights of the sprites world, or report how good they are.

    python -m tools.sprites build [PART ...] [--out FOLDER]
    python -m tools.sprites report

All parts are trained from fixed seeds on the CPU. They depend on one another in the order in which they are listed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from tools.sprites.pretrain import pretrain
from tools.sprites.quality import quality_report
from tools.sprites.train_image import train_image
from tools.sprites.train_rewards import train_judge, train_reward
from tools.sprites.train_text import CONFIG as TEXT_CONFIG
from tools.sprites.train_text import train_text_encoder
from tools.sprites.train_vae import train_vae
from vpo_engine.data.sprites.assets import WEIGHTS, load_text_encoder, load_vae, round_trip
from vpo_engine.models.opensora.checkpoint import save_pretrained_layout
from vpo_engine.rewards.sprites_networks import save_network

PARTS = ("vae", "text_encoder", "reward", "judge", "image", "policy")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sprites",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="train the parts and write their weights")
    builder.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all of them")
    builder.add_argument(
        "--out", type=Path, default=WEIGHTS, help="folder for the weights (default: %(default)s)"
    )
    commands.add_parser(
        "report",
        help="print how well the rewards rank damage, and the scores of clean, mixture and base policy clips",
    )
    given = parser.parse_args(arguments)
    if given.command == "report":
        print(quality_report())
        return 0
    unknown = sorted(set(given.parts) - set(PARTS))
    if unknown:
        print(f"error: unknown part {unknown[0]!r}; parts are {', '.join(PARTS)}", file=sys.stderr)
        return 1
    for part in PARTS:
        if not given.parts or part in given.parts:
            build(part, given.out)
    return 0


def build(part: str, out: Path) -> None:
    """Train one of PARTS and write it under ``out``, where the parts that it needs must exist already."""
    began = time.perf_counter()

    def log(text: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {text}", flush=True)

    if part == "vae":
        vae = train_vae(0, log)
        _save(vae, vae.config, out / part)
    elif part == "text_encoder":
        _save(train_text_encoder(0), TEXT_CONFIG, out / part)
    elif part == "policy":
        encoder = load_text_encoder(out / "text_encoder")
        network = pretrain(load_vae(out / "vae"), encoder.encode, 0, log)
        _save(network, network.config, out / part)
    else:
        train: Callable[..., nn.Module]
        train = {"reward": train_reward, "judge": train_judge, "image": train_image}[part]
        vae = load_vae(out / "vae")
        save_network(train(round_trip=lambda videos: round_trip(vae, videos)), out / f"{part}.safetensors")
    log(f"{part} is done")


def _save(module: nn.Module, config: dict[str, object], folder: Path) -> None:
    """Write the weights in half precision, in the published layout."""
    state = {name: value.half() for name, value in module.state_dict().items()}
    save_pretrained_layout(state, json.loads(json.dumps(config)), folder)


if __name__ == "__main__":
    sys.exit(main())
