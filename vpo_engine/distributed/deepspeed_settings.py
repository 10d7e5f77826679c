"""DeepSpeed's settings: those of a user's JSON file, "auto" filled in, checked against the run's own settings.

Nothing heavy is imported here, so that a run can refuse a JSON file before torch is loaded.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpo_engine.config import Config
from vpo_engine.config.errors import nearest
from vpo_engine.texts import read_json

Settings = dict[str, Any]

_AUTO = "auto"
_BUCKET = 2**25
"""Elements that are reduced or gathered at once: 128 MiB in float32. DeepSpeed's own default is 2 GB."""
INSTALL = 'pip install "vpo-engine[deepspeed]"'

_PASSED = (
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
)
"""Settings that DeepSpeed gets as they are."""
_PASSED_ZERO = (
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "log_trace_cache_warnings",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size",
)
_REFUSED = {
    "scheduler": "the learning rate follows optimizer.lr, optimizer.warmup_steps and optimizer.final_lr",
    "amp": "the type of weights is set by memory.weights, that of the arithmetic by model.dtype",
    "torch_autocast": "the type of weights is set by memory.weights, that of the arithmetic by model.dtype",
    "activation_checkpointing": "activations are kept or computed again as memory.activation_checkpointing says",
    "tensorboard": "log files are written by the run itself; see the settings of log",
    "wandb": "log files are written by the run itself; see the settings of log",
    "csv_monitor": "log files are written by the run itself; see the settings of log",
    "checkpoint": "checkpoints are the same files for all engines; see the settings of checkpoint",
    "elasticity": "a run is resumed with any number of processes; give the new number to torchrun",
    "flops_profiler": "operations are counted by the run itself, in the log as speed/...",
    "prescale_gradients": "gradients are averaged in float32",
    "gradient_predivide_factor": "gradients are averaged in float32",
    "zero_optimization.offload_param": "weights stay on the device; distributed.offload_optimizer=true sends the "
    "larger part, the optimizer's state, to the host",
    "zero_optimization.cpu_offload": "its name is offload_optimizer now; set distributed.offload_optimizer",
    "zero_optimization.zero_quantized_weights": "rounded weights would change the margins, which compare nearly equal "
    "numbers",
    "zero_optimization.zero_quantized_gradients": "rounded gradients would change what is trained",
    "zero_optimization.zero_quantized_nontrainable_weights": "frozen weights stay whole in every process",
    "zero_optimization.gather_16bit_weights_on_model_save": "checkpoints hold the whole policy in any case",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "checkpoints hold the whole policy in any case",
}
"""Settings of DeepSpeed that have no place here, each with the reason."""


def check_deepspeed(config: Config, processes: int = 1) -> None:
    """Refuse, before torch is loaded, what ``resolve`` would, and a missing DeepSpeed. Raise ValueError."""
    if config.distributed.engine != "deepspeed":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"distributed.engine=deepspeed needs DeepSpeed, which is not installed; {INSTALL}, or set "
            "distributed.engine=data_parallel"
        )
    resolve(config, processes)


def resolve(config: Config, processes: int, half: bool | None = None) -> Settings:
    """Return the settings that DeepSpeed gets for a run of ``processes`` processes.

    half: whether the trained weights are bfloat16 ones with float32 masters; None: as far as the configuration tells.
    Raise ValueError for a JSON file that cannot be read, for unknown settings in it, for settings that contradict the
    run's, and for settings of the run that DeepSpeed or the stage excludes.
    """
    given, where = _read(config.distributed.deepspeed_config)
    if half is None:
        masters = config.memory.weights == "fp32_master" and config.model.lora is None
        half = masters and config.model.dtype == "bfloat16"
    known = _known(config, processes, half)
    stage = _stage(config, given, where)
    known["zero_optimization"] = _zero(config, given, where, stage)
    _check_stage(config, stage, half)
    result: Settings = {}
    for name, value in given.items():
        if name in ("zero_optimization", "optimizer"):
            continue
        _refuse_unknown(name, (*_PASSED, *known, "optimizer"), where)
        if name in known:
            _compare(name, value, known[name], where, said_by=_SOURCES.get(name))
        elif value != _AUTO:
            result[name] = value
    _check_optimizer(config, given.get("optimizer", {}), where)
    return {"steps_per_print": None, **result, **known}


_SOURCES = {
    "gradient_clipping": "optimizer.clip (null means 0)",
    "bf16": "memory.weights",
    "fp16": "memory.weights, which has no float16",
    "train_batch_size": "pairs_per_step",
    "train_micro_batch_size_per_gpu": "pairs_per_step and the number of processes",
    "gradient_accumulation_steps": "the engine, which accumulates gradients itself: set objective.micro_batch_size",
    "managed_gradient_accumulation": "the engine, which makes one optimizer step after any number of backward passes",
    "data_types": "the engine, which adds up gradients in float32",
    "zero_allow_untested_optimizer": "the engine, which gives DeepSpeed its own AdamW",
    "zero_force_ds_cpu_optimizer": "the engine, which gives DeepSpeed its own AdamW",
}
"""Who says the value of a setting of DeepSpeed."""


