"""How long a bundle takes to load, and what stays in memory, for the benchmark."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgemix.bundle.reader import read_manifest

_LOAD = """
import json, sys, time
import onnxruntime, psutil
from edgemix.runtime import Mixture
bundle, threads, packed = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
held, begun = psutil.Process().memory_info().rss, time.perf_counter()
with Mixture.load(bundle, "cpu", threads, verify=False, drafts=False, packed=packed):
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "resident": psutil.Process().memory_info().rss - held}))
"""


def loading(bundle: Path, threads: int, *, times: int = 3) -> dict[str, Any]:
    """Medians of loading all members, warm, each time in a process of its own, as they are and from packed weights:
    seconds, bytes of memory that stay, and the bytes of their files.
    """
    manifest = read_manifest(bundle)
    folders = {Path(entry.graph).parent for entry in manifest.members}
    files = sum(entry.size for name, entry in manifest.files.items() if Path(name).parent in folders)
    command = [sys.executable, "-c", _LOAD, str(bundle), str(threads)]

    def load(packed: str) -> dict[str, float]:
        found: dict[str, float] = json.loads(subprocess.run([*command, packed], check=True, capture_output=True).stdout)
        return found

    with tempfile.TemporaryDirectory() as packed:
        load(packed)  # packs them
        runs = {prefix: [load(where) for _ in range(times)] for prefix, where in (("", ""), ("packed_", packed))}
    return {"files": files} | {
        f"{prefix}{name}": statistics.median(each[name] for each in found)
        for prefix, found in runs.items()
        for name in ("seconds", "resident")
    }
