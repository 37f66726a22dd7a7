"""DeepSpeed's keys that become no setting: what lightning-mics does by itself, and what it has no counterpart for.

A key is dotted (`zero_optimization.overlap_comm`); an entry for a section holds for all that is in it.
"""

from __future__ import annotations

from collections.abc import Mapping

_OVERLAP = "communication overlaps computation, on every rung"
_BLOCKS = "a block travels in one collective; MiCSStrategy(blocks=...) chooses blocks"
_RUNG = 'rung="auto" keeps gathered what fits memory_budget'
_UNUSED = "parameters without a gradient, on some ranks or on all, are provided for"

BY_ITSELF: Mapping[str, str] = {
    "zero_optimization.overlap_comm": _OVERLAP,
    "zero_optimization.contiguous_gradients": "a block's gradients are one piece of memory",
    "zero_optimization.reduce_scatter": "hop 1 is a reduce-scatter",
    "zero_optimization.allgather_partitions": "parameters are all-gathered, block by block",
    "zero_optimization.allgather_bucket_size": _BLOCKS,
    "zero_optimization.reduce_bucket_size": _BLOCKS,
    "zero_optimization.sub_group_size": _BLOCKS,
    "zero_optimization.use_multi_rank_bucket_allreduce": _BLOCKS,
    "zero_optimization.round_robin_gradients": _BLOCKS,
    "zero_optimization.legacy_stage1": _BLOCKS,
    "zero_optimization.stage3_prefetch_bucket_size": "the next block is gathered while one computes",
    "zero_optimization.prefetch_bucket_size": "the next block is gathered while one computes",
    "zero_optimization.stage3_max_live_parameters": _RUNG,
    "zero_optimization.max_live_parameters": _RUNG,
    "zero_optimization.stage3_max_reuse_distance": _RUNG,
    "zero_optimization.max_reuse_distance": _RUNG,
    "zero_optimization.stage3_param_persistence_threshold": "small parameters travel with their block",
    "zero_optimization.param_persistence_threshold": "small parameters travel with their block",
    "zero_optimization.stage3_model_persistence_threshold": "small parameters travel with their block",
    "zero_optimization.model_persistence_threshold": "small parameters travel with their block",
    "zero_optimization.stage3_module_granularity_threshold": _BLOCKS,
    "zero_optimization.module_granularity_threshold": _BLOCKS,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _BLOCKS,
    "zero_optimization.use_all_reduce_for_fetch_params": _BLOCKS,
    "zero_optimization.stage3_allgather_sequential": _BLOCKS,
    "zero_optimization.allgather_sequential": _BLOCKS,
    "zero_optimization.leaf_module": "give the class to MiCSStrategy(blocks=...); experts without a token need nothing",
    "zero_optimization.mics_hierarchical_params_gather": "where a partition group spans nodes, both tiers are used",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "`mics export DIR --to hf OUT --dtype bfloat16`",
    "zero_optimization.gather_16bit_weights_on_model_save": "`mics export DIR --to hf OUT --dtype bfloat16`",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "`mics export DIR --to hf OUT --dtype float16`",
    "zero_optimization.load_from_fp32_weights": "checkpoints hold the fp32 parameters themselves",
    "zero_optimization.elastic_checkpoint": "a checkpoint resumes on another number of ranks",
    "zero_optimization.ignore_unused_parameters": _UNUSED,
    "zero_optimization.memory_efficient_linear": "the model is left as it is",
    "zero_optimization.override_module_apply": "the model is left as it is",
    "zero_optimization.pipeline_loading_checkpoint": "each rank reads its own part of a checkpoint",
    "zero_optimization.log_trace_cache_warnings": "there is no trace to be cached",
    "zero_optimization.enable_sanity_checks": "what must hold is always checked",
    "zero_allow_untested_optimizer": "optimizers are torch's own, or yours",
    "zero_force_ds_cpu_optimizer": "optimizers are torch's own, or yours",
    "use_data_before_expert_parallelism": "experts are sharded as all else is",
    "fp32_allreduce": "gradients are summed in fp32",
    "prescale_gradients": "gradients are divided where 16 bits could overflow",
    "gradient_predivide_factor": "gradients are divided where 16 bits could overflow",
    "disable_allgather": "parameters are gathered where they are needed",
    "checkpoint.tag_validation": "a checkpoint is in its place as a whole, or not at all",
    "checkpoint.load_universal": "any checkpoint resumes on any number of ranks",
    "checkpoint.parallel_write": "all ranks share the writing",
    "train_batch_size": "batch size of a rank, times window, times ranks",
    "bf16.immediate_grad_update": "gradients are summed in fp32 as they come",
    "bf16.bf16_master_weights_and_grads": "shards and sums are fp32; Trainer(precision='bf16-true') has neither",
    "bf16.bf16_optimizer_states": "optimizer state has the dtype of the shards",
    "fp16.fused_mode": "torch's optimizers are fused by fused=True",
    "fp16.auto_cast": "autocast is on",
    "dump_state": "the callback lightning_mics.callbacks.RunHeader shows what is run",
    "timers": "the callback lightning_mics.callbacks.Throughput logs seconds a step",
}

