"""From a DeepSpeed configuration to ours: what its keys become, and what has no counterpart.

`migrated` reads the parsed JSON and writes nothing. Settings come out under the names of the constructors that take
them: as a LightningCLI configuration (`trainer`, with the strategy by its class path, and `optimizer`), or as keyword
arguments of MiCSAccelerator. Each key of DeepSpeed's is told of once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from mics_tools.deepspeed_keys import counterpart

Settings = dict[str, Any]


class Target(StrEnum):
    """Whose configuration is written."""

    LIGHTNING = "lightning"
    ACCELERATE = "accelerate"


class Fate(StrEnum):
    """What has become of a key."""

    WRITTEN = "written"
    BY_ITSELF = "needs nothing"
    WITHOUT = "has no counterpart"


@dataclass(frozen=True)
class Told:
    """One key of DeepSpeed's.

    Attributes:
        key: dotted.
        fate: what has become of it.
        text: the setting that it became, why it needs none, or what to do.
    """

    key: str
    fate: Fate
    text: str


@dataclass(frozen=True)
class Migration:
    """What was made of a configuration.

    Attributes:
        settings: nested, of plain values, in the order in which to write them.
        told: each of DeepSpeed's keys, in its order.
    """

    settings: Settings
    told: tuple[Told, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The configuration in a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON object, or has a key twice.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(pairs, path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: no JSON, {error.msg}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text; give DeepSpeed's JSON configuration") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object; give DeepSpeed's JSON configuration")
    return config


def _once(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{path}: {', '.join(twice)} is there twice; DeepSpeed refuses that as well")
    return dict(pairs)


def migrated(config: Mapping[str, Any], to: Target = Target.LIGHTNING, ranks: int | None = None) -> Migration:
    """What becomes of a DeepSpeed configuration.

    Args:
        config: the parsed JSON.
        to: whose configuration to write.
        ranks: of the run, where the window is to follow from `train_batch_size`, as DeepSpeed has it.

    Raises:
        ValueError: for a value that DeepSpeed does not allow.
    """
    draft = _Draft(config, to)
    for step in (
        _partition,
        _offloading,
        _precision,
        _clipping,
        _checkpointing,
        _compiling,
        _reduce_dtype,
        _printing,
        _optimizer,
    ):
        step(draft)
    _window(draft, ranks)
    _scheduler(draft)
    draft.tell_the_rest()
    return Migration(draft.settings(), tuple(draft.in_order()))


def to_yaml(migration: Migration, source: str) -> str:
    """The settings as YAML, with a line that says whence."""
    import yaml

    return f"# From {source}, by mics migrate.\n{yaml.safe_dump(migration.settings, sort_keys=False)}"


@dataclass
class _Draft:
    """A migration under way."""

    config: Mapping[str, Any]
    to: Target
    strategy: Settings = field(default_factory=dict)
    trainer: Settings = field(default_factory=dict)
    optimizer: Settings = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)

    def get(self, key: str, kind: type | tuple[type, ...], wanted: str, default: Any = None) -> Any:
        """The value of a dotted key, checked; `default` where there is none, or "auto"."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        if value == "auto":
            self.tell(key, Fate.WITHOUT, '"auto" is filled in by transformers\' Trainer; set the number itself')
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{key}={value!r} must be {wanted}")
        return value

    def enabled(self, section: str) -> bool:
        """Whether a section is there, and not switched off."""
        return bool(self.get(f"{section}.enabled", bool, "true or false", False))

    def write(self, key: str, into: Settings, name: str, value: Any) -> None:
        """Let `key` become a setting."""
        into[name] = value
        self.tell(key, Fate.WRITTEN, f"{name}: {json.dumps(value)}")

    def tell(self, key: str, fate: Fate, text: str) -> None:
        self.told.setdefault(key, Told(key, fate, text))

    def tell_the_rest(self) -> None:
        for key, value in _leaves(self.config):
            if key in self.told or _is_off(self.config, key, value):
                continue
            found = counterpart(key)
            if found is None:
                self.tell(
                    key, Fate.WITHOUT, "not known here; look for it among the Trainer's and MiCSStrategy's arguments"
                )
            else:
                self.tell(key, Fate.BY_ITSELF if found[0] else Fate.WITHOUT, found[1])

    def in_order(self) -> Iterator[Told]:
        order = {key: index for index, (key, _) in enumerate(_leaves(self.config))}
        sections = list(self.config)
        yield from sorted(
            self.told.values(), key=lambda told: (sections.index(told.key.split(".")[0]), order.get(told.key, -1))
        )

    def settings(self) -> Settings:
        if self.to is Target.ACCELERATE:
            return self.strategy | self.trainer
        strategy = {"class_path": "lightning_mics.MiCSStrategy", "init_args": self.strategy}
        return {"trainer": {"strategy": strategy, **self.trainer}} | (
            {"optimizer": self.optimizer} if self.optimizer else {}
        )


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_off(config: Mapping[str, Any], key: str, value: Any) -> bool:
    """Whether `key` asks for nothing: a thing that is false, none or empty, or in a section that is switched off."""
    if value in (None, False, "none", {}, []) or (key == "zero_optimization.mics_shard_size" and value == -1):
        return True
    section: Any = config
    for part in key.split(".")[:-1]:
        section = section[part]
        if section.get("enabled", True) is False or section.get("device") == "none":
            return True
    return False


