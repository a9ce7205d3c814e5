"""Prints the cards of tasks: `python -m accel.evals.tasks NAME or group …`; without a name, one line for each task."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from accel.errors import OptionError
from accel.evals.tasks import OWN_DATA, card, expand_names, group_names, load_task, task_names


def main(words: Sequence[str]) -> int:
    """Prints one card after the other, or the list of tasks. 2 for a name that is not known."""
    parser = argparse.ArgumentParser("python -m accel.evals.tasks", description="What each task asks, its source, and what its scores cannot show.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"a task, a group ({', '.join(group_names())}), {OWN_DATA}FILE; none: list all")
    names = parser.parse_args(words).names
    if not names:
        width = max(map(len, task_names()))
        for name in task_names():
            print(f"{name:{width}}  {card(name).splitlines()[0]}")
        return 0
    try:
        found = expand_names(names)
    except OptionError as error:
        print(f"accel: {error}", file=sys.stderr)
        return 2
    for name in found:
        group = load_task(name).group
        print(f"{name}{f' ({group})' if group else ''}\n\n{card(name)}\n\n")
    return 0


if __name__ == "__main__":
    # a reader that goes away (`| head`) ends it as it ends other tools
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
