"""Train Open-Sora 1.2 at its published size on a CPU, and compare the memory it takes with the plan, phase by phase.

    python bench/cpu_memory.py FOLDER [--steps 4] [--record]

Random weights of the published sizes are written to FOLDER once (3 GB; the text encoder has one layer of the published
width). The run has N = 2 candidates of 17 frames at 144p, bfloat16 weights with stochastic rounding and 8-bit moments.
Measured is the anonymous memory of the process (RssAnon), twenty times a second; files that are only mapped do not
count. The plan knows nothing of the interpreter and its libraries, whose memory before the run is printed beside it.

The exit code is 1 if the peak is more than 10 % above the plan's, or if that of the last step is more than 2 % above
that of the second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import sentencepiece
import torch
from rows import Row, environment, record
from torch import nn

from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.metrics.stage_timer import StageTimer
from vpo_engine.models.opensora.checkpoint import save_pretrained_layout
from vpo_engine.models.opensora.published import STDIT3_XL2, T5_V1_1_XXL, VAE_V1_2
from vpo_engine.models.opensora.stdit3 import STDiT3
from vpo_engine.models.opensora.text import ByteTokenizer, T5Encoder
from vpo_engine.models.opensora.vae import OpenSoraVAE
from vpo_engine.planning.planner import plan_run
from vpo_engine.train import train

GIB = 2**30
ALLOWED = 1.10
GROWTH = 1.02
PROMPTS = ("a lantern on a pier", "two cups on a table", "a kite over the dunes", "rain on a window")
SETTINGS = (
    "model.resolution=144p",
    "model.num_frames=17",
    "pairs_per_step=1",
    "rollout.candidates=2",
    "rollout.steps=2",
    "rollout.guidance=1.0",
    "memory.weights=stochastic_rounding",
    "memory.optimizer_bits=8",
    "reward.kind=builtin",
    "reward.path=null",
    "reward.dimensions=global",
    "prompts.column=null",
    "reference.refresh_every=2",
    "evaluation.every=null",
    "evaluation.steps=1",
    "checkpoint.every=null",
)


def write_weights(folder: Path) -> None:
    """Write random weights in the layouts of the published repositories, unless they are there."""
    if (folder / "held_out.txt").exists():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    network = STDiT3.from_config(STDIT3_XL2)
    save_pretrained_layout(network.state_dict(), network.config, folder / "policy")
    del network
    vae = OpenSoraVAE.from_config(VAE_V1_2)
    save_pretrained_layout(vae.state_dict(), vae.config, folder / "vae")
    del vae
    text = {**T5_V1_1_XXL, "num_layers": 1, "vocab_size": 64, "d_ff": 1024}
    encoder: nn.Module = T5Encoder.from_config(text, ByteTokenizer(8)).model
    weights = {
        name: value for name, value in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"
    }
    save_pretrained_layout(weights, {**text, "model_type": "t5"}, folder / "text_encoder")
    torch.set_default_dtype(torch.float32)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROMPTS * 4),
        model_prefix=str(folder / "text_encoder" / "spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (folder / "train.txt").write_text("\n".join(PROMPTS[:2]) + "\n", encoding="utf-8")
    (folder / "held_out.txt").write_text("\n".join(PROMPTS[2:]) + "\n", encoding="utf-8")


def configuration(folder: Path, steps: int) -> Config:
    places = [f"model.{name}={folder / name}" for name in ("policy", "vae", "text_encoder")]
    files = [f"prompts.{name}={folder / f'{name}.txt'}" for name in ("train", "held_out")]
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    return load_config("opensora_v1_2_240p", [*SETTINGS, *places, *files, f"steps={steps}", f"run_dir={run}"])


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().split("\n"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; measure on Linux")


class Sampler:
    """Keeps the largest anonymous memory seen in each stage of each step, in a thread of its own."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = defaultdict(int)
        self.steps: list[int] = []
        self._timers: list[StageTimer] = []
        self._leaving = threading.Event()
        made, taken, sampler = StageTimer.__init__, StageTimer.take, self

        def init(timer: StageTimer, device: torch.device) -> None:
            made(timer, device)
            sampler._timers.append(timer)

        def take(timer: StageTimer) -> tuple[dict[str, float], dict[str, float]]:
            sampler.steps.append(0)  # a step has ended, and the next begins
            return taken(timer)

        StageTimer.__init__ = init  # type: ignore[method-assign]
        StageTimer.take = take  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._leaving.wait(0.05):
            now = anonymous_bytes()
            stage = next(
                (timer._entered[-1] for timer in self._timers if timer._entered), "outside of the step"
            )
            self.peaks[stage] = max(self.peaks[stage], now)
            if self.steps and stage != "outside of the step":
                self.steps[-1] = max(self.steps[-1], now)

    def stop(self) -> None:
        self._leaving.set()
        self._thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the random weights and of the run")
    parser.add_argument("--steps", type=int, default=4, help="steps of the run (default: %(default)s)")
    parser.add_argument(
        "--record", action="store_true", help="write the row to bench/results/cpu_memory.jsonl"
    )
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    write_weights(given.folder)
    config = configuration(given.folder, given.steps)
    plan = plan_run(config, None)
    planned = {phase.name: phase.total for phase in plan.phases}
    planned["update"] = max(planned["update"], planned.pop("optimizer", 0))
    before, started = anonymous_bytes(), time.perf_counter()
    sampler = Sampler()
    code = train(config)
    sampler.stop()
    seconds = time.perf_counter() - started
    print(f"interpreter and libraries before the run: {before / GIB:.2f} GiB; the run took {seconds:.0f} s")
    print(f"{'phase':<12} {'planned':>8} {'measured':>9} {'ratio':>6}   GiB")
    too_much = code != 0
    for name, expected in planned.items():
        if name in sampler.peaks:
            ratio = sampler.peaks[name] / expected
            print(f"{name:<12} {expected / GIB:8.2f} {sampler.peaks[name] / GIB:9.2f} {ratio:6.2f}")
    peak, peak_planned = (
        max(sampler.peaks[name] for name in planned if name in sampler.peaks),
        plan.peak.total,
    )
    print(f"{'peak':<12} {peak_planned / GIB:8.2f} {peak / GIB:9.2f} {peak / peak_planned:6.2f}")
    steps = [step for step in sampler.steps if step]
    print("peak of each step:", ", ".join(f"{step / GIB:.2f}" for step in steps), "GiB")
    too_much |= peak > ALLOWED * peak_planned or (len(steps) > 2 and steps[-1] > GROWTH * steps[1])
    if given.record:
        numbers = {"planned_bytes": float(peak_planned), "measured_bytes": float(peak), "seconds": seconds}
        numbers |= {f"planned_{name}_bytes": float(value) for name, value in planned.items()}
        numbers |= {
            f"measured_{name}_bytes": float(value) for name, value in sampler.peaks.items() if name in planned
        }
        case = {
            "model": "Open-Sora 1.2, random weights",
            "size": "144p x 17, N = 2",
            "steps": str(given.steps),
        }
        row = Row(
            "cpu_memory", case, numbers, environment(torch.device("cpu"), f"python {' '.join(sys.argv)}")
        )
        print("recorded in", *record([row]))
    print(json.dumps({"planned": peak_planned, "measured": peak}))
    return int(too_much)


if __name__ == "__main__":
    sys.exit(main())