# -- what becomes a setting --------------------------------------------------------------------------------------------

_ZERO = "zero_optimization"
_NUMBER, _SIZE = (int, float), "a positive whole number"


def _partition(draft: _Draft) -> None:
    stage = _stage(draft)
    size = draft.get(f"{_ZERO}.mics_shard_size", int, "a positive whole number, or -1", -1)
    secondary = draft.get(f"{_ZERO}.zero_hpz_partition_size", int, _SIZE, 1)
    if size != -1 and size < 1:
        raise ValueError(f"{_ZERO}.mics_shard_size={size} must be a positive whole number, or -1 for none")
    if size != -1 and stage != 3:
        raise ValueError(f"{_ZERO}.mics_shard_size={size} is for stage 3, and the stage is {stage}; set one of the two")
    key = f"{_ZERO}.stage" if isinstance(draft.config.get(_ZERO), Mapping) else _ZERO
    if size != -1:
        draft.write(f"{_ZERO}.mics_shard_size", draft.strategy, "partition_size", size)
        draft.tell(key, Fate.BY_ITSELF, "parameters, gradients and optimizer are sharded in partition groups")
    elif secondary > 1:
        draft.write(f"{_ZERO}.zero_hpz_partition_size", draft.strategy, "partition_size", secondary)
        draft.write(key, draft.strategy, "optimizer_state", "world")
    elif stage == 3:
        draft.strategy["partition_size"] = None
        advice = 'partition_size: null, all ranks; "node" is faster where a node holds a replica'
        draft.tell(key, Fate.WRITTEN, advice)
    else:
        draft.strategy["partition_size"] = 1
        if stage:
            draft.strategy["optimizer_state"] = "world"
        state = ", optimizer_state: world" if stage else ""
        also = "; a larger partition_size shards gradients as well" if stage == 2 else ""
        draft.tell(key, Fate.WRITTEN, f"partition_size: 1{state}{also}")
    if _ZERO not in draft.config:
        draft.told.pop(key)


def _offloading(draft: _Draft) -> None:
    for section, what in (("offload_param", "parameters"), ("offload_optimizer", "optimizer")):
        key = f"{_ZERO}.{section}"
        if draft.get(f"{key}.device", str, '"cpu", "nvme" or "none"') != "cpu":
            continue
        if "offload" in draft.strategy:
            draft.tell(f"{key}.device", Fate.BY_ITSELF, 'offload="parameters" has the optimizer on the host as well')
        elif why_not := _excludes_offload(draft):
            draft.tell(f"{key}.device", Fate.WITHOUT, why_not)
        else:
            draft.write(f"{key}.device", draft.strategy, "offload", what)
        draft.tell(f"{key}.pin_memory", Fate.BY_ITSELF, "what is copied between host and device is pinned")


def _excludes_offload(draft: _Draft) -> str | None:
    if draft.strategy.get("optimizer_state") == "world":
        return 'offload does not go with optimizer_state="world"; partition_size: null with offload shards all'
    if draft.enabled("fp16"):
        return "offload does not go with a gradient scaler; train in bf16"
    return None


