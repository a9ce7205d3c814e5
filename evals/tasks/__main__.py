"""Prints the cards of tasks: `python -m accel.evals.tasks [NAME or group …]`, all of them without a name."""

from __future__ import annotations

import sys

from accel.errors import OptionError
from accel.evals.tasks import card, expand_names, load_task, task_names


def main(names: list[str]) -> int:
    """Prints one card after the other. 2 for a name that is not known."""
    try:
        found = expand_names(names) if names else task_names()
    except OptionError as error:
        print(f"accel: {error}", file=sys.stderr)
        return 2
    for name in found:
        group = load_task(name).group
        print(f"{name}{f' ({group})' if group else ''}\n\n{card(name)}\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
