"""What a person sees of a language-model run: progress, learning, samples and the checkpoint to go on from."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from typing_extensions import override

from recipes.data import TextDataModule


@rank_zero_only
def show(line: str | Text) -> None:
    """Print one line on rank 0, whole, so that it can be copied."""
    get_console().print(line, soft_wrap=True, markup=False, highlight=False)


class StepProgress(ProgressBar):
    """Progress in optimizer steps: a bar on a terminal, otherwise a line now and then.

    Args:
        every: optimizer steps between lines where there is no terminal, and over which the loss shown is a mean.

    Raises:
        ValueError: if `every` is below 1.
    """

    def __init__(self, every: int = 10) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every={every} is not a number of steps; choose at least 1")
        self.every = every
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._shown_step = 0
        self._losses: deque[Tensor] = deque()
        self._enabled = True

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shown_step = trainer.global_step
        self._losses = deque(maxlen=self.every * trainer.accumulate_grad_batches)
        if not (self._enabled and trainer.is_global_zero and get_console().is_terminal):
            return
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
            console=get_console(),
        )
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._task = self._bar.add_task("", total=total, completed=trainer.global_step, now="")
        self._bar.start()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._losses.append(trainer.callback_metrics["train/loss"])
        if not self._enabled or not trainer.is_global_zero or step == self._shown_step:
            return
        now = f"loss {torch.stack(list(self._losses)).mean():.3f}  {measured(trainer)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, now=now)
        elif step % self.every == 0 or step == trainer.max_steps:
            show(f"step {step:>{len(str(trainer.max_steps))}}/{trainer.max_steps}  {now}")
        self._shown_step = step

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def measured(trainer: Trainer) -> str:
    """Tokens per second and seconds per step, as far as they were logged, in a line."""
    metrics = trainer.callback_metrics
    formats = {"tokens/s": "{:,.0f} tokens/s", "seconds/step": "{:.2f} s/step"}
    return "  ".join(form.format(float(metrics[name])) for name, form in formats.items() if name in metrics)


class Learning(Callback):
    """Validation loss beside what can be reached without learning: ln V by knowing nothing, and the corpus's unigram
    entropy by knowing how frequent each token is.

    Attributes:
        validated_step: the optimizer step at which validation ran last, None before.
    """

    def __init__(self) -> None:
        self.validated_step: int | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        corpus = _data(trainer).describe()
        show(
            f"corpus      {corpus.name}: {corpus.train_tokens:,} training tokens; "
            f"unigram entropy {corpus.unigram_entropy:.2f} nats, ln V {corpus.log_vocab:.2f}"
        )

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        corpus, loss = _data(trainer).describe(), float(trainer.callback_metrics["val/loss"])
        show(
            f"validation  step {trainer.global_step}: loss {loss:.3f} nats, perplexity {math.exp(loss):,.0f}  "
            f"({loss - corpus.unigram_entropy:+.2f} from the unigram entropy {corpus.unigram_entropy:.2f}; "
            f"ln V is {corpus.log_vocab:.2f})"
        )


def _data(trainer: Trainer) -> TextDataModule:
    data = trainer.datamodule
    if not isinstance(data, TextDataModule):
        raise TypeError(f"Learning needs a TextDataModule, and the Trainer runs {type(data).__name__}; leave it out")
    return data


class FinalCheckpoint(Callback):
    """Saves the last step of training, unless a `ModelCheckpoint` has just saved it under the same name.

    Args:
        dirpath: where `step-<step>.ckpt` goes.

    Attributes:
        path: of the last step's checkpoint, None before training has ended.
    """

    def __init__(self, dirpath: str | Path) -> None:
        self.dirpath = Path(dirpath)
        self.path: Path | None = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path = self.dirpath / f"step-{trainer.global_step}.ckpt"
        saved = {Path(getattr(c, "best_model_path", "")).name for c in trainer.checkpoint_callbacks}
        if self.path.name not in saved and not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path)


def show_samples(samples: Iterable[tuple[str, str]]) -> None:
    """Show prompts and, set off from them, what the model added."""
    show("samples     prompt and continuation")
    for prompt, addition in samples:
        text = Text(prompt, style="bold") + Text("|" + addition.rstrip(), style="cyan")
        for line in text.split("\n"):
            line.rstrip()
            show(Text(" " * 12) + line if line else line)
        show("")
