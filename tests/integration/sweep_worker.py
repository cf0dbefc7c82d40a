"""A worker of a sweep whose trials are stand-ins: `python sweep_worker.py FOLDER SEEDS [BROKEN-SEED] [--retry]`.

The stand-in writes a line when it starts and when it ends, and a result; it takes a tenth of a second. The processes of
the trials import this file, so that it imports the sweep only where it runs one.
"""

import functools
import json
import os
import sys
import time


def train(broken, recipe, resume):
    def note(what):
        line = f"{what} {recipe.name} {os.getpid()}\n".encode()
        journal = os.open(recipe.run_dir.parent / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(journal, line)
        os.close(journal)

    note("start")
    time.sleep(0.1)
    if recipe.seed == broken:
        print("Error: the stand-in was asked to fail")
        sys.exit(2)
    note("end")
    recipe.run_dir.mkdir(exist_ok=True)
    score = recipe.seed / 100 + recipe.masking.p
    scores = {"f1_macro": score, "f1_weighted": score}
    (recipe.run_dir / "result.json").write_text(json.dumps({"labels": [], "validation": scores, "test": scores}))


def main() -> int:
    from tokmask_peft.errors import RunInterruptedError
    from tokmask_peft.study.plan import make_plan
    from tokmask_peft.study.runner import Options, run_sweep

    folder, seeds, broken = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else -1
    plan = make_plan("quickstart", [f"output_dir={folder}"], p="0,0.1", seeds=seeds, name="stub")
    stand_in, retry = functools.partial(train, broken), "--retry" in sys.argv
    try:
        cells = run_sweep(plan, options=Options(workers=2, train=stand_in, pause=0.02, look=0.1, retry_failed=retry))
    except RunInterruptedError as error:
        print(error)
        return 130
    return int(any(cell.state == "failed" for cell in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
