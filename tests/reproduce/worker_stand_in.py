"""Behaves towards a pool like `reproduce.worker`, without JAX. Arguments: FOLDER CORES. `test_examples` of the run in
FOLDER says what it does."""

import json
import os
import pathlib
import signal
import sys
import time

folder, cores = pathlib.Path(sys.argv[1]), sys.argv[2]
run = json.loads((folder / "run.json").read_text())
kind = run["evaluation"]["test_examples"]  # 1: succeeds at once, 2: fails, 3: sleeps, 4: ignores SIGTERM
begun = folder / "begun.txt"
with begun.open("a") as file:
    file.write(f"{cores} {os.getpid()} {time.monotonic()}\n")
if kind == 2:
    print("error: broken on purpose", flush=True)
    sys.exit(2)
if kind == 4:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if kind >= 3 and not (folder / "patient.txt").exists():
    print("sleeping", flush=True)
    time.sleep(600)
canned = json.loads((folder.parent / "canned.json").read_text())
(folder / "result.json").write_text(json.dumps({**canned, "id": folder.name}))