def _known(config: Config, processes: int, half: bool) -> Settings:
    """Return DeepSpeed's settings outside of ZeRO that the run's settings determine."""
    team = config.processes.per_prompt * config.distributed.sequence_parallel
    each = max(1, config.pairs_per_step * team // processes)
    return {
        "train_batch_size": each * processes,
        "train_micro_batch_size_per_gpu": each,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.clip or 0.0,
        "bf16": {"enabled": half, "check_grad_overflow": True} if half else {"enabled": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _stage(config: Config, given: Settings, where: str) -> int:
    own, theirs = (
        config.distributed.zero_stage,
        _section(given, "zero_optimization", where).get("stage", _AUTO),
    )
    if theirs == _AUTO:
        return 2 if own is None else own
    if theirs not in (0, 1, 2, 3) or isinstance(theirs, bool):
        raise ValueError(f'{where}: zero_optimization.stage={theirs!r} must be 0, 1, 2, 3 or "auto"')
    if own is not None:
        _compare("zero_optimization.stage", theirs, own, where, said_by="distributed.zero_stage")
    return int(theirs)


def _zero(config: Config, given: Settings, where: str, stage: int) -> Settings:
    section = dict(_section(given, "zero_optimization", where))
    offloads = _offloads(config, section, where)
    if offloads and stage == 0:
        raise ValueError(
            "distributed.offload_optimizer=true needs a ZeRO stage from 1 on, but the stage is 0, which leaves the "
            "optimizer's state where it is; set distributed.zero_stage=1"
        )
    own: Settings = {"stage": stage, "reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}
    overlap = section.pop("overlap_comm", _AUTO)
    if overlap != _AUTO and not isinstance(overlap, bool):
        raise ValueError(f'{where}: zero_optimization.overlap_comm={overlap!r} must be true, false or "auto"')
    own["overlap_comm"] = overlap is True
    if overlap is True and stage != 2:
        raise ValueError(
            f"{where}: zero_optimization.overlap_comm=true goes with stage 2 only, where several backward passes lead "
            f'to one step, but the stage is {stage}; write false or "auto"'
        )
    if stage in (1, 2):
        own["parameter_alignment"] = (
            True  # else the same products may round differently in policy and reference
        )
    if stage == 3:
        _compare(
            "zero_optimization.memory_efficient_linear",
            section.pop("memory_efficient_linear", _AUTO),
            False,
            where,
            said_by="the engine, whose policy and reference compute with the same operators",
        )
        own["memory_efficient_linear"] = False
    own["offload_optimizer"] = {"device": "cpu" if offloads else "none"}
    for name, value in section.items():
        if name in ("stage", "offload_optimizer"):
            continue
        _refuse_unknown(
            f"zero_optimization.{name}", [f"zero_optimization.{key}" for key in _zero_keys()], where
        )
        if value != _AUTO:
            own[name] = value
    if "pin_memory" in (details := section.get("offload_optimizer") or {}) and details["pin_memory"] != _AUTO:
        own["offload_optimizer"]["pin_memory"] = details["pin_memory"]
    return own


def offloads_optimizer(config: Config, processes: int) -> bool:
    """Return whether the optimizer's state stays on the host, by the settings or by DeepSpeed's JSON file."""
    if config.distributed.engine != "deepspeed":
        return False
    zero: Settings = resolve(config, processes)["zero_optimization"]
    return zero["offload_optimizer"]["device"] == "cpu"


def _zero_keys() -> tuple[str, ...]:
    return ("stage", "offload_optimizer", "overlap_comm", "memory_efficient_linear", *_PASSED_ZERO)


def _offloads(config: Config, section: Settings, where: str) -> bool:
    """Return whether the optimizer's state stays on the host."""
    own, details = config.distributed.offload_optimizer, section.get("offload_optimizer") or {}
    if not isinstance(details, dict):
        raise ValueError(f"{where}: zero_optimization.offload_optimizer={details!r} must be an object")
    for name in details:
        _refuse_unknown(
            f"zero_optimization.offload_optimizer.{name}",
            [f"zero_optimization.offload_optimizer.{key}" for key in ("device", "pin_memory")],
            where,
        )
    device = details.get("device", _AUTO)
    if device == _AUTO:
        return bool(own)
    if device not in ("cpu", "none"):
        raise ValueError(
            f'{where}: zero_optimization.offload_optimizer.device={device!r} must be "cpu", "none" or "auto": '
            "checkpoints read the optimizer's state from memory"
        )
    if own is not None:
        expected = "cpu" if own else "none"
        name = "zero_optimization.offload_optimizer.device"
        _compare(name, device, expected, where, said_by="distributed.offload_optimizer")
    return device == "cpu"


def _check_stage(config: Config, stage: int, half: bool) -> None:
    """Refuse settings of the run that exclude a stage of ZeRO."""
    memory, rollout = config.memory, config.rollout
    full_masters = memory.weights == "fp32_master" and config.model.lora is None
    if full_masters and not half:
        raise ValueError(
            "memory.weights=fp32_master with model.dtype=float32 holds bfloat16 values in float32 weights, of which "
            "DeepSpeed knows nothing; set model.dtype=bfloat16, or memory.weights=float32"
        )
    if half and stage == 0:
        raise ValueError(
            "ZeRO stage 0 adds up the gradients of bfloat16 weights in bfloat16, which loses small ones "
            "(memory.weights=fp32_master); set distributed.zero_stage=1, or distributed.engine=data_parallel, which "
            "divides as little as stage 0"
        )
    if stage < 3:
        return
    if config.reference.storage == "exact8":
        raise ValueError(
            "reference.storage=exact8 decodes the reference from the policy's weights, of which a process has a part "
            "only with ZeRO stage 3; set distributed.zero_stage=2, or reference.storage=bf16"
        )
    if rollout.compile != "none":
        raise ValueError(
            f"rollout.compile={rollout.compile} compiles for weights that stay in one place, but with ZeRO stage 3 "
            "they are gathered anew for every rollout; set distributed.zero_stage=2, or rollout.compile=none"
        )
    if (bits := rollout.first_pass.weights) != "policy":
        raise ValueError(
            f"a copy of the policy in {bits} for rollouts is made of its whole weights, of which a process has a part "
            "only with ZeRO stage 3; set distributed.zero_stage=2, or let the policy sample (rollout.weights and "
            "rollout.explore.weights)"
        )


def _check_optimizer(config: Config, section: Any, where: str) -> None:
    """Compare the JSON's optimizer, which the run makes itself, with the run's."""
    if section == _AUTO or section == {}:
        return
    if not isinstance(section, dict) or not isinstance(section.get("params", {}), dict):
        raise ValueError(f"{where}: optimizer={section!r} must be an object with type and params")
    for name in section:
        _refuse_unknown(f"optimizer.{name}", ("optimizer.type", "optimizer.params"), where)
    said = "the engine, whose optimizer is AdamW (memory.optimizer_bits=8 for 8-bit moments)"
    _compare("optimizer.type", section.get("type", _AUTO), "AdamW", where, said_by=said)
    own = config.optimizer
    values = {"lr": own.lr, "betas": list(own.betas), "eps": own.eps, "weight_decay": own.weight_decay}
    for name, value in section.get("params", {}).items():
        _refuse_unknown(f"optimizer.params.{name}", [f"optimizer.params.{key}" for key in values], where)
        _compare(f"optimizer.params.{name}", value, values[name], where, said_by=f"optimizer.{name}")


def _read(path: Path | None) -> tuple[Settings, str]:
    """Return a JSON file's settings, and how errors call the file."""
    if path is None:
        return {}, "distributed"
    where = f"distributed.deepspeed_config={path}"
    try:
        found = read_json(path, "JSON file")
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); correct the file") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds a {type(found).__name__}, expected an object of settings")
    return found, where


def _section(given: Settings, name: str, where: str) -> Settings:
    section = given.get(name, {})
    if section == _AUTO:
        return {}
    if not isinstance(section, dict):
        raise ValueError(f"{where}: {name}={section!r} must be an object")
    return section


def _refuse_unknown(name: str, known: Any, where: str) -> None:
    """Raise ValueError for a setting that DeepSpeed does not have, or that has no place here."""
    if (reason := _REFUSED.get(name)) is not None:
        raise ValueError(f"{where}: {name} has no place here: {reason}. Leave it out")
    if name not in known:
        raise ValueError(
            f"{where}: {name} is no setting of DeepSpeed that this engine passes on"
            f"{nearest(name, list(known)) or '; leave it out'}"
        )


def _compare(name: str, value: Any, own: Any, where: str, said_by: str | None = None) -> None:
    """Raise ValueError unless ``value`` is "auto", or says what the run's settings say: ``own``."""
    for key, theirs, ours in _leaves(name, value, own):
        if theirs != _AUTO and not _same(theirs, ours):
            by = f", which is said by {said_by}" if said_by else ""
            raise ValueError(
                f'{where}: {key}={json.dumps(theirs)}, but this run has {json.dumps(ours)}{by}; write "auto", or make '
                "them equal"
            )


def _leaves(name: str, value: Any, own: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(own, Mapping) and isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}", part, own.get(key))
    else:
        yield name, value, own


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    return bool(one == other)
