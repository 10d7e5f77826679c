import errno
import json
import os

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from vpo_engine.errors import CheckpointError
from vpo_engine.runs import checkpoint as module
from vpo_engine.runs.checkpoint import load_checkpoint, newest_complete, save_checkpoint


def write_policy(folder):
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")


def save(folder, step, *, keep=10, value=0.0, tensors=None, **options):
    tensors = {"reference": {"w": torch.full((64,), value)}} if tensors is None else tensors
    options = {"state": {"step": step}, "write_policy": write_policy, **options}
    return save_checkpoint(folder, step, tensors=tensors, keep=keep, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def odd_tensors():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    noise = torch.randint(-(2**15), 2**15, (4096,), generator=generator, dtype=torch.int16)
    return {
        "reference": {
            "bf16, every kind of bit pattern": noise.view(torch.bfloat16),
            "half": base.half(),
            "double": base.double(),
            "transposed": base.T,
            "strided": base[::2, 1::3],
            "shared": base,
            "shared too": base,
            "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        },
        "optimizer": {
            "step": torch.tensor(48, dtype=torch.int64),
            "largest": torch.tensor([2**63 - 1, -(2**63)]),
            "scalar": torch.tensor(1e-45),
            "mask": torch.tensor([True, False]),
            "nothing": torch.empty(0, 3),
            "leaf": torch.nn.Parameter(torch.ones(2)),
        },
        "empty": {},
    }


def as_bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = odd_tensors()
    state = {"rng": [2**64 - 1, 3], "cursor": {"epoch": 1, "seed": "é"}, "none": None, "lr": 0.1}
    path = save(tmp_path / "checkpoints", 48, tensors=tensors, state=state)
    assert path == tmp_path / "checkpoints" / "step_00000048"
    loaded = load_checkpoint(path)
    assert loaded.step == 48
    assert loaded.state == state
    assert loaded.tensors.keys() == tensors.keys()
    for group, members in tensors.items():
        assert loaded.tensors[group].keys() == members.keys()
        for name, tensor in members.items():
            result = loaded.tensors[group][name]
            assert result.dtype == tensor.dtype
            assert result.shape == tensor.shape
            assert torch.equal(as_bytes(result), as_bytes(tensor)), name
    assert (loaded.policy / "model.safetensors").read_bytes() == b"weights"


def test_the_manifest_lists_every_other_file(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    files = {item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert set(manifest["files"]) == {
        "policy/config.json",
        "policy/model.safetensors",
        "reference.safetensors",
        "state.json",
    }
    modes = {item.stat().st_mode for item in path.rglob("*") if item.is_file()}
    assert len(modes) == 1, "every file readable by those whom the umask lets"


def test_only_the_last_ones_are_kept(tmp_path):
    for step in (12, 24, 36, 48):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_00000036", "step_00000048"]
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        save(tmp_path, 60, keep=0)


def test_incomplete_ones_do_not_count_as_kept(tmp_path):
    save(tmp_path, 12)
    (save(tmp_path, 24) / "manifest.json").unlink()
    save(tmp_path, 36, keep=2)
    assert names(tmp_path) == ["step_00000012", "step_00000036"]


def test_going_back_drops_the_abandoned_future(tmp_path):
    for step in (12, 24, 36):
        save(tmp_path, step, keep=2)
    save(tmp_path, 30, keep=2)
    assert names(tmp_path) == ["step_00000024", "step_00000030"]


def test_the_same_step_again_replaces(tmp_path):
    save(tmp_path, 12, value=1.0)
    path = save(tmp_path, 12, value=2.0, keep=1)
    assert load_checkpoint(path).tensors["reference"]["w"][0] == 2.0
    assert names(tmp_path) == ["step_00000012"]


def test_leftovers_of_an_interrupted_save_are_cleaned(tmp_path):
    (tmp_path / ".step_00000024.unfinished" / "policy").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    assert newest_complete(tmp_path) is None
    save(tmp_path, 36)
    assert names(tmp_path) == ["notes", "step_00000036"]


def test_looking_for_the_newest_leaves_a_save_of_another_process_alone(tmp_path):
    path = save(tmp_path, 1)
    unfinished = tmp_path / ".step_00000002.unfinished"
    (unfinished / "policy").mkdir(parents=True)
    assert newest_complete(tmp_path) == path
    assert (unfinished / "policy").is_dir()


def test_a_replacement_interrupted_between_its_renames(tmp_path):
    path = save(tmp_path, 12, value=1.0)
    path.rename(tmp_path / ".step_00000012.replaced")
    assert newest_complete(tmp_path) == path
    assert load_checkpoint(path).tensors["reference"]["w"][0] == 1.0


@pytest.mark.parametrize("stage", ["policy", "manifest", "rename"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, stage, error):
    earlier = save(tmp_path, 12, value=1.0)

    def fail(*arguments):
        raise error("stopped here")

    options = {"write_policy": fail} if stage == "policy" else {}
    if stage != "policy":
        monkeypatch.setattr(module, {"manifest": "_write_manifest", "rename": "_put_in_place"}[stage], fail)
    with pytest.raises(error, match="stopped here"):
        save(tmp_path, 24, keep=1, **options)
    assert names(tmp_path) == ["step_00000012"]
    assert newest_complete(tmp_path) == earlier
    load_checkpoint(earlier)


@pytest.mark.parametrize("where", ["tensors", "policy", "sync"])
def test_a_full_disk(tmp_path, monkeypatch, where):
    earlier = save(tmp_path, 12)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = {"write_policy": full} if where == "policy" else {}
    if where != "policy":
        monkeypatch.setattr(
            *{"tensors": (safetensors.torch, "save_file"), "sync": (module, "sync_file")}[where], full
        )
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 24, keep=1, **options)
    text = str(caught.value)
    assert text.startswith(
        f"the disk is full: could not save checkpoint '{tmp_path / 'step_00000024'}' (256 bytes needed beside"
    )
    assert text.endswith(
        "Earlier checkpoints are untouched. Free some space, keep fewer checkpoints, "
        "or put the run directory on another disk"
    )
    assert names(tmp_path) == ["step_00000012"]
    load_checkpoint(earlier)


@pytest.mark.parametrize(
    "reason", ["No space left on device (os error 28)", "Disk quota exceeded (os error 122)"]
)
def test_a_full_disk_as_the_tensor_writer_reports_it(tmp_path, monkeypatch, reason):
    def full(*arguments):
        raise SafetensorError(f"Error while serializing: I/O error: {reason}")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        save(tmp_path, 24)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        SafetensorError("I/O error: Permission denied (os error 13)"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path, error):
    earlier = save(tmp_path, 12)

    def denied(folder):
        raise error

    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 24, write_policy=denied)
    text = str(caught.value)
    assert text.startswith(f"could not save checkpoint '{tmp_path / 'step_00000024'}': ")
    assert "Permission denied" in text
    assert "Make its folder writable" in text
    assert names(tmp_path) == ["step_00000012"]
    load_checkpoint(earlier)


def test_an_error_of_our_own_is_not_blamed_on_the_folder(tmp_path):
    def wrong(folder):
        raise SafetensorError("a tensor is not contiguous")

    with pytest.raises(SafetensorError):
        save(tmp_path, 24, write_policy=wrong)


def test_neighbouring_views_of_one_memory_are_not_copied(tmp_path, monkeypatch):
    """Copies on the host share allocations; cloning each would take the memory of a whole checkpoint again."""
    whole = torch.arange(12.0)
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: copied.append(tensor) or clone(tensor))
    tensors = {"a": whole[:4], "b": whole[4:8], "none": whole[6:6], "c": whole[8:]}
    loaded = load_checkpoint(save(tmp_path, 1, tensors={"parts": tensors}))
    assert not copied
    assert all(torch.equal(loaded.tensors["parts"][name], value) for name, value in tensors.items())
    tensors["across"] = whole[5:9]
    loaded = load_checkpoint(save(tmp_path, 2, tensors={"parts": tensors}))
    assert len(copied) == 1
    assert all(torch.equal(loaded.tensors["parts"][name], value) for name, value in tensors.items())


def test_newest_skips_incomplete_ones_and_says_so(tmp_path, caplog):
    good, interrupted, short, robbed = [save(tmp_path, step) for step in (12, 24, 36, 48)]
    (interrupted / "manifest.json").unlink()
    truncated = short / "reference.safetensors"
    size = truncated.stat().st_size
    os.truncate(truncated, size - 3)
    (robbed / "policy" / "model.safetensors").unlink()
    assert newest_complete(tmp_path) == good
    assert "has no manifest.json, so its saving was interrupted" in caplog.text
    assert f"'{truncated}' has {size - 3} bytes, the manifest says {size}" in caplog.text
    assert "is missing; according to the manifest it has 7 bytes" in caplog.text
    assert newest_complete(tmp_path / "absent") is None


def test_a_truncated_file_is_named_with_the_remedy(tmp_path):
    earlier = save(tmp_path, 12)
    path = save(tmp_path, 24)
    file = path / "reference.safetensors"
    size = file.stat().st_size
    os.truncate(file, 10)
    with pytest.raises(ValueError, match="has 10 bytes") as caught:
        load_checkpoint(path)
    assert str(caught.value) == (
        f"'{file}' has 10 bytes, the manifest says {size}. Use the earlier checkpoint '{earlier}'"
    )


@pytest.mark.parametrize("name", ["reference.safetensors", "state.json", "policy/config.json"])
def test_one_altered_bit_is_found(tmp_path, name):
    path = save(tmp_path, 24)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match="was altered after it was saved: its SHA-256 is") as caught:
        load_checkpoint(path)
    assert str(path / name) in str(caught.value)
    assert str(caught.value).endswith("There is no earlier complete checkpoint: start the run again")


@pytest.mark.parametrize("content", ["", "[]", '{"step": 3}'])
def test_a_damaged_manifest(tmp_path, content):
    path = save(tmp_path, 24)
    (path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json' is not the manifest"):
        load_checkpoint(path)
    assert newest_complete(tmp_path) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "cannot be written as JSON"),
        (object(), "cannot be written as JSON"),
        ((1, 2), "would be changed by JSON; use lists, not tuples, and string keys"),
        ({1: 2}, "would be changed by JSON"),
    ],
)
def test_state_that_json_would_change_is_refused_before_anything_is_written(tmp_path, value, text):
    with pytest.raises(ValueError, match=rf"state\['rng'\] {text}"):
        save(tmp_path / "checkpoints", 1, state={"rng": value})
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_without_policy_or_tensors(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 0, tensors={}, write_policy=None))
    assert loaded.tensors == {}
    assert not loaded.policy.exists()


