"""Sample videos from a policy and write them as mp4 files, with their prompts beside them.

    python -m vpo_engine.sample RUN --prompt "a red circle moving left"

RUN is one of:
  a run directory     its newest checkpoint is used
  a checkpoint        a folder RUN_DIRECTORY/checkpoints/step_...
  a YAML file         a configuration; the policy that such a run starts from is used
  an export           a folder that vpo_engine.export wrote
  a published model   a folder as the model's project publishes it
  an adapter          a file or folder, together with --base FOLDER, the model that it was trained on
  nothing             the sprites policy that is part of the package
Sampling steps, guidance and video size are those of the run's configuration, and for a published model those of its
family, unless options change them. Words key.path=value change other settings, such as model.vae=FOLDER. Without a
prompt, the sprites world's held-out captions are sampled. A checkpoint is compared with its hashes before it is used.

The prompts stand in FOLDER/prompts.jsonl, which vpo_engine.rank reads. Several calls may write into one folder.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpo_engine.command import Parser, report_errors, split_settings
from vpo_engine.data.clips import PromptRecord
from vpo_engine.data.prompts import PromptFile, PromptList
from vpo_engine.help_text import HelpFormatter
from vpo_engine.policy_source import PolicySource, find_source
from vpo_engine.texts import say

if TYPE_CHECKING:  # torch is imported when everything that the arguments alone tell has been said
    from torch import Tensor, nn

    from vpo_engine.config import Config
    from vpo_engine.video_model import VideoModel

MOST_VIDEOS = 10_000
"""Most videos for each prompt, whose names and noise are planned before the first is sampled."""
_WORDS_IN_NAME = 60
"""Characters of a prompt in the name of a file."""


@dataclass(frozen=True)
class SampleOptions:
    """Changes to the settings of the policy's source; None leaves a setting as it is there.

    size: height and width in pixels.
    """

    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_intermixed_args(arguments)
    if given.column is not None and given.prompts is None:
        parser.error("--column names a column of --prompts FILE; give that too, or leave it out")
    options = SampleOptions(given.steps, given.guidance, given.negative_prompt, given.frames, given.size)

    def run() -> None:
        sources, overrides = split_settings(given.run)
        if len(sources) > 1:
            parser.error(
                f"give one RUN, got {len(sources)}: {', '.join(sources)}; call sample for each of them"
            )
        prompts = _prompts(given.prompt, given.prompts, given.column)
        _check_counts(given.count, options)
        source = find_source(Path(sources[0]) if sources else None, given.base, overrides)
        sample(source, prompts, given.out, given.count, given.seed, options)

    return report_errors(run, "stopped; the videos listed above are complete")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m vpo_engine.sample",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "run", nargs="*", metavar="RUN | key.path=value", help="what to sample from, see above; and settings"
    )
    parser.add_argument(
        "--base", type=Path, metavar="FOLDER", help="the model that RUN, an adapter, was trained on"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a prompt; repeat the option for several",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a file of prompts, as for training")
    parser.add_argument(
        "--column",
        metavar="NAME",
        help="the column, or the key, of FILE that holds the prompts; by default the usual names are tried",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples"),
        metavar="FOLDER",
        help="folder for the mp4 files (default: %(default)s)",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=1,
        metavar="N",
        help="number of videos for each prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the starting noise (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="number of sampling steps")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale; 1 is none")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="the prompt that guidance leads away from")
    parser.add_argument("--frames", type=int, metavar="N", help="number of frames")
    parser.add_argument(
        "--size", type=parse_size, metavar="HEIGHTxWIDTH", help="size in pixels, such as 480x832"
    )
    return parser


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width of HEIGHTxWIDTH, for argparse."""
    found = re.fullmatch(r"([1-9][0-9]*)[xX]([1-9][0-9]*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write HEIGHTxWIDTH, such as 480x832")
    return int(found[1]), int(found[2])


def _check_counts(count: int, options: SampleOptions) -> None:
    if not 1 <= count <= MOST_VIDEOS:
        raise ValueError(f"--count {count} must be from 1 to {MOST_VIDEOS} videos for each prompt")
    for name, value in (("steps", options.steps), ("frames", options.frames)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} is too small; give at least 1")
    if options.guidance is not None and not 0 <= options.guidance < float("inf"):
        raise ValueError(f"--guidance {options.guidance} is no scale; give a number from 0, where 1 is none")


