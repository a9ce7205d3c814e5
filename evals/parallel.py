"""Several processes that share one run: who measures what, and how they wait for each other. Started by `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from accel.errors import AccelError, OptionError

T = TypeVar("T")

# processes wait for the slowest share; one that has died is noticed by its closed connection, not by this
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Team:
    """The processes of one run. index: of this one, from 0; size: how many there are. `state`: accelerate's, None for a single process."""

    index: int = 0
    size: int = 1
    state: Any = None

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, units: Sequence[T]) -> Sequence[T]:
        """This process's part of the work: every size-th unit. Not accelerate's split, which gives the long prompts, that come last, to one alone."""
        return units[self.index :: self.size]

    def agree(self, value: T) -> T:
        """The main process's value, in all of them."""
        if self.state is None:
            return value
        from accelerate.utils import broadcast_object_list

        found = [value]
        self._together(lambda: broadcast_object_list(found))
        return found[0]

    def wait(self) -> None:
        """Returns when all have come so far. Raises AccelError where one has ended before."""
        if self.state is not None:
            self._together(self.state.wait_for_everyone)

    def leave(self) -> None:
        """Ends the connection to the others."""
        if self.state is not None:
            self.state.destroy_process_group()

    def device(self, asked: str) -> str:
        """Where this process runs the model: of GPUs that were not numbered, its own."""
        if self.state is None or asked == "cpu":
            return asked
        if ":" in asked:
            raise OptionError(f"{self.size} processes cannot share {asked}: write --device {asked.split(':')[0]}, and each takes its own")
        return f"{asked}:{self.state.local_process_index}"

    def _together(self, call: Any) -> None:
        try:
            call()
        # what torch.distributed raises where a connection breaks
        except RuntimeError as error:
            raise AccelError(f"another of the {self.size} processes of this run has ended before its share was done: see what it said") from error


def join_team(device: str) -> Team:
    """The processes that a launcher has started for this run; a team of one without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Team()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    return Team(state.process_index, state.num_processes, state)


def launcher_trap() -> str | None:
    """What to tell whoever asked `accelerate launch` for several processes and was given one; None for all others."""
    is_alone = "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    # set by the launcher of single processes where more than one was asked for
    if is_alone and "MASTER_ADDR" in os.environ:
        return (
            "accelerate launch has started a single process, as it does with --cpu: for N processes on CPUs write "
            "`accelerate launch --multi_gpu --num_processes N -m accel run … --device cpu`, or `torchrun --nproc-per-node N -m accel run …`"
        )
    return None