def _stage(draft: _Draft) -> int:
    zero = draft.config.get(_ZERO, {})
    if isinstance(zero, bool):  # as DeepSpeed once had it
        return int(zero)
    if not isinstance(zero, Mapping):
        raise ValueError(f"{_ZERO}={zero!r} must be an object with a stage")
    stage = draft.get(f"{_ZERO}.stage", int, "0, 1, 2 or 3", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{_ZERO}.stage={stage} must be 0, 1, 2 or 3")
    return int(stage)


def _precision(draft: _Draft) -> None:
    on = {key: bits for key, bits in _SECTIONS.items() if draft.enabled(key)}
    if draft.enabled("torch_autocast"):
        key = "torch_autocast.dtype"
        on["torch_autocast"] = _dtype(key, draft.get(key, str, "a dtype", "bf16"))
        draft.tell(key, Fate.WRITTEN, "with torch_autocast.enabled")
    if len({*on.values()} - {"fp32"}) > 1:
        raise ValueError(f"{' and '.join(on)} are enabled together; DeepSpeed allows one, choose it")
    for key, bits in on.items():
        if bits == "fp32":
            draft.tell(f"{key}.enabled", Fate.BY_ITSELF, "fp32 is what there is without")
            continue
        name, value = ("precision", _LIGHTNINGS[bits]) if draft.to is Target.LIGHTNING else ("mixed_precision", bits)
        draft.write(f"{key}.enabled", draft.trainer, name, value)


_SECTIONS = {"fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}
_LIGHTNINGS = {"fp16": "16-mixed", "bf16": "bf16-mixed"}
_DTYPES = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "fp32"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16", "bfp16", "torch.bfloat16"), "bf16"),
}
_TORCHS = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}


def _dtype(key: str, value: str) -> str:
    if value.lower() not in _DTYPES:
        raise ValueError(f"{key}={value!r} must be fp32, fp16 or bf16")
    return _DTYPES[value.lower()]