@pytest.mark.parametrize(
    "name", ["policy/model.safetensors.index.json", "moments.safetensors", "ema/config.json", "policy/deep/a"]
)
def test_an_added_file_is_found(tmp_path, name):
    """It could be read in place of a saved one: an index of shards comes before the file of the weights."""
    path = save(tmp_path, 24)
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("{}")
    (path / ".DS_Store").write_text("of a file browser")
    with pytest.raises(
        ValueError, match=r"was added after the checkpoint was saved.* move it elsewhere"
    ) as caught:
        load_checkpoint(path)
    assert str(path / name) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "policy/../../outside", "link", "x" * 300, ""]
)
def test_a_manifest_that_leads_out_of_the_checkpoint(tmp_path, name):
    path = save(tmp_path, 24)
    (tmp_path / "outside").write_text("a secret")
    (path / "link").symlink_to(tmp_path / "outside")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 8, "sha256": "0" * 64}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"manifest\.json.*(expected a name inside of|is a symbolic link to)"
    ):
        load_checkpoint(path)
    assert newest_complete(tmp_path) is None


def test_weights_of_a_checkpoint_are_verified_wherever_they_are_named(tmp_path, capsys):
    """As the policy that a new run or a sample begins with, the average, or a file in one of them."""
    from vpo_engine import sample
    from vpo_engine.runs.checkpoint import verify_if_of_checkpoint

    path = save(tmp_path / "checkpoints", 24, write_average=write_policy)
    for given in (path / "policy", path / "ema", path / "policy" / "model.safetensors", tmp_path):
        verify_if_of_checkpoint(given)
    file = path / "policy" / "model.safetensors"
    file.write_bytes(b"weighty")
    for given in (path / "policy", path / "ema", file):
        with pytest.raises(ValueError, match="was altered after it was saved"):
            verify_if_of_checkpoint(given)
    assert sample.main([f"model.policy={path / 'policy'}", "--prompt", "a red circle"]) == 1
    error = capsys.readouterr().err
    assert f"'{file}' was altered after it was saved: its SHA-256 is" in error
    assert "There is no earlier complete checkpoint" in error
