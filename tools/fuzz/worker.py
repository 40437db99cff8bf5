"""Run cases in a process with bounded memory, and say how each went."""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cases import Bases, Case

from edgemix.errors import EdgemixError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOST_MEMORY = 2 << 30
"""Bytes that a case may take; the process may have twice as many, so that more is seen and the machine survives."""
_PROMPT = "hello world, 12 é \N{GRINNING FACE} a\n"
_MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello aaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"},
]


def main(folder: Path, bases: Path) -> None:
    """Read seeds from standard input, and write each case's outcome as a line of JSON to standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sound = Bases(bases)
    from edgemix import Mixture

    Mixture.load(sound.plain, provider="cpu", threads=1).generate(_PROMPT, max_new_tokens=2)  # imports what is needed
    limit = _virtual() + 2 * MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        outcome = run(seeded(int(line)), sound, folder)
        print(json.dumps(outcome), file=answers, flush=True)


def seeded(seed: int) -> Random:
    """Return the generator that makes a case."""
    return Random(seed)  # noqa: S311 - cases must come back


def run(rng: Random, bases: Bases, folder: Path, *, show: bool = False) -> dict[str, Any]:
    """Make a case, and do with it what a user would; `show` prints the traceback of what fails."""
    case = Case(rng, bases, folder)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    outcome = {"part": case.part, "kind": "clean", "detail": ""}
    for name, step in _steps(case):
        try:
            step()
        except EdgemixError as error:
            outcome["detail"] = outcome["detail"] or f"{name}: {error}"[:300]
            str(error).encode()
        except BaseException as error:  # noqa: BLE001 - a panic is one
            if show:
                traceback.print_exc()
            kind = "memory" if isinstance(error, MemoryError) else "traceback"
            said = f"{type(error).__name__}: {error!s:.200} {_place()}"
            return outcome | {"kind": kind, "detail": f"{name}: {said}"}
    used = _resident("VmHWM") - before
    return outcome | ({"kind": "memory", "detail": f"{used >> 20:,} MiB"} if used > MOST_MEMORY else {})


def _steps(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what is done with a case; a step that is refused does not keep the next from being tried."""
    from edgemix import Mixture
    from edgemix.recipe.load import load_recipe

    if (recipe := case.recipe) is not None:
        yield "recipe", lambda: load_recipe(recipe)
        return
    opened: list[Mixture] = []
    yield "load", lambda: opened.append(Mixture.load(case.bundle, provider="cpu", threads=1, plan=False))
    if not opened:
        return
    with opened[0] as mixture:
        if (session := case.session) is not None:
            yield "restore", lambda: mixture.restore(session).send("hello", max_new_tokens=2)
            yield "prefixes", lambda: mixture.load_prefixes(session)
            yield "generate", lambda: mixture.generate("hello", max_new_tokens=2)
        elif case.part == "template":
            yield "chat", lambda: mixture.chat(_MESSAGES, max_new_tokens=2)
        else:
            yield "generate", lambda: mixture.generate(_PROMPT, max_new_tokens=2)
            yield "chat", lambda: mixture.chat(_MESSAGES, max_new_tokens=2)
            yield "score", lambda: mixture.score("hello world")


def _place() -> str:
    """Return where in edgemix the current exception was raised."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    own = [frame for frame in frames if "/site-packages/" not in frame.filename and "/fuzz/" not in frame.filename]
    return (
        f"at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else f"at {frames[-1].filename}:{frames[-1].lineno}"
    )


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) << 10


def _virtual() -> int:
    return _resident("VmSize")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