_OFFLOAD = (
    'offload="optimizer" keeps its state in the host\'s memory, offload="parameters" all that is sharded; nothing goes '
    "to disks"
)
_QUANTIZED = "nothing is quantized; between_nodes=torch.bfloat16 halves what an fp32 run sends between nodes"
_SCALER = (
    "the loss is scaled by torch.amp.GradScaler: Trainer(plugins=MixedPrecision('16-mixed', 'cuda', "
    "scaler=GradScaler(init_scale=..., growth_interval=...)))"
)
_LOGGERS = "Trainer(logger=TensorBoardLogger(...)), or WandbLogger, CSVLogger, CometLogger of lightning.pytorch.loggers"
_PARALLEL = "lightning-mics shards data parallelism alone; keep DeepSpeed or Megatron for this"
_RECIPE = "a training recipe, not communication: write it in the LightningModule or the data"

WITHOUT: Mapping[str, str] = {
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_params": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.zenflow": _OFFLOAD,
    "zero_optimization.save_muon_momentum_buffer_in_memory": _OFFLOAD,
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.zeropp_loco_param": _QUANTIZED,
    "zero_optimization.stage3_partition_stream_chunk_size": (
        "a whole block must fit a device; build the model with trainer.init_module(empty_init=True)"
    ),
    "zero_optimization.partition_stream_chunk_size": (
        "a whole block must fit a device; build the model with trainer.init_module(empty_init=True)"
    ),
    "aio": _OFFLOAD,
    "fp16.loss_scale": _SCALER,
    "fp16.initial_scale_power": _SCALER,
    "fp16.loss_scale_window": _SCALER,
    "fp16.hysteresis": _SCALER,
    "fp16.consecutive_hysteresis": _SCALER,
    "fp16.min_loss_scale": _SCALER,
    "fp16.fp16_master_weights_and_grads": "master weights stay fp32: they are the shards",
    "bf16.check_grad_overflow": "Trainer(detect_anomaly=True), or the hook on_before_optimizer_step",
    "torch_autocast.lower_precision_safe_modules": "torch.autocast(enabled=False) within a module keeps it in fp32",
    "amp": "Apex is not used; Trainer(precision='16-mixed') is what it did",
    "sparse_gradients": "gradients are dense; build embeddings with sparse=False",
    "gradient_allreduce_op": "gradients are averaged",
    "seq_parallel_comm_data_type": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "autotp_size": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "pipeline": _PARALLEL,
    "hybrid_engine": _PARALLEL,
    "sparse_attention": "give the model another attention",
    "activation_checkpointing.partition_activations": "what is checkpointed is a block's input, whole on its rank",
    "activation_checkpointing.cpu_checkpointing": "torch.autograd.graph.save_on_cpu() around the module's forward",
    "activation_checkpointing.contiguous_memory_optimization": "torch's allocator is used as it is",
    "activation_checkpointing.number_checkpoints": "every block is checkpointed; blocks=... makes them larger",
    "activation_checkpointing.synchronize_checkpoint_boundary": "nothing waits for the device there",
    "activation_checkpointing.profile": "Trainer(profiler='pytorch')",
    "wall_clock_breakdown": "Trainer(profiler='simple'), and the callback lightning_mics.callbacks.Throughput",
    "memory_breakdown": "the callback DeviceStatsMonitor; `mics plan` says beforehand what a rank holds",
    "flops_profiler": "the callback ThroughputMonitor, or `mics plan` beforehand",
    "comms_logger": "the callback lightning_mics.callbacks.RunHeader tells the bytes of each step",
    "tensorboard": _LOGGERS,
    "wandb": _LOGGERS,
    "csv_monitor": _LOGGERS,
    "comet": _LOGGERS,
    "autotuning": "`mics plan` chooses partition size, rung and micro-batch; partition_size='auto' does so in a fit",
    "elasticity": "torchrun --nnodes=MIN:MAX restarts; checkpoints resume on another number of ranks",
    "nebula": "MiCSStrategy(async_save=True) writes beside training",
    "datastates": "MiCSStrategy(async_save=True) writes beside training",
    "checkpoint.use_node_local_storage": 'MiCSStrategy(writers="group") writes all of it to the first group\'s node',
    "checkpoint": "see docs/checkpoints.md",
    "graph_harvesting": "MiCSStrategy(compile={'mode': 'reduce-overhead'})",
    "compile.deepcompile": "MiCSStrategy(compile=True) compiles blocks; gathers stay outside the graph",
    "dataloader_drop_last": "DataLoader(drop_last=True)",
    "vocabulary_size": "the model's own configuration",
    "data_efficiency": _RECIPE,
    "curriculum_learning": _RECIPE,
    "progressive_layer_drop": "blocks that a rank skips in its forward are provided for; choose them there",
    "eigenvalue": _RECIPE,
    "quantize_training": _RECIPE,
    "compression_training": _RECIPE,
    "weight_quantization": _RECIPE,
    "managed_gradient_accumulation": "the Trainer counts micro-steps; manual optimization leaves that to you",
}


def counterpart(key: str) -> tuple[bool, str] | None:
    """Whether lightning-mics does by itself what `key` asks, and how, or else what to do; None for an unknown key."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        above = ".".join(parts[:length])
        for table in (BY_ITSELF, WITHOUT):
            if above in table:
                return table is BY_ITSELF, table[above]
    return None
