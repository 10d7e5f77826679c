"""The room that a run takes on its disk, as it is planned and as it turns out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from vpo_engine import train as entry
from vpo_engine.build import build_model
from vpo_engine.config import Config
from vpo_engine.config_file import load_config
from vpo_engine.data.sprites.world import withheld_captions
from vpo_engine.disk_plan import DiskPart, check_run_fits, disk_parts, embedding_bytes
from vpo_engine.distributed.processes import Processes
from vpo_engine.planning.disk import planned_disk
from vpo_engine.runs.disk_use import bytes_of

Make = Callable[..., Config]
SETTINGS = (
    "steps=6",
    "pairs.dataset=latents",
    "evaluation.every=2",
    "checkpoint.keep=1",
    "checkpoint.every=2",
)


def test_a_model_without_weights_is_planned_as_the_loaded_one(small: Make) -> None:
    config = small(*SETTINGS, "memory.weights=fp32_master", "reference.storage=exact8")
    model = build_model(config, Processes.start("cpu"), lambda _: None)
    assert planned_disk(config, lambda *given: disk_parts(*given[:2])) == disk_parts(config, model)
    few, many = embedding_bytes(config, model, 3), embedding_bytes(config, model, 10**9)
    assert (
        many - few == (6 * 2 - 3) * 32 * 32 * 4
    )  # 32 tokens of 32 float32 channels for each prompt that is drawn


def test_all_held_out_prompts_are_encoded(small: Make, tmp_path: Path) -> None:
    model = build_model(small(*SETTINGS), Processes.start("cpu"), lambda _: None)
    file = tmp_path / "held_out.txt"
    file.write_text("".join(f"prompt {number}\n" for number in range(9)))
    sizes = [
        embedding_bytes(small(*SETTINGS, *words), model, 3) / (32 * 32 * 4)
        for words in (
            ("evaluation.prompts=2",),
            ("evaluation.prompts=null", f"prompts.held_out={file}"),
            ("evaluation.prompts=null",),
        )
    ]
    assert sizes == [3 + 2, 3 + 9, 3 + len(withheld_captions())]


@pytest.mark.long
def test_the_plan_is_near_what_a_run_writes(small: Make, tmp_path: Path) -> None:
    config = small(*SETTINGS)
    assert entry.train(config) == 0
    model = build_model(config, Processes.start("cpu"), lambda _: None)
    planned = {part.name.partition(" (")[0]: part.bytes for part in disk_parts(config, model)}
    run = tmp_path / "run"
    assert bytes_of(run / "checkpoints") == pytest.approx(
        planned["checkpoints"] / 2, rel=0.1
    )  # the second is gone
    assert bytes_of(run / "preference_dataset") == pytest.approx(planned["preference dataset"], rel=0.2)
    assert bytes_of(run / "gallery") <= planned["galleries"]
    written = bytes_of(run / "metrics.jsonl") + bytes_of(run / "tensorboard")
    assert 0.3 < written / (planned["log"] + planned["clips in TensorBoard"]) < 1.5


def test_what_the_disk_holds_already_needs_no_room_again(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = DiskPart("checkpoints", 3 * 2**30, False, "lower checkpoint.keep=2")
    monkeypatch.setattr("vpo_engine.disk_plan.disk_parts", lambda *_: [part])
    monkeypatch.setattr("vpo_engine.disk_plan.free_bytes", lambda _: 2**30)
    with pytest.raises(ValueError, match=r"this run writes 3\.06 GiB more"):
        check_run_fits(small(), None, tmp_path, 0)  # type: ignore[arg-type]
    for name in ("checkpoints", "gallery"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "all.bin").open("wb") as file:
            file.truncate(3 * 2**29)
    check_run_fits(small(), None, tmp_path, 2)  # type: ignore[arg-type]


def test_pairs_that_offline_dpo_samples_before_its_first_step_are_planned() -> None:
    def planned(*settings: str) -> tuple[int, int]:
        """Return the bytes of the dataset, and the numbers of a video's latents."""
        config = load_config(None, ["method=offline_dpo", "steps=6", "pairs_per_step=2", *settings])
        parts, numbers = planned_disk(
            config, lambda own, model, _: (disk_parts(own, model), math.prod(model.latent_shape))
        )
        return sum(part.bytes for part in parts if part.name == "preference dataset"), numbers

    size, numbers = planned()
    assert size > 12 * 2 * 4 * numbers
    assert 3 * planned("offline_dpo.pairs=4")[0] == size
    assert planned("offline_dpo.dataset=runs/a")[0] == 0


