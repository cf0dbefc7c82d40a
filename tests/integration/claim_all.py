"""Claim every cell of a sweep as fast as possible, and print those: `python claim_all.py FOLDER NUMBER WORKERS`."""

import sys
import time
from pathlib import Path

from tokmask_peft.study.ledger import Ledger
from tokmask_peft.study.plan import make_plan


def main() -> None:
    folder = Path(sys.argv[1])
    plan = make_plan("quickstart", [f"output_dir={folder}"], p="0,0.1", seeds="10", name="stub")
    plan.folder.mkdir(exist_ok=True)
    ledger = Ledger(plan, plan.folder / "sweep.journal")
    (folder / f"ready-{sys.argv[2]}").touch()
    while len(list(folder.glob("ready-*"))) < int(sys.argv[3]):
        time.sleep(0.001)
    while claim := ledger.claim():
        print(claim.cell.name, flush=True)


main()
