"""No code from checkpoints runs: hostile folders, pickles, archives and configurations are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vpo_engine import check_model, sample
from vpo_engine.exporting.folder import add_parts
from vpo_engine.foreign_files import load_tokenizer, refuse_fetched_code
from vpo_engine.metrics.networks.torchscript import is_script, read_script
from vpo_engine.models.diffusers_folder import pipeline_index
from vpo_engine.weights import read_file

HOSTILE = "import pathlib\npathlib.Path({mark!r}).write_text('run')\n"


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that hostile code would write; it must not be there in the end."""
    path = tmp_path / "code_was_run"
    before = dict(sys.modules)
    yield path
    assert not path.exists()
    assert not [name for name in sys.modules.keys() - before.keys() if "hostile" in name]


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["zip", "old", "bare", "inside"])
def test_a_pickle_runs_nothing(tmp_path: Path, mark: Path, kind: str) -> None:
    path = tmp_path / "scorer.pt"
    content = {"weight": torch.zeros(2), "extra": Bomb(mark)} if kind == "inside" else Bomb(mark)
    if kind == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old")
    with pytest.raises(ValueError, match=r"scorer\.pt cannot be read .*fetch it again"):
        read_file(path)


def hostile_tokenizer(folder: Path, mark: Path) -> Path:
    """Write a tokenizer whose configuration asks for a class in a Python file beside it."""
    folder.mkdir(parents=True)
    (folder / "hostile_tokens.py").write_text(HOSTILE.format(mark=str(mark)) + "class Tokens: pass\n")
    asked = {"AutoTokenizer": ["hostile_tokens.Tokens", "hostile_tokens.Tokens"]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Tokens", "auto_map": asked})
    )
    (folder / "config.json").write_text(
        json.dumps({"model_type": "hostile", "auto_map": {"AutoConfig": "hostile_tokens.C"}})
    )
    return folder


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read .*without code of its own"):
        load_tokenizer(hostile_tokenizer(tmp_path / "tokenizer", mark))


PIPELINE = {
    "_class_name": "WanPipeline",
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": [None, None],
}


@pytest.mark.parametrize(
    "part",
    [
        ["hostile_parts", "Model"],
        ["os", "system"],
        ["diffusers", "a.b"],
        ["diffusers"],
        [{}, "x"],
        ["transformers", None],
    ],
)
def test_a_pipeline_names_no_other_packages(tmp_path: Path, mark: Path, part: object, capsys: Any) -> None:
    (tmp_path / "hostile_parts.py").write_text(HOSTILE.format(mark=str(mark)))
    (tmp_path / "model_index.json").write_text(json.dumps({**PIPELINE, "scheduler": part}))
    with pytest.raises(ValueError, match=r"says that scheduler is .* no other code is run"):
        pipeline_index(tmp_path)
    assert sample.main([str(tmp_path), "--prompt", "a cat", "--out", str(tmp_path / "out")]) == 1
    assert "scheduler is" in capsys.readouterr().err
    assert check_model.main([str(tmp_path), "--kind", "wan"]) == 1


def test_settings_that_fetch_code_are_refused_wherever_they_stand() -> None:
    for settings in (
        {"attn_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": {"": "someone/kernel"}}},
        {"experts_implementation": "someone/kernel"},
    ):
        with pytest.raises(
            ValueError, match="'someone/kernel', a repository whose code would be fetched and run"
        ):
            refuse_fetched_code(settings, "config.json")
    refuse_fetched_code({"attn_implementation": "sdpa", "auto_map": {"AutoModel": "a.B"}}, "config.json")


def test_an_export_names_no_class(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also where Python would find the module: in the folder that the command starts in."""
    (tmp_path / "hostile_model.py").write_text(HOSTILE.format(mark=str(mark)))
    record = {"kind": "hostile_model:Model", "settings": {}}
    (tmp_path / "vpo_export.json").write_text(json.dumps(record))
    monkeypatch.syspath_prepend(tmp_path)
    assert sample.main([str(tmp_path), "--prompt", "a cat", "--out", str(tmp_path / "out")]) == 1
    assert (
        "if you trust that class, name it yourself: model.kind=hostile_model:Model" in capsys.readouterr().err
    )
    for name in ("model.policy", "model.lora.rank", "run_dir", "reward.kind"):
        (tmp_path / "vpo_export.json").write_text(json.dumps({"kind": "sprites", "settings": {name: "x"}}))
        assert sample.main([str(tmp_path), "--prompt", "a cat", "--out", str(tmp_path / "out")]) == 1
        assert f"sets '{name}', which the record of an export does not do" in capsys.readouterr().err


class Tower(nn.Module):
    """A network with everything that a state dict can hold, and tensors that are in none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.second = nn.Linear(4, 2, bias=False).half().float()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("table", torch.arange(6).reshape(2, 3).T)
        self.plain = torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) * self.scale + self.plain.sum()


@pytest.mark.parametrize("traced", [False, True])
def test_a_script_archive_gives_the_weights_of_its_state_dict(tmp_path: Path, traced: bool) -> None:
    torch.manual_seed(0)
    network = Tower().eval()
    made = torch.jit.trace(network, torch.ones(2, 3)) if traced else torch.jit.script(network)
    torch.jit.save(made, tmp_path / "clip.pt")
    assert is_script(tmp_path / "clip.pt")
    found, expected = read_script(tmp_path / "clip.pt"), made.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight)
        assert found[name].dtype == weight.dtype


class Stateful(nn.Module):
    """A module whose archive runs a method when ``torch.jit.load`` reads it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.weight = path, nn.Parameter(torch.zeros(2))
        self.training = False

    @torch.jit.export
    def __getstate__(self):  # type: ignore[no-untyped-def]
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):  # type: ignore[no-untyped-def]
        self.path, self.training = state
        torch.from_file(self.path, True, 4)  # makes the file

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_script_archive_runs_nothing(tmp_path: Path, mark: Path) -> None:
    path = tmp_path / "clip.pt"
    torch.jit.save(torch.jit.script(Stateful(str(mark))), path)
    mark.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"clip\.pt cannot be read as a TorchScript archive"):
        read_script(path)


def test_an_export_takes_no_files_from_outside_of_its_base(tmp_path: Path) -> None:
    """An export may be published: a link to a private file must not be followed."""
    (tmp_path / "private").write_text("a secret")
    base = tmp_path / "base"
    (base / "vae").mkdir(parents=True)
    (base / "vae" / "config.json").write_text("{}")
    assert add_parts(tmp_path / "fine", {"vae": base / "vae"}) == (1, 0)
    (base / "vae" / "notes.txt").symlink_to(tmp_path / "private")
    with pytest.raises(ValueError, match=r"notes\.txt is a symbolic link to .*private, outside"):
        add_parts(tmp_path / "out", {"vae": base / "vae"})


def test_links_within_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--model"
    part = repository / "snapshots" / "abc" / "vae"
    part.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1f").write_text("{}")
    (part / "config.json").symlink_to("../../../blobs/1f")
    add_parts(tmp_path / "out", {"vae": part})
    assert (tmp_path / "out" / "vae" / "config.json").read_text() == "{}"
    shutil.rmtree(repository)
