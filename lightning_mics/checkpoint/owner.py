"""What every integration's user says about saving, and the saver that comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_mics.checkpoint.pieces import Writers
from lightning_mics.checkpoint.saver import Saver
from lightning_mics.checkpoint.verification import Verify
from lightning_mics.topology import Topology


class SaverOwner:
    """Has a `Saver`, made when it is first asked for: by then its topology is known."""

    if TYPE_CHECKING:

        @property
        def topology(self) -> Topology: ...

    def _set_saving(self, writers: Writers | str, verify: Verify | str, *, async_save: bool = False) -> None:
        """Take these arguments, each checked.

        Raises:
            TypeError, ValueError: that names an argument, its value and what is allowed.
        """
        if not isinstance(async_save, bool):
            raise TypeError(f"async_save={async_save!r} must be True or False")
        self._async_save = async_save
        self._writers = Writers.parse(writers, "writers")
        self._verify = Verify.parse(verify, "verify")
        self._saver: Saver | None = None

    @property
    def saver(self) -> Saver:
        """Saves this run's checkpoints."""
        if self._saver is None:
            self._saver = Saver(self.topology, self._writers, asynchronous=self._async_save)
        return self._saver
