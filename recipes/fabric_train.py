"""Train a language model in a loop of one's own, with Fabric: `python recipes/fabric_train.py`.

The same models, data and optimizers as `recipes/train.py`, from the same `conf/`; where that has a Trainer, this has a
loop to read and to change.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402
import torch  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from lightning.fabric import Fabric  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from recipes import launch  # noqa: E402
from recipes.data import Objective, TextDataModule  # noqa: E402
from recipes.models import build, grown  # noqa: E402


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="fabric_train")
def job(cfg: DictConfig) -> None:
    """One run in one process."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        launch.refuse_sweep(cfg.trainer.devices, cfg.trainer.num_nodes)
    folder = Path(HydraConfig.get().runtime.output_dir)
    launch.log_to_files(folder, launch.process_rank(cfg.trainer.devices))
    train(cfg, folder)


def train(cfg: DictConfig, folder: Path) -> None:
    """Pretrain, validate, and save.

    Args:
        cfg: as `conf/fabric_train.yaml` composes it.
        folder: where checkpoints go.
    """
    fabric = Fabric(
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        precision=cfg.trainer.precision,
        strategy=instantiate(cfg.strategy, _convert_="all"),
    )
    fabric.launch()
    fabric.seed_everything(cfg.seed, verbose=False)

    data = open_data(fabric, cfg)
    loader = data.train_dataloader()
    model = fabric.setup_module(make_network(fabric, cfg))
    optimizer = instantiate(cfg.optim.optimizer)(model)
    scheduler = instantiate(cfg.optim.schedule)(optimizer, cfg.trainer.max_steps)
    optimizer = fabric.setup_optimizers(optimizer)

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, "step": 0}
    if cfg.ckpt_path:
        fabric.load(cfg.ckpt_path, state)
    fabric.print(f"{fabric.strategy.topology}\n{fabric.strategy.mics(model).describe()}")
    fit(fabric, cfg, state, endless(loader))

    loss = validate(fabric, model, islice(data.val_dataloader(), cfg.trainer.limit_val_batches))
    fabric.print(f"validation  step {state['step']}: loss {loss:.3f} nats, of {data.unigram_entropy:.2f} by frequency")
    fabric.save(folder / f"step-{state['step']}.ckpt", state)
    fabric.print(f"checkpoint  {folder}/step-{state['step']}.ckpt")


def fit(fabric: Fabric, cfg: DictConfig, state: dict[str, Any], batches: Iterator[dict[str, Tensor]]) -> None:
    """Optimizer steps up to the last."""
    model, optimizer, scheduler = state["model"], state["optimizer"], state["scheduler"]
    window, last, began, losses = cfg.trainer.accumulate_grad_batches, cfg.trainer.max_steps, time.monotonic(), []
    while state["step"] < last:
        for micro_step in range(window):
            boundary = micro_step == window - 1
            with fabric.no_backward_sync(model, enabled=not boundary):
                loss = model(**fabric.to_device(next(batches))).loss
                fabric.backward(loss / window)
            losses.append(loss.detach())
        fabric.clip_gradients(model, optimizer, max_norm=cfg.trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        state["step"] += 1
        if state["step"] % cfg.every == 0 or state["step"] == last:
            mean = fabric.all_reduce(torch.stack(losses).mean())
            seconds = (time.monotonic() - began) / (len(losses) / window)
            fabric.print(f"step {state['step']:>{len(str(last))}}/{last}  loss {mean:.3f}  {seconds:.2f} s/step")
            losses.clear()
            began = time.monotonic()


@torch.no_grad()
def validate(fabric: Fabric, model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> Tensor:
    """The mean loss, over all ranks."""
    model.eval()
    losses = [model(**fabric.to_device(batch)).loss for batch in batches]
    model.train()
    mean: Tensor = fabric.all_reduce(torch.stack(losses).mean())
    return mean


def open_data(fabric: Fabric, cfg: DictConfig) -> TextDataModule:
    """The text, tokenized by one process of each node."""
    data: TextDataModule = instantiate(cfg.data)
    data.share(fabric.global_rank, fabric.world_size)
    with fabric.rank_zero_first(local=True):
        data.setup()
    return data


def make_network(fabric: Fabric, cfg: DictConfig) -> nn.Module:
    """The model on the meta device: values come when it is sharded, block by block."""
    config = grown(instantiate(cfg.model.config), seq_len=cfg.data.seq_len, vocab_size=cfg.data.vocab_size)
    with fabric.init_module(empty_init=True):
        return build(config, Objective(cfg.model.objective))


def endless(loader: Any) -> Iterator[dict[str, Tensor]]:
    """Epoch after epoch, from where the loader is."""
    loader.sampler.set_epoch(loader.state_dict()["trainer_epoch"])
    while True:
        yield from loader
        loader.sampler.set_epoch(loader.sampler.epoch + 1)


if __name__ == "__main__":
    launch.return_freed_memory()
    launch.agree_on_run_id()
    job()
