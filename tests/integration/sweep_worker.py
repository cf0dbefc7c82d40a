"""A worker of a sweep whose trials are stand-ins: `python sweep_worker.py FOLDER CELLS [BROKEN-SEED]`.

The stand-in writes a line when it starts and when it ends, and a result; it takes a fifth of a second.
"""

import json
import os
import sys
import time
from pathlib import Path


def stand_in(broken: int) -> None:
    from tokmask_peft.study.worker import tasks

    for task in tasks():
        train(task["recipe"], broken)


def train(recipe: dict, broken: int) -> None:
    run = Path(recipe["output_dir"]) / recipe["name"]

    def note(what):
        line = f"{what} {recipe['name']} {os.getpid()}\n".encode()
        journal = os.open(run.parent / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(journal, line)
        os.close(journal)

    note("start")
    time.sleep(0.2)
    if recipe["seed"] == broken:
        print("Error: the stand-in was asked to fail")
        sys.exit(2)
    note("end")
    run.mkdir(exist_ok=True)
    score = recipe["seed"] / 100 + recipe["masking"]["p"]
    scores = {"f1_macro": score, "f1_weighted": score}
    (run / "result.json").write_text(json.dumps({"labels": [], "validation": scores, "test": scores}))


def main() -> int:
    folder, seeds, broken = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else -1
    if folder == "--stand-in":
        stand_in(int(seeds))
        return 0
    from tokmask_peft.study.plan import make_plan
    from tokmask_peft.study.runner import Options, run_sweep

    plan = make_plan("quickstart", [f"output_dir={folder}"], p="0,0.1", seeds=seeds, name="stub")
    retry = "--retry" in sys.argv
    from tokmask_peft.errors import RunInterruptedError

    command = (sys.executable, __file__, "--stand-in", str(broken))
    try:
        cells = run_sweep(plan, options=Options(workers=2, command=command, pause=0.02, look=0.1, retry_failed=retry))
    except RunInterruptedError as error:
        print(error)
        return 130
    return int(any(cell.state == "failed" for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