def sample(
    source: PolicySource,
    prompts: Sequence[str],
    out: Path,
    count: int,
    seed: int,
    options: SampleOptions = SampleOptions(),
) -> list[Path]:
    """Write ``count`` videos for each prompt to ``out``; return the files, in the order of the prompts."""
    if not prompts and source.config.model.kind == "sprites":
        from vpo_engine.data.sprites.world import withheld_captions

        prompts = withheld_captions()
    if not prompts:
        raise ValueError(
            "there is no prompt; give one with --prompt TEXT, or a file of them with --prompts FILE"
        )
    source = with_options(source, options)
    from vpo_engine.build import check_prompts
    from vpo_engine.runs.video import write_mp4

    for note in check_prompts(source.config, prompts):
        say(note, sys.stderr)
    record = PromptRecord(out)
    names = [
        [file_name(number, prompt, copy) for copy in range(count)] for number, prompt in enumerate(prompts)
    ]
    model = load_source(source)
    model.prepare(prompts)
    record.begin([name for copies in names for name in copies])
    files = []
    for copies, prompt, videos in zip(
        names, prompts, sample_frames(model, source, prompts, count, seed), strict=True
    ):
        for name, video in zip(copies, videos, strict=True):
            files.append(record.add(name, prompt, partial(write_mp4, frames=video, fps=model.fps)))
            say(str(files[-1]))
    made = "1 video and its prompt" if len(files) == 1 else f"{len(files)} videos and their prompts"
    say(
        f"{made} ({record.path.name}) are in {out}; open {files[0]}, or score them: "
        f"python -m vpo_engine.rank {out} --reward builtin"
    )
    return files


def sample_frames(
    model: VideoModel, source: PolicySource, prompts: Sequence[str], count: int = 1, seed: int = 0
) -> Iterator[Tensor]:
    """Yield the videos of each prompt, uint8 [count, F, height, width, 3] on the CPU.

    model: as ``load_source`` loads ``source``, with these prompts prepared. The noise of a video depends on the seed,
    the number of its prompt and its own number, see ``starting_noise``.
    """
    for number, prompt in enumerate(prompts):
        yield frames_of(model, source, prompt, starting_noise(model, seed, number, count))


def frames_of(model: VideoModel, source: PolicySource, prompt: str, noise: Tensor) -> Tensor:
    """Return the videos that a prompt gets from noise [count, C, T, H, W]: uint8 [count, F, height, width, 3]."""
    import torch

    settings = source.config.rollout
    with torch.no_grad():
        text = model.embed([prompt]).repeat_interleave(len(noise))
        with model.idle_offload.phase("evaluation"):
            latents = model.sample(
                model.network,
                noise.to(model.device),
                text,
                steps=settings.steps,
                guidance=settings.guidance,
            )
        return model.decode(latents).cpu()


def starting_noise(model: VideoModel, seed: int, number: int, count: int) -> Tensor:
    """Return the noise that the videos of prompt ``number`` start from, [count, C, T, H, W]."""
    import torch

    from vpo_engine.seeding import normal

    return torch.stack([normal(model.latent_shape, seed, "sample", number, copy) for copy in range(count)])


def with_options(source: PolicySource, options: SampleOptions) -> PolicySource:
    """Return the source with its settings changed; see ``changed_config``."""
    return replace(source, config=changed_config(source.config, options))


def changed_config(config: Config, options: SampleOptions) -> Config:
    """Return the settings changed by options. Raise ValueError for what the model's family cannot do."""
    from vpo_engine.models.registry import model_family

    family = model_family(config.model.kind)
    card = family.card
    changed: dict[str, Any] = {}
    if options.guidance not in (None, 1.0) and "rollout.guidance" not in card.supports:
        raise ValueError(f"--guidance {options.guidance:g}: {card.name} has no guidance; leave it out")
    if options.negative_prompt is not None:
        if "model.negative_prompt" not in card.supports:
            raise ValueError(f"--negative-prompt: {card.name} takes none; leave it out")
        changed["negative_prompt"] = options.negative_prompt
    if options.frames is not None:
        changed["num_frames"] = options.frames
    try:
        if options.size is not None:
            changed |= family.size_settings(*options.size)
        model = config.model.model_copy(update=changed)
        config = _validated(config.model_copy(update={"model": model}))
        family.check(model)
    except ValueError as error:
        height, width = options.size or (0, 0)
        asked = [f"--frames {options.frames}"] if options.frames is not None else []
        asked += [f"--size {height}x{width}"] if options.size else []
        raise ValueError(f"{' '.join(asked)}: {error}" if asked else str(error)) from error
    rollout = config.rollout.model_copy(
        update={
            name: value
            for name, value in (("steps", options.steps), ("guidance", options.guidance))
            if value is not None
        }
    )
    return config.model_copy(update={"model": model, "rollout": rollout})