def _window(draft: _Draft, ranks: int | None) -> None:
    """The window, from any two of the three sizes that DeepSpeed takes."""
    total, micro, window = (
        _positive(draft, key)
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    key = "gradient_accumulation_steps"
    if window is None and total is not None and micro is not None and ranks is not None:
        key = "train_batch_size"
        window, left = divmod(total, micro * ranks)
        if left or not window:
            raise ValueError(
                f"train_batch_size={total} is no multiple of train_micro_batch_size_per_gpu={micro} times {ranks} ranks"
            )
    elif None not in (total, micro, window, ranks) and total != micro * window * ranks:  # type: ignore[operator]
        raise ValueError(
            f"train_batch_size={total} is not train_micro_batch_size_per_gpu={micro} times "
            f"gradient_accumulation_steps={window} times {ranks} ranks"
        )
    if window is not None:
        name = "accumulate_grad_batches" if draft.to is Target.LIGHTNING else "gradient_accumulation_steps"
        draft.write(key, draft.trainer, name, window)
    elif total is not None and micro is not None:
        draft.tell(
            "train_batch_size",
            Fate.WITHOUT,
            f"the window is {total} / ({micro} x ranks): tell it by --ranks, or set it",
        )
    if micro is not None:
        draft.tell("train_micro_batch_size_per_gpu", Fate.WITHOUT, f"DataLoader(batch_size={micro})")


def _positive(draft: _Draft, key: str) -> int | None:
    value: int | None = draft.get(key, int, _SIZE)
    if value is not None and value < 1:
        raise ValueError(f"{key}={value} must be {_SIZE}")
    return value


def _clipping(draft: _Draft) -> None:
    key = "gradient_clipping"
    norm = draft.get(key, _NUMBER, "a number", 0)
    if norm < 0:
        raise ValueError(f"{key}={norm} must be a norm, or 0 for none")
    if not norm:
        return
    if draft.to is Target.LIGHTNING:
        draft.write(key, draft.trainer, "gradient_clip_val", norm)
    else:
        draft.tell(key, Fate.WITHOUT, f"accelerator.clip_grad_norm_(model.parameters(), {norm}) before the step")


def _checkpointing(draft: _Draft) -> None:
    """DeepSpeed's section is about how; that it is there says that it is done."""
    section = draft.config.get("activation_checkpointing")
    if isinstance(section, Mapping):
        draft.write("activation_checkpointing", draft.strategy, "activation_checkpointing", True)


def _compiling(draft: _Draft) -> None:
    if not draft.enabled("compile"):
        return
    backend = draft.get("compile.backend", str, "the name of a backend")
    arguments = {"backend": backend} if backend else {}
    draft.write("compile.enabled", draft.strategy, "compile", arguments or True)
    if backend:
        draft.tell("compile.backend", Fate.WRITTEN, f"compile: {json.dumps(arguments)}")


def _reduce_dtype(draft: _Draft) -> None:
    for key in ("communication_data_type", "data_types.grad_accum_dtype"):
        value = draft.get(key, (str, type(None)), "fp32, fp16 or bf16")
        if value is None or value == "none":
            continue
        if (dtype := _dtype(key, value)) == "fp32":
            draft.tell(key, Fate.BY_ITSELF, "gradients travel and are summed in fp32")
        elif draft.to is Target.LIGHTNING:
            draft.write(key, draft.strategy, "reduce_dtype", _TORCHS[dtype])
        else:
            draft.tell(key, Fate.WITHOUT, f"reduce_dtype={_TORCHS[dtype]}, in Python: a dtype has no YAML")


def _printing(draft: _Draft) -> None:
    key = "steps_per_print"
    steps = draft.get(key, _NUMBER, "a number")
    if steps is None:
        return
    if draft.to is Target.LIGHTNING and 1 <= steps < 1e6:  # beyond, it means never
        draft.write(key, draft.trainer, "log_every_n_steps", int(steps))
    else:
        draft.tell(key, Fate.BY_ITSELF, "nothing is printed that you do not log")


# -- optimizer and schedule --------------------------------------------------------------------------------------------

_OPTIMIZERS = {
    "adam": "torch.optim.AdamW",  # as DeepSpeed means it, unless adam_w_mode is false
    "adamw": "torch.optim.AdamW",
    "adagrad": "torch.optim.Adagrad",
    "sgd": "torch.optim.SGD",
}
_TORCH_TAKES = ("lr", "betas", "eps", "weight_decay", "momentum", "nesterov", "dampening", "amsgrad", "fused")


def _optimizer(draft: _Draft) -> None:
    section = draft.config.get("optimizer")
    if section is None:
        return
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise ValueError(f'optimizer={section!r} must be an object with a "type" and "params"')
    name, params = section["type"], section.get("params") or {}
    path = _OPTIMIZERS.get(name.lower())
    if name.lower() == "adam" and params.get("adam_w_mode") is False:
        path = "torch.optim.Adam"
    if path is None:
        draft.tell("optimizer.type", Fate.WITHOUT, f"return {name}, or what is like it, from configure_optimizers")
        for param in params:
            draft.tell(f"optimizer.params.{param}", Fate.WITHOUT, "an argument of that optimizer")
        return
    taken = {k: v for k, v in params.items() if k in _TORCH_TAKES and v != "auto"}
    call = f"{path}(params, {', '.join(f'{k}={v}' for k, v in taken.items())})"
    if draft.to is Target.LIGHTNING:
        draft.optimizer.update(class_path=path, init_args=taken)
    for key in ("type", *(f"params.{k}" for k in taken)):
        lightnings = f"optimizer: {path}" if key == "type" else f"optimizer: {key[7:]}"
        fate = Fate.WRITTEN if draft.to is Target.LIGHTNING else Fate.WITHOUT
        draft.tell(f"optimizer.{key}", fate, lightnings if fate is Fate.WRITTEN else f"in your script: {call}")
    for param, value in params.items():
        if value == "auto":
            draft.get(f"optimizer.params.{param}", object, "")
        elif param in ("adam_w_mode", "torch_adam"):
            draft.tell(f"optimizer.params.{param}", Fate.BY_ITSELF, f"{path} it is")
        else:
            draft.tell(f"optimizer.params.{param}", Fate.WITHOUT, f"{path} does not take it; leave it out")


_SCHEDULES = {
    "WarmupLR": "LinearLR(optimizer, start_factor=warmup_min_lr / warmup_max_lr, total_iters=warmup_num_steps)",
    "WarmupDecayLR": "SequentialLR of LinearLR up and LinearLR down to 0",
    "WarmupCosineLR": "SequentialLR of LinearLR and CosineAnnealingLR",
    "OneCycle": "OneCycleLR",
    "LRRangeTest": "the callback LearningRateFinder, or Tuner.lr_find",
}


def _scheduler(draft: _Draft) -> None:
    section = draft.config.get("scheduler")
    if not isinstance(section, Mapping):
        return
    name = str(section.get("type"))
    of_torch = _SCHEDULES.get(name, "a scheduler of torch.optim.lr_scheduler")
    how = 'with {"interval": "step"} from configure_optimizers' if draft.to is Target.LIGHTNING else "and prepare it"
    draft.tell("scheduler.type", Fate.WITHOUT, f"{name}: {of_torch}, {how}")
    for param in section.get("params") or {}:
        draft.tell(f"scheduler.params.{param}", Fate.WITHOUT, "an argument of that schedule")
