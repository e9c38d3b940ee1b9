"""How a run behaves towards whoever started it: when it stops, what a hang does, how it ends. One a rank."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytorch_lightning as pl
from rich.console import Console

from fundusfm.errors import EveryRankError, ToldByAnotherRank, UserError
from fundusfm.recipe.schema import TrainerConfig
from fundusfm.training.boundary import StopFlag
from fundusfm.training.launched import Launch
from fundusfm.training.limits import ASKED, StopFile, TimeLimit
from fundusfm.training.watchdog import Watchdog

# What gloo, nccl and the store say when a process at the other end of a connection is no more.
_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout"),
    *("Connection refused", "remote process exited", "failed to recv", "Connection was likely closed"),
    *("NCCL communicator was aborted", "Read error", "recvValue failed", "sendBytes failed"),
)
# What gloo says when that process lives, and the timeout of the group has passed.
_SILENT = "Timed out waiting"


class LostRankError(UserError):
    """Another rank has ended or hangs: its words tell the cause, and this one's traceback would hide them."""

    exit_code = 1  # launchers do not start a run again that ended with 2


@dataclass(frozen=True)
class Conduct:
    """The launcher, the flag to stop at, the clock to keep, and the watchdog."""

    launch: Launch
    stop: StopFlag
    limit: TimeLimit
    watchdog: Watchdog

    @classmethod
    def of_run(cls, launch: Launch, config: TrainerConfig, began_s: float) -> Conduct:
        """As the recipe and the environment say; `began_s`: when the process started, by `time.time()`."""
        return cls(
            launch,
            StopFlag(StopFile.from_environment(), hears_ctrl_c=not launch.started_by_first_rank),
            TimeLimit.of_run(config.time_limit_minutes, began_s),
            Watchdog(config.stall_minutes, launch.rank, launch.process_of_first_rank),
        )

    def watched(self, save: Callable[..., None], console: Console) -> Callable[[pl.Trainer], None]:
        """`save`, timed: the first until it is whole, whereupon the console tells how long stopping takes."""

        def timed(trainer: pl.Trainer) -> None:
            self.watchdog.enter(f"saving a checkpoint at step {trainer.global_step}")
            began_s, is_first_save = time.monotonic(), not self.limit.has_saved
            save(trainer, whole=is_first_save)
            self.limit.note_save(time.monotonic() - began_s)
            if is_first_save and (self.launch.outside or self.limit.end_s is not None):
                console.print(self.limit.describe(), markup=False, highlight=False, soft_wrap=True)

        return timed

    def signal_that_stopped(self) -> int | None:
        """The signal that all ranks stopped for, if it was one."""
        number = self.stop.agreed
        return number if number is not None and number < ASKED else None

    def why_stopped(self) -> str:
        """What all ranks stopped for, in words: what a person can look up, and mend if it was not meant."""
        number = self.stop.agreed
        assert number is not None
        if number < ASKED:
            return f"signal {signal.Signals(number).name}"
        return f"stop file {self.stop.file.path}" if number == ASKED else self.limit.name(number)

    @contextmanager
    def endings(self, trainer: pl.Trainer) -> Iterator[None]:
        """Train within: signals are watched, hangs end, and an error is told by one rank."""
        with self.watchdog:
            try:
                self.stop.watch()
                # Not Lightning's own: its SIGTERM is a collective that is called from within a handler, which
                # hangs if ranks hear it at different places, and an end with code 0 otherwise.
                trainer._signal_connector.register_signal_handlers = self.stop.install  # type: ignore[method-assign]
                yield
            except EveryRankError as error:
                if trainer.is_global_zero:
                    raise
                raise ToldByAnotherRank(error) from None
            except RuntimeError as error:
                if trainer.world_size > 1 and (lost := _lost_rank(error)):
                    raise lost from None
                raise
            except SystemExit as ended:
                if isinstance(ended.__context__, KeyboardInterrupt):  # Lightning makes it an exit with code 1
                    raise KeyboardInterrupt from None
                raise
            finally:
                self.stop.restore()


def _lost_rank(error: RuntimeError) -> LostRankError | None:
    text = str(error)
    has_ended = any(words in text for words in _LOST)
    if not has_ended and _SILENT not in text:
        return None
    return LostRankError(
        f"another rank of this run {'has ended' if has_ended else 'does not answer'}",
        where=text.strip().splitlines()[0],
        fix="its own output says why; then go on with --resume",
    )