def _validated(config: Config) -> Config:
    """Return the configuration checked as a whole. Raise ValueError for settings that do not go together."""
    from pydantic import ValidationError

    from vpo_engine.config.errors import explain

    try:
        return type(config).model_validate(config.model_dump(exclude_unset=True))
    except ValidationError as error:
        raise ValueError(explain(error, type(config), {})) from error


def load_source(source: PolicySource, say: Callable[[str], None] = print) -> VideoModel:
    """Load a model with its policy. An adapter from elsewhere is read in any dialect, see ``exporting.adapter``.

    say: is told which attention was chosen, and why.
    """
    from vpo_engine.build import build_model
    from vpo_engine.distributed.processes import Processes
    from vpo_engine.models.lora import load_adapter

    # Previews may be longer than these videos.
    rollout = source.config.rollout.model_copy(update={"prune": None})
    config = source.config.model_copy(update={"rollout": rollout})
    processes = Processes.start(config.model.device)
    if source.adapter is None or config.model.lora is not None:
        model = build_model(config, processes, say)
        if source.adapter is not None:
            load_adapter(model.network, source.adapter)
        return model
    from vpo_engine.exporting.adapter import find_adapter, read_adapter
    from vpo_engine.models.registry import model_family

    family, file = model_family(config.model.kind), find_adapter(source.adapter)
    if file is None:
        raise ValueError(
            f"{source.adapter} has no .safetensors file of an adapter; convert its weights (PEFT's save_pretrained "
            "writes such a file)"
        )
    adapter = read_adapter(file, _network_without_weights(config), family.original_name, family.card.name)
    settings = config.model.model_copy(update={"lora": adapter.settings()})
    model = build_model(config.model_copy(update={"model": settings}), processes, say=lambda line: None)
    adapter.put_into(model.network)
    return model


def _network_without_weights(config: Config) -> nn.Module:
    """Return the policy's network on the meta device; of a family without a blueprint, on the CPU with its weights."""
    from vpo_engine.build import build_model
    from vpo_engine.distributed.processes import Processes
    from vpo_engine.models.registry import model_family
    from vpo_engine.planning.parts import Assumed

    blueprint = model_family(config.model.kind).blueprint(config.model, Assumed().config)
    if blueprint is not None:
        return blueprint.model.network
    return build_model(config, Processes.start("cpu"), say=lambda line: None).network


def _prompts(texts: Sequence[str], file: Path | None, column: str | None) -> list[str]:
    """Return the prompts of the command line and of a file. Raise ValueError for one that is no text."""
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise ValueError(f"--prompt number {number} is {text!r}; give it words, or leave it out")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"--prompt number {number} is {text!r}, which is not UTF-8; write it as UTF-8")
    given = [text.strip() for text in texts]
    if file is None:
        return given
    if column is not None and file.suffix.lower() == ".txt":
        raise ValueError(
            f"--column {column}: {file} has no columns, as a .txt holds a prompt a line; leave it out"
        )
    return PromptList(given, PromptFile(file, column, choose="set --column"))


def file_name(number: int, prompt: str, copy: int) -> str:
    """Return the name of a video's file: number, words of the prompt, copy.

    Where the words are not the whole prompt, a few digits of its hash make the name another one than that of other
    prompts with these words.
    """
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_WORDS_IN_NAME].strip("-") or "prompt"
    if words.replace("-", " ") != prompt:
        words += f"-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
    return f"{number:04d}-{words}-{copy}.mp4"


if __name__ == "__main__":
    sys.exit(main())
