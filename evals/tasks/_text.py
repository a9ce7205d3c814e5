"""Texts that tasks are made of: essays, which lie here, and Python's help topics and library, which differ a little between its versions."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

from accel.errors import AccelError

# one paragraph a line: prose of Ralph Waldo Emerson (1803-1882), in the public domain: The American Scholar (1837), Essays: First Series (1841) and
# Representative Men (1850), without titles, numbers, verse and notes, nor paragraphs that verse breaks; some 170 thousand tokens
ESSAYS = Path(__file__).with_name("emerson.txt")
# large modules in plain Python, present in every supported version; the source is read, the module is never imported
SOURCE_MODULES = (
    "argparse", "tarfile", "doctest", "optparse", "pickletools", "subprocess", "typing", "zipfile", "inspect", "ipaddress", "statistics", "fractions",
)  # fmt: skip


@cache
def paragraphs() -> tuple[str, ...]:
    """The paragraphs of the essays, in order."""
    return tuple(ESSAYS.read_text(encoding="utf-8").splitlines())


@cache
def help_topics() -> tuple[str, ...]:
    """Paragraphs of prose from the help topics of pydoc, each on one line, without repeats, code and tables."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    found = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if not block.startswith("     "))
    return tuple(dict.fromkeys(p for p in found if len(p.split()) >= 12 and p.endswith(".") and "**" not in p and "::=" not in p))


@cache
def sentences() -> tuple[str, ...]:
    """The sentences of `paragraphs`, in order."""
    return tuple(s for p in paragraphs() for s in re.split(r"(?<=[.!?])(?<!\bMr\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.) +(?=[A-Z])", p))


@cache
def common_words() -> tuple[str, ...]:
    """English words of 4 to 10 small letters in the essays, sorted; hyphenated words are left out."""
    return tuple(sorted(set(re.findall(r"(?<![\w'`-])[a-z]{4,10}(?![\w'`-])", "\n".join(paragraphs())))))


def source(module: str) -> str:
    """The source text of one module of `SOURCE_MODULES`."""
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin) if spec and spec.origin else None
    if path is None or path.suffix != ".py" or not path.exists():
        raise AccelError(f"this Python has no source for its module {module!r}, from which the code task is made")
    return path.read_text(encoding="utf-8")
