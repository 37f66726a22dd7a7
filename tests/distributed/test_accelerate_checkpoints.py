"""MiCSAccelerator saves and resumes, at another partition size and number of ranks; and what others read of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import load_checkpoint_in_model
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mics.checkpoint import consolidate, export_hugging_face
from tests.distributed.accelerating import Net, data, launched, ours, parameters, theirs
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import assert_close, assert_same_losses
from tests.raising import raised

mse = nn.functional.mse_loss


class Counter:
    """An object of the user's with state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Run:
    """A training with dropout, a scheduler, a shuffled loader and a counter."""

    def __init__(self, accelerator: Any, dropout: float = 0.1) -> None:
        self.accelerator = accelerator
        model = Net(dropout=dropout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        torch.manual_seed(11 + dist.get_rank())
        self.counter = Counter()
        self.model, self.optimizer, self.loader, self.scheduler = accelerator.prepare(
            model, optimizer, data(16 * dist.get_world_size(), shuffle=True), scheduler
        )
        accelerator.register_for_checkpointing(self.counter)
        self.losses: list[float] = []

    def epoch(self, first: int = 0, last: int = 8) -> None:
        accelerator = self.accelerator
        loader = accelerator.skip_first_batches(self.loader, first) if first else self.loader
        for number, (x, y) in enumerate(loader, first):
            if number == last:
                return
            with accelerator.accumulate(self.model):
                loss = mse(self.model(x), y)
                self.losses.append(loss.item())
                accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.counter.count += 1


def seeded(partition_size: int | None, **options: Any) -> Any:
    loaders = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=4)
    return ours(partition_size, gradient_accumulation_steps=4, dataloader_config=loaders, **options)


def _resumes(folder: str) -> None:
    """At the same number of ranks bit for bit, with another partition size within rounding."""
    with launched():
        run = Run(seeded(2, async_save=True))
        run.epoch()
        run.epoch(last=4)
        with torch.inference_mode():
            run.accelerator.save_state(f"{folder}/state")
        run.epoch(first=4)
        expected, whole = run.losses[12:], parameters(run.accelerator, run.model)
        run.accelerator.wait_for_save()
        for p in (2, 1, 4):
            resumed = Run(seeded(p))
            resumed.accelerator.load_state(f"{folder}/state")
            assert (resumed.counter.count, resumed.loader.iteration, resumed.optimizer.steps) == (12, 1, 3)
            resumed.epoch(first=4)
            exact = {"rtol": 0.0} if p == 2 else {"rtol": 1e-5}
            assert_same_losses(resumed.losses, expected, f"resumed with p = {p}", **exact)
            assert_close(parameters(resumed.accelerator, resumed.model), whole, f"p = {p}", 0.0 if p == 2 else 1e-5)


def _on_two_ranks(folder: str) -> None:
    with launched():
        run = Run(seeded(1))
        run.accelerator.load_state(f"{folder}/state")
        run.accelerator.save_state(f"{folder}/again")
        assert run.optimizer.steps == 3
        for name in ("state", "again") if run.accelerator.is_main_process else ():
            consolidate(f"{folder}/{name}", f"{folder}/whole.pt")
            state = torch.load(f"{folder}/whole.pt")["state_dict"]
            assert_close(parameters(run.accelerator, run.model), state, name)


def _named_by_itself(folder: str) -> None:
    """Accelerate's own names, the newest kept; hooks write into what has been saved; models in the plural."""
    with launched():
        config = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=2)
        accelerator = ours(project_config=config)
        seen: list[Any] = []
        accelerator.register_save_state_pre_hook(lambda models, weights, where: seen.append((len(models), where)))
        torch.manual_seed(0)
        first, second, sgd = nn.Linear(4, 4), nn.Linear(4, 2), None
        sgd = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1, momentum=0.9)
        first, second, sgd = accelerator.prepare(first, second, sgd)
        for _ in range(4):
            accelerator.backward(second(first(torch.ones(1, 4))).sum())
            sgd.step()
            sgd.zero_grad()
            accelerator.save_state()
        dist.barrier()
        assert sorted(path.name for path in Path(folder, "checkpoints").iterdir()) == ["checkpoint_2", "checkpoint_3"]
        assert seen[-1] == (2, f"{folder}/checkpoints/checkpoint_3")
        saved = parameters(accelerator, second)
        accelerator.backward(second(first(torch.ones(1, 4))).sum())
        sgd.step()
        accelerator.load_state()
        assert_close(parameters(accelerator, second), saved, "the newest")
        refusals(accelerator, folder)


def refusals(accelerator: Any, folder: str) -> None:
    accelerator.register_for_checkpointing(Counter())
    says = raised(accelerator.load_state)
    assert "saved with 0 registered objects, there are 1 now" in says, says
    says = raised(lambda: accelerator.load_state(f"{folder}/nowhere"))
    assert "folder does not exist" in says, says
    if dist.get_rank() == 1:
        path = next(Path(folder, "checkpoints", "checkpoint_3").glob("model-*"))
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    dist.barrier()
    says = raised(accelerator.load_state)
    assert "is damaged" in says, says


def test_resumes_where_it_was_saved_beside_training(tmp_path: Path) -> None:
    run_ranks(4, _resumes, str(tmp_path))
    run_ranks(2, _on_two_ranks, str(tmp_path))


def test_checkpoints_that_are_named_by_themselves(tmp_path: Path) -> None:
    run_ranks(2, _named_by_itself, str(tmp_path))


# -- what others read --------------------------------------------------------------------------------------------------


def language(accelerator: Any) -> tuple[nn.Module, Tensor]:
    """A small GPT-2 after three steps, and its logits for nineteen samples on four ranks."""
    torch.manual_seed(0)
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16, **none))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    ids = torch.arange(19)[:, None] + torch.arange(8)
    loader = accelerator.prepare(torch.utils.data.DataLoader(ids, batch_size=2))
    for batch in loader:
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        logits = [accelerator.gather_for_metrics(model(input_ids=batch).logits[:, -1]) for batch in loader]
    return model, torch.cat(logits)


def _read_by_others(folder: str) -> None:
    with launched():
        _, expected = language(theirs())
        accelerator = ours(2)
        model, logits = language(accelerator)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert len(logits) == 19
        state = accelerator.get_state_dict(model)
        options = {"is_main_process": accelerator.is_main_process, "save_function": accelerator.save}
        accelerator.unwrap_model(model).save_pretrained(f"{folder}/hf", state_dict={**state}, **options)
        accelerator.save_model(model, f"{folder}/saved")
        accelerator.save_state(f"{folder}/state")
        assert bool(state) == accelerator.is_main_process
        if accelerator.is_main_process:
            export_hugging_face(f"{folder}/state", f"{folder}/exported")
            read = GPT2LMHeadModel.from_pretrained(f"{folder}/hf")
            assert_close(read.state_dict(), state, "save_pretrained")
            assert_close(GPT2LMHeadModel.from_pretrained(f"{folder}/exported").state_dict(), state, "mics export")
            load_checkpoint_in_model(read, f"{folder}/saved")
            assert_close(read.state_dict(), state, "save_model")


def test_evaluation_and_what_others_read(tmp_path: Path) -> None:
    run_ranks(4, _read_by_others, str(tmp_path))
