"""MiCSTrainer against Hugging Face's Trainer, which is DDP on the same ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from lightning_mics.hugging_face_trainer import MiCSSeq2SeqTrainer, MiCSTrainer
from tests.distributed.accelerating import fresh, launched
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import assert_close, assert_same_losses, on_cpu, parameters
from tests.raising import raised


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(32, (count, 8), generator=generator).cumsum(1).remainder(32)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: str, **options: Any) -> TrainingArguments:
    usual = {
        "use_cpu": on_cpu(),
        "ddp_backend": "gloo",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 3,
    }
    return TrainingArguments(folder, **(usual | options))


def trainer(cls: type[Trainer], folder: str, *, dropout: float = 0.0, mics: Any = None, **options: Any) -> Trainer:
    fresh()
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16, **rates))
    more = {} if mics is None else {"mics": mics}
    data = {"train_dataset": samples(52), "eval_dataset": samples(11)}
    return cls(model, arguments(folder, **options), **data, **more)


def logged(trainer: Trainer, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def _trains(folder: str) -> None:
    """Epochs of seven micro-steps: two windows and a short one."""
    with launched():
        expected = trainer(Trainer, f"{folder}/ddp")
        expected.train()
        for p in (1, 2):
            found = trainer(MiCSTrainer, f"{folder}/{p}", mics={"partition_size": p})
            found.train()
            for name in ("loss", "eval_loss", "grad_norm", "learning_rate"):
                assert_same_losses(logged(found, name), logged(expected, name), f"{name}, p = {p}", rtol=2e-5)
            assert_close(parameters(found.model), parameters(expected.model), f"p = {p}", atol=2e-5)
            assert isinstance(found.model.lm_head.weight, DTensor) == (p > 1)
        found.save_model(f"{folder}/saved")
        dist.barrier()
        read = GPT2LMHeadModel.from_pretrained(f"{folder}/saved")
        assert_close(parameters(found.model), parameters(read), "save_model")
        again = found.evaluate()["eval_loss"]
        assert_same_losses([again], [expected.evaluate()["eval_loss"]], "evaluate", rtol=2e-5)
        assert raised(lambda: found.train(resume_from_checkpoint=f"{folder}/saved")).startswith("ValueError")


def _resumes(folder: str) -> None:
    """From the middle of an epoch, with dropout; then the best model at the end, and a second training."""
    with launched():
        whole = trainer(MiCSTrainer, f"{folder}/whole", dropout=0.1, mics={"partition_size": 2})
        whole.train()
        for p, rtol in ((2, 0.0), (4, 2e-5)):
            resumed = trainer(MiCSTrainer, f"{folder}/{p}", dropout=0.1, mics={"partition_size": p})
            resumed.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-2")
            assert_same_losses(logged(resumed, "loss"), logged(whole, "loss"), f"resumed, p = {p}", rtol)
            assert_close(parameters(resumed.model), parameters(whole.model), f"resumed, p = {p}", atol=rtol)
        diverging = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "max_steps": 9, "save_steps": 3}
        best = trainer(
            MiCSTrainer, f"{folder}/best", load_best_model_at_end=True, mics={"partition_size": 2}, **diverging
        )
        best.evaluate()
        best.train()
        evaluated = logged(best, "eval_loss")
        assert min(evaluated) < evaluated[-1]
        assert_same_losses([best.evaluate()["eval_loss"]], [min(evaluated)], "the best", rtol=1e-6)
        best.train()
        assert len(logged(best, "loss")) == 9


def _generates(folder: str) -> None:
    """Sequences that end elsewhere on each rank, between two trainings."""
    with launched():
        found = []
        for cls, more in ((Seq2SeqTrainer, {}), (MiCSSeq2SeqTrainer, {"mics": {"partition_size": 2}})):
            fresh()
            torch.manual_seed(0)
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
            model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))
            options = {"max_steps": 2, "warmup_steps": 0, "eval_strategy": "no", "save_strategy": "no"}
            args = Seq2SeqTrainingArguments(
                **arguments(folder, **options).to_dict(), predict_with_generate=True, generation_max_length=12
            )
            seq2seq = cls(model, args, train_dataset=samples(24), eval_dataset=samples(11), **more)
            for _ in range(2):
                seq2seq.train()
                found.append(seq2seq.predict(samples(11), do_sample=False).predictions.tolist())
        first, second, *ours = found
        assert ours == [first, second] and first != second
        assert len({tuple(sequence) for sequence in second}) > 1


@pytest.mark.slow
def test_sequences_are_generated_as_under_ddp(tmp_path: Path) -> None:
    run_ranks(4, _generates, str(tmp_path))


@pytest.mark.slow
def test_losses_norms_and_parameters_are_those_of_ddp(tmp_path: Path) -> None:
    run_ranks(4, _trains, str(tmp_path))


@pytest.mark.slow
def test_resumes_and_loads_the_best(tmp_path: Path) -> None:
    run_ranks(4, _resumes, str(tmp_path))
