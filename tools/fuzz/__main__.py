"""Try bundles that are hostile in every way that a grammar of mutations knows, and count what is not refused cleanly.

    python tools/fuzz [--cases 10000] [--seed 0] [--processes 2] [-o FAILURES.jsonl]
    python tools/fuzz --replay SEED [--keep FOLDER]
    python tools/fuzz --guided [arguments of libFuzzer]

Each case is a mutation of a tiny bundle, made from its seed alone, whose sizes, checksums and fingerprint agree, as an
attacker would make it; half of them are in the tokenizer and the chat template. A process with bounded memory loads it,
generates two tokens and chats once. What may come of that is an answer or an EdgemixError; a traceback, an abort of the
process, more than 20 seconds, and more than 2 GiB are failures. They are printed with their seeds, and written to the
output, a line of JSON each; `--replay` runs one in this process, with its traceback. Exits 1 if a case failed.

With `--guided`, atheris (where it is installed) chooses the mutations by the coverage of edgemix's code.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SECONDS = 20.0
"""Longest that a case may take."""
KINDS = ("clean", "traceback", "abort", "hang", "memory")
_CASES_OF_A_PROCESS = 400
_STARTING = 120.0


class Worker:
    """A process that runs cases one after the other; where it dies or hangs, another takes its place."""

    def __init__(self, folder: Path, bases: Path) -> None:
        self._folder, self._bases, self._process, self._left = folder, bases, None, 0
        self._process: subprocess.Popen[str] | None

    def run(self, seed: int) -> dict[str, Any]:
        """Run a case, and return its outcome."""
        if self._process is None or not self._left:
            self.stop()
            self._start()
        self._left -= 1
        process = self._process
        assert process is not None and process.stdin is not None  # noqa: PT018
        started = time.monotonic()
        process.stdin.write(f"{seed}\n")
        process.stdin.flush()
        answer = self._answer(SECONDS)
        if not answer:
            hangs = time.monotonic() - started >= SECONDS
            detail = "" if hangs else f"exit code {process.wait()}"
            self.stop()
            return {"seed": seed, "part": "", "kind": "hang" if hangs else "abort", "detail": detail}
        return {"seed": seed, **json.loads(answer), "seconds": round(time.monotonic() - started, 2)}

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        command = [sys.executable, str(Path(__file__).parent / "worker.py"), str(self._folder), str(self._bases)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        self._left = _CASES_OF_A_PROCESS
        if self._answer(_STARTING) != "ready\n":
            raise SystemExit("a worker does not start; see: python tools/fuzz --replay 0")

    def _answer(self, seconds: float) -> str:
        assert self._process is not None and self._process.stdout is not None  # noqa: PT018
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else ""


def outcomes(seeds: Sequence[int], processes: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Run cases in several processes, and yield their outcomes, in the order of their seeds."""
    from cases import Bases

    Bases(folder / "bases")
    parts = [seeds[start::processes] for start in range(processes)]

    def work(number: int) -> Iterator[dict[str, Any]]:
        worker = Worker(folder / f"case{number}", folder / "bases")
        try:
            for seed in parts[number]:
                yield worker.run(seed)
        finally:
            worker.stop()

    runs = [work(number) for number in range(processes)]
    with ThreadPoolExecutor(processes) as threads:
        for start in range(0, len(seeds), processes):
            yield from threads.map(next, runs[: len(seeds) - start])
    for each in runs:
        each.close()  # type: ignore[attr-defined]


def show(counts: Counter[tuple[str, str]]) -> None:
    parts = sorted({part for part, _ in counts})
    print(f"{'':14}" + "".join(f"{kind:>11}" for kind in KINDS))
    for part in parts:
        print(f"{part:14}" + "".join(f"{counts[part, kind]:11,}" for kind in KINDS))
    print(f"{'all':14}" + "".join(f"{sum(counts[part, kind] for part in parts):11,}" for kind in KINDS))


def replay(seed: int, keep: Path | None) -> None:
    """Run one case in this process."""
    from cases import Bases
    from worker import run, seeded

    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary) / "case"
        print(json.dumps(run(seeded(seed), Bases(Path(temporary) / "bases"), folder, show=True), indent=2))


def part_of(seed: int) -> str:
    """Return what a seed's case mutates."""
    from cases import PARTS
    from worker import seeded

    return seeded(seed).choices([*PARTS], [*PARTS.values()])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="the first case's; the others follow")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", metavar="PART", help="skip cases that mutate something else")
    parser.add_argument("--replay", type=int, metavar="SEED")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the replayed case there")
    parser.add_argument("--guided", action="store_true", help="let atheris choose, until it is interrupted")
    parser.add_argument("-o", "--output", type=Path, default=Path("fuzz-failures.jsonl"))
    options, rest = parser.parse_known_args()
    if options.guided:
        from guided import main as guided

        guided(rest)
        return
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.replay is not None:
        replay(options.replay, options.keep)
        return
    counts: Counter[tuple[str, str]] = Counter()
    seeds: Sequence[int] = range(options.seed, options.seed + options.cases)
    if options.only:
        seeds = [seed for seed in seeds if part_of(seed) == options.only]
    with tempfile.TemporaryDirectory(prefix="edgemix-fuzz-") as folder, options.output.open("w") as output:
        for outcome in outcomes(seeds, options.processes, Path(folder)):
            outcome["part"] = outcome["part"] or part_of(outcome["seed"])
            counts[outcome["part"], outcome["kind"]] += 1
            if outcome["kind"] != "clean":
                print(json.dumps(outcome), flush=True)
                output.write(json.dumps(outcome) + "\n")
                output.flush()
    show(counts)
    sys.exit(1 if any(kind != "clean" for _, kind in counts) else 0)


if __name__ == "__main__":
    main()
