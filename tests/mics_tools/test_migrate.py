"""`mics migrate`: what DeepSpeed's keys become, that it is what our constructors take, and that no key is lost."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from mics_tools.cli import app
from mics_tools.deepspeed_keys import counterpart
from mics_tools.migrate import Fate, Migration, Target, migrated

# As DeepSpeed's own documents, and transformers', have them.
EVERYTHING: dict[str, Any] = {
    "train_batch_size": 512,
    "train_micro_batch_size_per_gpu": 8,
    "steps_per_print": 50,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "Adam", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": "auto", "fuse": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "initial_scale_power": 16},
    "zero_optimization": {
        "stage": 3,
        "mics_shard_size": 8,
        "mics_hierarchical_params_gather": True,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": True},
    "compile": {"enabled": True, "backend": "inductor"},
    "communication_data_type": "bf16",
    "tensorboard": {"enabled": True, "output_path": "logs"},
    "wandb": {"enabled": False, "project": "x"},
    "wall_clock_breakdown": False,
    "frobnicate": {"widely": 3},
}


def _keys(migration: Migration, fate: Fate) -> set[str]:
    return {told.key for told in migration.told if told.fate is fate}


def test_every_key_that_asks_for_something_is_told_of_once() -> None:
    migration = migrated(EVERYTHING, ranks=16)
    assert _keys(migration, Fate.WRITTEN) == {
        "train_batch_size",
        "steps_per_print",
        "gradient_clipping",
        "optimizer.type",
        "optimizer.params.lr",
        "optimizer.params.betas",
        "bf16.enabled",
        "zero_optimization.mics_shard_size",
        "zero_optimization.offload_optimizer.device",
        "activation_checkpointing",
        "compile.enabled",
        "compile.backend",
        "communication_data_type",
    }
    assert _keys(migration, Fate.BY_ITSELF) == {
        "zero_optimization.stage",
        "zero_optimization.mics_hierarchical_params_gather",
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    }
    assert _keys(migration, Fate.WITHOUT) == {
        "train_micro_batch_size_per_gpu",
        "optimizer.params.weight_decay",
        "optimizer.params.fuse",
        "scheduler.type",
        "scheduler.params.warmup_num_steps",
        "activation_checkpointing.cpu_checkpointing",
        "tensorboard.enabled",
        "tensorboard.output_path",
        "frobnicate.widely",
    }
    assert len({told.key for told in migration.told}) == len(migration.told)


def test_the_settings() -> None:
    assert migrated(EVERYTHING, ranks=16).settings == {
        "trainer": {
            "strategy": {
                "class_path": "lightning_mics.MiCSStrategy",
                "init_args": {
                    "partition_size": 8,
                    "offload": "optimizer",
                    "activation_checkpointing": True,
                    "compile": {"backend": "inductor"},
                    "reduce_dtype": "torch.bfloat16",
                },
            },
            "precision": "bf16-mixed",
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 50,
            "accumulate_grad_batches": 4,
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4, "betas": [0.9, 0.95]}},
    }
    assert migrated(EVERYTHING, Target.ACCELERATE, ranks=16).settings == {
        "partition_size": 8,
        "offload": "optimizer",
        "activation_checkpointing": True,
        "compile": {"backend": "inductor"},
        "mixed_precision": "bf16",
        "gradient_accumulation_steps": 4,
    }


@pytest.mark.parametrize(
    ("zero", "strategy"),
    [
        (None, {"partition_size": 1}),
        ({"stage": 0}, {"partition_size": 1}),
        ({"stage": 1}, {"partition_size": 1, "optimizer_state": "world"}),
        (True, {"partition_size": 1, "optimizer_state": "world"}),
        ({"stage": 2}, {"partition_size": 1, "optimizer_state": "world"}),
        ({"stage": 3}, {"partition_size": None}),
        ({"stage": 3, "mics_shard_size": -1}, {"partition_size": None}),
        ({"stage": 3, "mics_shard_size": 16}, {"partition_size": 16}),
        ({"stage": 3, "zero_hpz_partition_size": 8}, {"partition_size": 8, "optimizer_state": "world"}),
    ],
)
def test_who_shards_with_whom(zero: Any, strategy: dict[str, Any]) -> None:
    config = {} if zero is None else {"zero_optimization": zero}
    assert migrated(config, Target.ACCELERATE).settings == strategy


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ({"gradient_accumulation_steps": 4}, 4),
        ({"train_batch_size": 256, "train_micro_batch_size_per_gpu": 4}, 8),
        ({"train_batch_size": 256, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8}, 8),
        ({"train_micro_batch_size_per_gpu": 4}, None),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": "auto"}, None),
    ],
)
def test_the_window(sizes: dict[str, Any], window: int | None) -> None:
    migration = migrated(sizes, Target.ACCELERATE, ranks=8)
    assert migration.settings.get("gradient_accumulation_steps") == window
    assert {*sizes} <= {told.key for told in migration.told}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"zero_optimization": {"stage": 4}}, r"^zero_optimization\.stage=4 must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, r"^zero_optimization\.stage=True must be"),
        ({"zero_optimization": 3}, r"^zero_optimization=3 must be an object with a stage"),
        ({"zero_optimization": {"stage": 2, "mics_shard_size": 8}}, r"mics_shard_size=8 is for stage 3, and .* 2"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 0}}, r"mics_shard_size=0 must be a positive"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, r"^fp16 and bf16 are enabled together"),
        ({"bf16": {"enabled": "yes"}}, r"^bf16\.enabled='yes' must be true or false"),
        ({"gradient_accumulation_steps": 0}, r"^gradient_accumulation_steps=0 must be a positive"),
        ({"gradient_accumulation_steps": 2.5}, r"^gradient_accumulation_steps=2\.5 must be a positive"),
        ({"train_batch_size": 100, "train_micro_batch_size_per_gpu": 8}, r"=100 is no multiple of .*=8 times 16 ranks"),
        (
            {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4},
            r"=64 is not .*=8 times gradient_accumulation_steps=4 times 16 ranks",
        ),
        ({"gradient_clipping": -1}, r"^gradient_clipping=-1 must be a norm"),
        ({"communication_data_type": "fp8"}, r"^communication_data_type='fp8' must be fp32, fp16 or bf16"),
        ({"optimizer": "AdamW"}, r"^optimizer='AdamW' must be an object"),
    ],
)
def test_what_deepspeed_does_not_allow_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        migrated(config, ranks=16)


# -- as our constructors take it ---------------------------------------------------------------------------------------


def test_lightnings_command_line_takes_it(tmp_path: Path) -> None:
    import torch
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    from lightning_mics import MiCSStrategy

    out = tmp_path / "mics.yaml"
    assert _migrate(tmp_path, EVERYTHING, "--output", out, "--ranks", 16).exit_code == 0
    words = [
        "--config",
        str(out),
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "8",
        "--trainer.logger",
        "false",
    ]
    cli = LightningCLI(BoringModel, BoringDataModule, run=False, save_config_callback=None, args=words)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, MiCSStrategy)
    assert strategy.topology.partition_size == 8
    assert strategy._precision_of_shards.reduce_dtype is torch.bfloat16
    assert (cli.trainer.accumulate_grad_batches, cli.trainer.gradient_clip_val) == (4, 1.0)
    assert cli.trainer.precision == "bf16-mixed"


def test_accelerates_settings_are_arguments() -> None:
    from lightning_mics import MiCSStrategy

    names = {*inspect.signature(MiCSStrategy).parameters, "mixed_precision", "gradient_accumulation_steps"}
    assert {*migrated(EVERYTHING, Target.ACCELERATE, ranks=16).settings} <= names


# -- the command -------------------------------------------------------------------------------------------------------


def _mics(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})


def _migrate(folder: Path, config: Any, *options: object) -> Result:
    path = folder / "ds_config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return _mics("migrate", path, *options)


def test_it_writes_a_file_and_names_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "ours.yaml"
    result = _migrate(tmp_path, EVERYTHING, "--output", out, "--to", "accelerate", "--ranks", 16)
    assert result.exit_code == 0, result.stderr
    assert yaml.safe_load(out.read_text()) == migrated(EVERYTHING, Target.ACCELERATE, ranks=16).settings
    assert out.read_text().startswith("# From ds_config.json")
    written, rest = result.stdout.split("has no counterpart")
    assert "zero_optimization.mics_shard_size" in written and "partition_size: 8" in written
    assert "frobnicate.widely" in rest and "scheduler.type" in rest
    assert f"written to {out}" in rest
    again = _migrate(tmp_path, EVERYTHING, "--output", out)
    assert again.exit_code == 2 and f"error: {out} exists; give another file by --output" in again.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1,}', "line 1, column 9: no JSON"),
        ("[1]", "holds a list, not an object"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "enabled is there twice"),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage=7 must be 0, 1, 2 or 3"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(tmp_path: Path, text: str, says: str) -> None:
    out = tmp_path / "ours.yaml"
    result = _migrate(tmp_path, text, "--output", out)
    assert result.exit_code == 2 and says in result.stderr and not out.exists()


def test_no_file(tmp_path: Path) -> None:
    result = _mics("migrate", tmp_path / "nothing.json", "--output", tmp_path / "out.yaml")
    assert result.exit_code == 2 and "nothing.json" in result.stderr


def test_the_page_names_keys_that_are_known() -> None:
    page = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
    rows = [row.split("|")[1] for row in page.split("## From DeepSpeed")[1].splitlines() if row.startswith("| `")]
    keys = [key for row in rows for key in row.split("`")[1::2]]
    written = {told.key for told in migrated(EVERYTHING, ranks=16).told if told.fate is Fate.WRITTEN}
    sections = {key.split(".")[0] for key in written} - {"zero_optimization"}
    by_rule = {"zero_optimization.stage", "zero_optimization.zero_hpz_partition_size", "gradient_accumulation_steps"}
    others = {"train_micro_batch_size_per_gpu", "fp16.enabled", "data_types.grad_accum_dtype", "scheduler"}
    assert len(keys) > 30
    assert not [key for key in keys if key not in written | sections | by_rule | others and counterpart(key) is None]