def test_a_checkpoint_holds_the_clips_of_the_base_policy(small: Make) -> None:
    """The report shows sixteen of them; beside an adapter they are the larger part."""
    config = small("model.lora.rank=1", "reference.storage=adapter", "checkpoint.keep=1")
    model = build_model(config, Processes.start("cpu"), lambda _: None)
    assert model.video_size is not None
    clip = 3 * math.prod(model.video_size)

    def planned(prompts: str, samples: int) -> float:
        words = (f"evaluation.prompts={prompts}", f"evaluation.samples_per_prompt={samples}")
        changed = config.model_copy(update={"evaluation": load_config(None, list(words)).evaluation})
        (size,) = (part.bytes for part in disk_parts(changed, model) if part.name.startswith("checkpoints"))
        return size / 2 / clip

    few = planned("1", 2)
    assert [round(planned(*given) - few) for given in (("2", 3), ("2", 8), ("null", 1))] == [4, 14, 14]


def test_the_clips_that_tensorboard_gets_at_the_end_are_planned(small: Make) -> None:
    """Sixteen, before and after side by side; of the evaluations at the start and at the end it gets four each."""
    many, few = (
        small("evaluation.every=null", "evaluation.prompts=2", f"evaluation.samples_per_prompt={samples}")
        for samples in (9, 1)
    )
    model = build_model(many, Processes.start("cpu"), lambda _: None)
    assert model.video_size is not None
    for config, frames in ((many, 2 * 4 + 2 * 16), (few, 2 * 2 + 2 * 2)):
        (planned,) = (part.bytes for part in disk_parts(config, model) if part.name == "clips in TensorBoard")
        assert planned == frames * math.prod(model.video_size)


def test_pairs_that_were_sampled_before_the_first_step_need_no_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = DiskPart("preference dataset", 3 * 2**30, False, "lower offline_dpo.pairs=12")
    monkeypatch.setattr("vpo_engine.disk_plan.disk_parts", lambda *_: [part])
    monkeypatch.setattr("vpo_engine.disk_plan.free_bytes", lambda _: 2**30)
    config = load_config(None, ["method=offline_dpo", "steps=6", "pairs_per_step=2"])
    with pytest.raises(ValueError, match=r"this run writes 3\.06 GiB more"):
        check_run_fits(config, None, tmp_path, 0)  # type: ignore[arg-type]
    (tmp_path / "preference_dataset").mkdir()
    with (tmp_path / "preference_dataset/all.bin").open("wb") as file:
        file.truncate(3 * 2**30)
    check_run_fits(config, None, tmp_path, 2)  # type: ignore[arg-type]


def test_prompts_are_counted_as_a_run_reads_them(small: Make, tmp_path: Path) -> None:
    """prompts.column is that of one of the files; the other one has no columns."""
    texts, table = tmp_path / "texts.txt", tmp_path / "table.csv"
    texts.write_text("".join(f"prompt {number}\n" for number in range(5)))
    table.write_text("words\n" + "".join(f"prompt {number}\n" for number in range(7)))
    other = tmp_path / "other.csv"
    other.write_text("prompt\n" + "".join(f"prompt {number}\n" for number in range(3)))
    for train, held_out, counts in ((texts, table, (5, 7)), (table, texts, (7, 5)), (table, other, (7, 3))):
        files = (f"prompts.train={train}", f"prompts.held_out={held_out}", "prompts.column=words")
        config = small(*SETTINGS, *files, "evaluation.prompts=null")
        found = planned_disk(config, lambda *given: (given[2], embedding_bytes(*given)))
        assert found == (counts[0], sum(counts) * 32 * 32 * 4)
