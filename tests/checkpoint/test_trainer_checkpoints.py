"""What Lightning does with checkpoints: ModelCheckpoint in all forms, "last", every entry point that takes a path."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mics.checkpoint import DamagedCheckpoint
from tests.distributed.ranks import run_ranks
from tests.distributed.toys import (
    Batches,
    Toy,
    assert_close,
    assert_same_losses,
    mics,
    parameters,
    seeded,
    trainer,
)


class Monitored(Toy):
    """Logs a `score` that is best after the third validation."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", abs(self.current_epoch - 2.0), sync_dist=True)


def _run(module: Toy, callbacks: Any, ckpt_path: Any = None, epochs: int = 1, **options: Any) -> Any:
    run = trainer(mics(), callbacks=callbacks, enable_checkpointing=True, max_epochs=epochs, **options)
    run.fit(module, Batches(6), Batches(1, first=900), ckpt_path=ckpt_path)
    return run


def _names(path: Path) -> list[str]:
    dist.barrier()
    names = sorted(os.listdir(path))
    dist.barrier()
    return names


def _is(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: {found!r}, expected {expected!r}")


# -- ModelCheckpoint ---------------------------------------------------------------------------------------------------


def _top_k(path: Path) -> None:
    saves = ModelCheckpoint(path, "{epoch}", monitor="score", save_top_k=2)
    _run(seeded(Monitored), [saves], epochs=4)
    _is(_names(path), ["epoch=1.ckpt", "epoch=2.ckpt"], "the two best of four")
    _is(Path(saves.best_model_path).name, "epoch=2.ckpt", "the best")


class NamedByEpoch(ModelCheckpoint):
    CHECKPOINT_NAME_LAST = "last-{epoch}"


def _last(path: Path) -> None:
    for kind, directory in ((True, path / "copy"), ("link", path / "link")):
        module = seeded(Monitored)
        _run(module, [ModelCheckpoint(directory, "{epoch}", save_last=kind)], epochs=3)
        _is(_names(directory), ["epoch=2.ckpt", "last.ckpt"], f"save_last={kind}")
        _is((directory / "last.ckpt").is_symlink(), kind == "link", f"save_last={kind}, a link")

        resumed = seeded(Monitored, 5)
        saves = ModelCheckpoint(directory, "{epoch}", save_last=kind)
        _run(resumed, [saves], "last", epochs=5)
        whole = seeded(Monitored)
        _run(whole, [], epochs=5)
        assert_same_losses(resumed.losses, whole.losses[-len(resumed.losses) :], f"resumed from a {kind} last")
        _is(len(resumed.losses), 12, "losses of two epochs")
        _is(_names(directory), ["epoch=4.ckpt", "last.ckpt"], f"save_last={kind}, after the resume")

    _run(seeded(Monitored), [NamedByEpoch(path / "named", "{epoch}", save_last="link")], epochs=3)
    _is(_names(path / "named"), ["epoch=2.ckpt", "last-epoch=2.ckpt"], "a link whose name changes")


def _every_n(path: Path) -> None:
    saves = ModelCheckpoint(path, "{step}", every_n_train_steps=2, save_top_k=-1)
    _run(seeded(Toy), [saves])
    _is(_names(path), ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"], "every two steps")


def _weights_only(path: Path) -> None:
    module = seeded(Toy)
    run = _run(module, [ModelCheckpoint(path, "weights", save_weights_only=True)])
    other = seeded(Toy, 5)
    try:
        _run(other, [], path / "weights.ckpt", epochs=2)
    except ValueError as refusal:
        if "weights only, no optimizer state" not in str(refusal):
            raise
    else:
        raise AssertionError("a fit resumed from weights")
    trainer(mics()).validate(other, Batches(1), ckpt_path=path / "weights.ckpt", verbose=False)
    assert_close(parameters(other), parameters(module), "weights")
    another = seeded(Toy, 6)
    run.validate(another, Batches(1), ckpt_path="best", verbose=False)
    assert_close(parameters(another), parameters(module), "weights, in a Trainer that has fitted")


def _leftovers(path: Path) -> None:
    """A run killed while it saved leaves a directory aside; it is neither "last" nor in the way."""
    if dist.get_rank() == 0:
        (path / ".last.ckpt.partial" / "rng").mkdir(parents=True)
    dist.barrier()
    _run(seeded(Toy), [ModelCheckpoint(path, "{epoch}", save_last=True)], "last")
    _is(_names(path), ["epoch=0.ckpt", "last.ckpt"], "after a save over leftovers")


def test_top_k_keeps_the_best_and_removes_the_rest(tmp_path: Path) -> None:
    run_ranks(2, _top_k, tmp_path)


def test_last_as_copy_and_as_link_and_resume_from_it(tmp_path: Path) -> None:
    run_ranks(2, _last, tmp_path)


def test_every_n_train_steps(tmp_path: Path) -> None:
    run_ranks(2, _every_n, tmp_path)


def test_weights_only_serves_evaluation_and_is_refused_in_fit(tmp_path: Path) -> None:
    run_ranks(2, _weights_only, tmp_path)


def test_leftovers_of_a_killed_save(tmp_path: Path) -> None:
    run_ranks(2, _leftovers, tmp_path)


# -- entry points ------------------------------------------------------------------------------------------------------


def _evaluate(path: Path) -> None:
    module = seeded(Toy)
    _run(module, []).save_checkpoint(path / "full.ckpt")
    module.validated.clear()
    data = Batches(2, first=300)
    trainer(mics()).validate(module, data, verbose=False)
    expected = [*module.validated]
    with torch.no_grad():
        predicted = torch.cat(trainer(mics()).predict(module, data))

    for name in ("validate", "test"):
        other = seeded(Toy, 5)
        getattr(trainer(mics(4)), name)(other, data, ckpt_path=path / "full.ckpt", verbose=False)
        assert_same_losses(other.validated, expected, name, rtol=1e-6)
        assert_close(parameters(other), parameters(module), name)
    others = torch.cat(trainer(mics(1)).predict(seeded(Toy, 5), data, ckpt_path=path / "full.ckpt"))
    torch.testing.assert_close(others, predicted, rtol=1e-6, atol=1e-6)


def _fit_after(path: Path) -> None:
    """Evaluation from a checkpoint between two fits of one Trainer leaves the optimizer of the second alone."""
    module = seeded(Toy)
    run = _run(module, [])
    run.save_checkpoint(path / "a.ckpt")
    run.test(module, Batches(1), ckpt_path=path / "a.ckpt", verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(module, Batches(6), Batches(1, first=900), ckpt_path=path / "a.ckpt")
    whole = seeded(Toy)
    _run(whole, [], epochs=2)
    assert_same_losses(module.losses, whole.losses, "fit, test, fit")


class Foreign(Toy):
    """Keeps something of its own in checkpoints, and lets a frozen layer out of them."""

    strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"epoch": self.current_epoch, "tensor": torch.arange(3)}
        for name in [n for n in checkpoint["state_dict"] if n.startswith("layers.0")]:
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.mine = checkpoint["mine"]


class WithoutOptimizer(Toy):
    def configure_optimizers(self) -> None:
        return None


def _without_optimizer(path: Path) -> None:
    saved = seeded(WithoutOptimizer)
    run = _run(saved, [ModelCheckpoint(path, "{epoch}")])
    dist.barrier()
    taken = seeded(WithoutOptimizer, 5)
    resumed = _run(taken, [], path / "epoch=0.ckpt", epochs=2)
    _is((resumed.current_epoch, resumed.global_step), (2, 2 * run.global_step), "epochs and steps")
    assert_close(parameters(taken), parameters(saved), "as they were", atol=0)


def _hooks(path: Path) -> None:
    module = seeded(Foreign)
    _run(module, []).save_checkpoint(path / "hooks.ckpt")
    other = seeded(Foreign, 5)
    fresh = {name: p.detach().clone() for name, p in other.named_parameters()}
    trainer(mics()).test(other, Batches(1), ckpt_path=path / "hooks.ckpt", verbose=False)
    _is(other.mine["tensor"].tolist(), [0, 1, 2], "what the module keeps itself")
    kept, trained = parameters(other), parameters(module)
    expected = {n: fresh[n] if n.startswith("layers.0") else trained[n] for n in kept}
    assert_close(kept, expected, "what was left out stays as it was")


def _refusals(path: Path) -> None:
    module = seeded(Toy)
    run = _run(module, [])
    with pytest.raises(TypeError, match="takes no storage options"):
        run.save_checkpoint(path / "x.ckpt", storage_options={"a": 1})
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint; give the directory"):
        _run(module, [], path / "nowhere.ckpt")


def test_validate_test_and_predict_from_a_checkpoint_at_other_partition_sizes(tmp_path: Path) -> None:
    run_ranks(4, _evaluate, tmp_path)


def test_fit_evaluate_and_fit_again_with_one_trainer(tmp_path: Path) -> None:
    run_ranks(2, _fit_after, tmp_path)


def test_a_fit_without_an_optimizer_is_saved_and_resumed(tmp_path: Path) -> None:
    run_ranks(2, _without_optimizer, tmp_path)


def test_hooks_of_the_module_change_what_is_saved(tmp_path: Path) -> None:
    run_ranks(2, _hooks, tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    run_ranks(2, _refusals, tmp_path)


def _elsewhere(path: Path) -> None:
    run = trainer(mics())
    run.fit(seeded(Toy), Batches(1))
    for where in ("memory://x.ckpt", "s3://bucket/x.ckpt"):
        with pytest.raises(ValueError, match=rf"filepath='{where}' is on no file system of this machine"):
            run.save_checkpoint(where)
    _is(os.listdir(), [], "what was made here instead")


def test_a_url_is_not_saved_to(tmp_path: Path) -> None:
    run_ranks(2, _elsewhere, tmp_path)


# -- "last" ------------------------------------------------------------------------------------------------------------


def _damage(path: Path) -> None:
    """The first byte of a file of tensors becomes another one."""
    dist.barrier()
    if dist.get_rank() == 0:
        file = sorted(path.glob("model-*.distcp"))[0]
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    dist.barrier()


def _fall_back(path: Path) -> list[str]:
    saves = ModelCheckpoint(path, "{epoch}", save_top_k=-1, save_last=True)
    whole = seeded(Monitored)
    _run(whole, [saves], epochs=4)
    if dist.get_rank() == 0:
        (path / ".epoch=9.ckpt.partial").mkdir()
    for damaged, left in (("last.ckpt", 0), ("epoch=3.ckpt", 6)):
        _damage(path / damaged)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            resumed = seeded(Monitored, 5)
            _run(resumed, [ModelCheckpoint(path, "again-{epoch}", save_last=True)], "last", epochs=4)
        assert_same_losses(resumed.losses, whole.losses[len(whole.losses) - left :], f"without {damaged}")
        assert_close(parameters(resumed), parameters(whole), f"without {damaged}")
    with pytest.raises(DamagedCheckpoint, match=r"epoch=3.ckpt is damaged: model-00000-0.distcp: its bytes are not"):
        _run(seeded(Monitored), [], path / "epoch=3.ckpt", epochs=4)
    return [str(warning.message) for warning in told]


def test_a_damaged_last_gives_way_to_the_newest_that_is_whole(tmp_path: Path) -> None:
    told, *others = run_ranks(4, _fall_back, tmp_path / "last")
    (instead,) = [text for text in told if "was taken instead" in text]
    assert "last.ckpt is damaged: model-00000-0.distcp: its bytes are not those that were written" in instead
    assert "epoch=2.ckpt is the newest that is whole, and was taken instead" in instead
    assert any("epoch=3.ckpt is damaged" in text for text in told)
    assert any("left by saves that did not end, and not loaded: " in t and ".epoch=9.ckpt.partial" in t for t in told)
    assert not any("taken instead" in text for told in others for text in told)


def _all_damaged(path: Path) -> None:
    _run(seeded(Monitored), [ModelCheckpoint(path, "{epoch}", save_last=True)], epochs=1)
    _damage(path / "last.ckpt")
    _damage(path / "epoch=0.ckpt")
    with pytest.raises(DamagedCheckpoint, match=r"last.ckpt is damaged"):
        _run(seeded(Monitored), [ModelCheckpoint(path, "{epoch}", save_last=True)], "last", epochs=2)


def test_a_damaged_last_is_an_error_where_there_is_no_other(tmp_path: Path) -> None:
    run_ranks(2, _all_damaged, tmp_path / "none")
