"""Who measures what among several processes, and what is told where one has gone or was never started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from accel.errors import AccelError, OptionError
from accel.evals.parallel import Team, join_team, launcher_trap


def team_of(index: int, size: int, **state: object) -> Team:
    return Team(index, size, SimpleNamespace(local_process_index=index, **state))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_disjoint_even_and_together_everything(size: int) -> None:
    units = list(range(11))
    shares = [Team(index, size).share(units) for index in range(size)]
    assert sorted(unit for share in shares for unit in share) == units
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    # the long prompts come last: each process gets one of the last ones
    assert size == 1 or len({unit for share in shares for unit in share[-1:]} & set(units[-size:])) == size


def test_a_process_alone_needs_no_launcher_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = join_team("cpu")
    assert (team.index, team.size, team.is_main) == (0, 1, True)
    assert team.agree("mine") == "mine"
    assert team.device("cuda") == "cuda"
    team.wait()


def test_every_process_takes_a_gpu_of_its_own() -> None:
    assert [team_of(index, 2).device("cuda") for index in range(2)] == ["cuda:0", "cuda:1"]
    assert team_of(1, 2).device("cpu") == "cpu"
    with pytest.raises(OptionError, match="2 processes cannot share cuda:0: write --device cuda"):
        team_of(1, 2).device("cuda:0")


def test_a_connection_that_breaks_is_told_as_what_it_means() -> None:
    def broken() -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(AccelError, match="another of the 3 processes of this run has ended before its share was done"):
        team_of(0, 3, wait_for_everyone=broken).wait()


def test_a_launcher_that_started_one_process_instead_of_several_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert launcher_trap() is None
    # what `accelerate launch --num_processes 1` sets
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launcher_trap() is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "--multi_gpu --num_processes N" in str(launcher_trap())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher_trap() is None
