"""Mistakes in what is kept: the reference, the state of a run, checkpoints, the ledger, the prompts' order."""

from mutations.tests_of import DISK, FAULTS, REPLAY, RESUME

STORE = "vpo_engine/reference/store.py"
WEIGHTS = "vpo_engine/reference/weights.py"
EXACT = "vpo_engine/reference/exact.py"
MIRROR = "vpo_engine/reference/mirror.py"
STATE = "vpo_engine/run_state.py"
CHECKPOINT = "vpo_engine/runs/checkpoint.py"
LOG = "vpo_engine/runs/log.py"
LEDGER = "vpo_engine/data/ledger.py"
STORED = "vpo_engine/rollout/stored.py"
PROMPTS = "vpo_engine/data/prompts.py"
READING = ("tests/data_layer/test_ledger.py", *REPLAY)

MUTATIONS = [
    ("refresh leaves what is copied", STORE, "tensor.copy_(source[name])", "pass", REPLAY),
    ("refresh leaves what is encoded", STORE, "for weight in self._held.values(): weight.refresh()", "pass", REPLAY),
    ("a rounded matrix is not refreshed", WEIGHTS, "def refresh(self) -> None: self._weight.copy_(self._policy)", "def refresh(self) -> None:\n        pass", REPLAY),
    ("an exact matrix is not refreshed", EXACT, "self._held = _nothing_moved(self.policy, held.difference if isinstance(held, OrderedDelta) else None)", "pass", FAULTS),
    ("an exact matrix forgets how far the policy went", EXACT, "self._held = delta if fits else reference", "self._held = _nothing_moved(self.policy)", FAULTS),
    ("encoded matrices not restored", STORE, "self._held[name].load(found_parts)", "pass", RESUME),
    ("copied tensors not restored", STORE, 'self._copied[name].copy_(found_parts[""])', "pass", RESUME),
    (
        "a reference without its adapter",
        MIRROR,
        "return self.network(*args, **kwargs)",
        "[m.enable_adapters(False) for m in self.network.modules() if hasattr(m, 'enable_adapters')]\n            return self.network(*args, **kwargs)",
        ("tests/test_lora.py",),
    ),
    ("the last refresh forgotten", STATE, 'algorithm.refreshed_at = state["refreshed_at"]', "algorithm.refreshed_at = 0", RESUME),
    ("the last refresh left as it was", STATE, 'algorithm.refreshed_at = state["refreshed_at"]', "pass", RESUME),
    ("a resume counts as a refresh", STATE, 'algorithm.refreshed_at = state["refreshed_at"]', 'algorithm.refreshed_at = state["optimizer_steps"]', RESUME),
    ("the reference made anew at a resume", STATE, 'algorithm.reference.load_state_dict(dict(tensors["reference"]))', "algorithm.reference.refresh(network)", RESUME),
    ("the optimizer made anew at a resume", STATE, 'algorithm.optimizer.load_state_dict(dict(tensors["optimizer"]))', "pass", RESUME),
    ("the policy made anew at a resume", STATE, "network.load_state_dict(weights, strict=True)", "pass", RESUME),
    ("the policy saved as the reference", STATE, '"reference": algorithm.reference.state_dict()', '"reference": algorithm.model.network.state_dict()', REPLAY),
    ("the baseline made anew at a resume", STATE, 'return state["step"], dict(tensors["baseline"])', 'return state["step"], {name: value * 0 for name, value in tensors["baseline"].items()}', RESUME),
    ("the prompt cursor one step on", STATE, "step * config.pairs_per_step", "(step + 1) * config.pairs_per_step", REPLAY),
    ("other settings resumed", STATE, "if different:", "if False:", FAULTS),
    ("files not synced", CHECKPOINT, "path.chmod(mode) _sync(path)", "path.chmod(mode)", DISK),
    ("the manifest not synced", CHECKPOINT, "_sync(manifest)", "pass", DISK),
    ("folders not synced", CHECKPOINT, 'for folder in [root, *(item for item in root.rglob("*") if item.is_dir())]:', "for folder in [root]:", DISK),
    ("the checkpoint's own folder not synced", CHECKPOINT, 'for folder in [root, *(item for item in root.rglob("*") if item.is_dir())]:', 'for folder in [item for item in root.rglob("*") if item.is_dir()]:', DISK),
    ("the rename not synced", CHECKPOINT, "unfinished.rename(final) _sync(final.parent)", "unfinished.rename(final)", DISK),
    ("synced before the rename", CHECKPOINT, "unfinished.rename(final) _sync(final.parent)", "_sync(final.parent)\n    unfinished.rename(final)", DISK),
    ("renamed before the manifest", CHECKPOINT, "_write_manifest(unfinished, step) _put_in_place(unfinished, final)", "_put_in_place(unfinished, final)\n        _write_manifest(final, step)", DISK),
    (
        "the manifest written first",
        CHECKPOINT,
        "mode = (root / _STATE).stat().st_mode",
        "(root / _MANIFEST).touch()\n    mode = (root / _STATE).stat().st_mode",
        DISK,
    ),
    ("checksums not compared", CHECKPOINT, 'if actual != entry["sha256"]:', "if False:", DISK),
    ("sizes not compared", CHECKPOINT, 'if actual != entry["bytes"]:', "if False:", DISK),
    ("incomplete ones count as the newest", CHECKPOINT, "_check_sizes(path, _read_manifest(path)) except", "path.stat()\n        except", DISK),
    ("the oldest taken for the newest", CHECKPOINT, "sorted(_saved(folder).items(), reverse=True)", "sorted(_saved(folder).items())", DISK),
    ("the damaged one offered as a remedy", CHECKPOINT, "step >= before", "step > before", DISK),
    ("the oldest kept", CHECKPOINT, "for s in sorted(saved, reverse=True)", "for s in sorted(saved)", DISK),
    ("one too many kept", CHECKPOINT, "complete[:keep]", "complete[: keep + 1]", DISK),
    ("one too few kept", CHECKPOINT, "complete[:keep]", "complete[: keep - 1]", DISK),
    ("an abandoned future kept", CHECKPOINT, "if s <= step and", "if", DISK),
    ("incomplete ones count as kept", CHECKPOINT, "if s <= step and (saved[s] / _MANIFEST).is_file()]", "if s <= step]", DISK),
    ("older ones deleted first", CHECKPOINT, "_settle_interrupted(folder) final = folder", "_settle_interrupted(folder)\n    _delete_superseded(folder, step, keep)\n    final = folder", DISK),
    ("folders deleted with their manifest", CHECKPOINT, "(path / _MANIFEST).unlink(missing_ok=True)", "pass", DISK),
    ("the one to be replaced deleted first", CHECKPOINT, "final.rename(replaced)", "shutil.rmtree(final)", DISK),
    ("an interrupted replacement not brought back", CHECKPOINT, "if not final.exists(): path.rename(final)", "if not final.exists():\n            pass", DISK),
    ("a failed save left behind", CHECKPOINT, "shutil.rmtree(unfinished, ignore_errors=True)", "pass", DISK),
    ("a cut log not synced", LOG, "os.fsync(file.fileno()) replacement.replace", "pass\n        replacement.replace", DISK),
    ("a cut ledger not synced", LEDGER, "os.fsync(file.fileno())", "pass", DISK),
    ("the ledger's winners and losers exchanged", LEDGER, '{"winner": winner, "loser": loser}', '{"winner": loser, "loser": winner}', REPLAY),
    ("the ledger read exchanged", LEDGER, 'for name in ("winner", "loser"))', 'for name in ("loser", "winner"))', REPLAY),
    ("the ledger's first latents for all", LEDGER, "file.get_slice(name)[self.row]", "file.get_slice(name)[0]", REPLAY),
    ("the ledger in the order of its files", LEDGER, "key=lambda pair: (pair.step, pair.position)", "key=lambda pair: 0", READING),
    ("the ledger in the order of positions alone, reversed", LEDGER, "(pair.step, pair.position)", "(pair.step, -pair.position)", READING),
    ("the step of the checkpoint cut, too", LEDGER, 'values["step"] <= step', 'values["step"] < step', RESUME),
    ("latents of the checkpoint's step cut, too", LEDGER, '[1]) > step', '[1]) >= step', RESUME),
    ("lines before their latents", LEDGER, "unfinished) unfinished.replace(path)", "unfinished)\n            _pairs_file(self._folder, self._rank).touch()\n            unfinished.replace(path)", DISK),
    ("places of prompts in the file of latents", STORED, "row=place.get(row)", "row=row if row in place else None", REPLAY),
    (
        "stored latents exchanged",
        STORED,
        "(pool.pick(kept, pairs.winner[kept]), pool.pick(kept, pairs.loser[kept])) if place",
        "(pool.pick(kept, pairs.loser[kept]), pool.pick(kept, pairs.winner[kept])) if place",
        REPLAY,
    ),
    ("places in place of candidate numbers", STORED, "numbers[int(pairs.winner[row])]", "int(pairs.winner[row])", REPLAY),
    ("selected scores without their weights", STORED, "combine(scores, reward.dimensions, reward.normalise)", "combine(scores, reward.dimensions)", REPLAY),
    ("stored weights of ones", STORED, "weight=float(weights[row])", "weight=1.0", REPLAY),
    ("stored pairs one place on", STORED, "lines = [self._pairs[position % len(self)] for", "lines = [self._pairs[(position + 1) % len(self)] for", REPLAY),
    ("stored pairs exchanged", STORED, "Pairs(first, first + 1, gap, kept)", "Pairs(first + 1, first, gap, kept)", REPLAY),
    ("stored latents of the first pairs", STORED, "index_copy(0, kept.nonzero().squeeze(1), members)", "index_copy(0, torch.arange(len(members)), members)", REPLAY),
    ("stored ties trained on", STORED, "return pair.kept and pair.gap > self._min_gap", "return pair.row is not None", ("tests/data_layer/test_ledger.py", "tests/test_pair_policy.py")),
    ("every epoch in the same order", PROMPTS, "repr((self._seed, epoch))", "repr((self._seed, 0))", ("tests/data_layer/test_prompts.py",)),
    ("the prompt after the one asked for", PROMPTS, "range(cursor, cursor + count): epoch", "range(cursor + 1, cursor + count + 1):\n            epoch", ("tests/data_layer/test_prompts.py",)),
]
