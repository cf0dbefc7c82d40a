"""Does masking help? The sweeps behind `benchmarks/RESULTS.md`, each an ordinary `tokmask sweep`.

    TOKMASK_DATA=FOLDER python benchmarks/studies/masking.py                 # what is missing, then JSON and page
    TOKMASK_DATA=FOLDER python benchmarks/studies/masking.py trec trec-500   # only these
    python benchmarks/studies/masking.py --list                              # the commands, to run them elsewhere

A finished run is not trained again, a sweep that was broken off goes on. What came of each sweep goes to
`benchmarks/results/masking/NAME.json`, and `benchmarks/RESULTS.md` is written from these files alone.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import STUDY
from page import PAGE, write

from tokmask_peft.study.analysis import analyse
from tokmask_peft.study.results import SweepResults, read_sweep
from tokmask_peft.training.run_folder import write_json

RATES = ("--p", "0,0.1,0.2,0.3", "--seeds", "5")
REGULARIZERS = ("lora_dropout", "attention_dropout", "neftune", "label_smoothing")
COMBINED = [f"mask+{name}" for name in REGULARIZERS]
ARMS = ("--p", "0.1", "--seeds", "5", "--arms", ",".join(["none", *REGULARIZERS, "mask", *COMBINED]))
FEW = ("data.max_train=500", "training.epochs=10")
BESIDE = ("--p", "0.1", "--seeds", "3", "training.baseline=false")
PLAIN = (*BESIDE, "model.precision=fp32", "training.batching=padded")
TOP = (*BESIDE, "adapter.layers=0.5")


@dataclass(frozen=True, slots=True)
class Sweep:
    """One sweep: its name, the shipped recipe, and what follows it on the command line."""

    name: str
    recipe: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The arguments of `tokmask`."""
        return ["sweep", f"{self.recipe}/minilm", *self.arguments, "--name", self.name]


SWEEPS = (
    Sweep("trec", "trec", (*RATES, "training.epochs=4")),
    Sweep("trec-500", "trec", (*RATES, *FEW)),
    Sweep("trec-500-long", "trec", ("--p", "0,0.1,0.3", "--seeds", "3", "data.max_train=500", "training.epochs=30")),
    Sweep("mesent_mareng", "mesent_mareng", (*RATES, "training.epochs=2")),
    Sweep("afrisenti_twi", "afrisenti_twi", (*RATES, "training.epochs=4")),
    Sweep("afrisenti_twi-500", "afrisenti_twi", (*RATES, *FEW)),
    Sweep("ud_tur_deu_lid", "ud_tur_deu_lid", (*RATES, "training.epochs=6")),
    Sweep("ud_tur_deu_pos", "ud_tur_deu_pos", (*RATES, "training.epochs=6")),
    Sweep("trec-500-arms", "trec", (*ARMS, *FEW)),
    Sweep("afrisenti_twi-500-arms", "afrisenti_twi", (*ARMS, *FEW)),
    Sweep("trec-500-plain", "trec", (*PLAIN, *FEW)),
    Sweep("trec-500-top", "trec", (*TOP, *FEW)),
    Sweep("ud_tur_deu_pos-plain", "ud_tur_deu_pos", (*PLAIN, "training.epochs=6")),
    Sweep("ud_tur_deu_pos-top", "ud_tur_deu_pos", (*TOP, "training.epochs=6")),
    Sweep("ud_tur_deu_lid-plain", "ud_tur_deu_lid", (*PLAIN, "training.epochs=6")),
    Sweep("ud_tur_deu_lid-top", "ud_tur_deu_lid", (*TOP, "training.epochs=6")),
)


def collected(sweep: Sweep, results: SweepResults) -> dict[str, Any]:
    """Return what the page needs of a sweep: its command, what was compared, the texts, and the machine."""
    runs = [run for by_seed in results.runs.values() for run in by_seed.values()]
    splits = runs[0]["data"]["splits"]
    return {
        "command": shlex.join(["tokmask", *sweep.command]),
        "analysis": analyse(results),
        "texts": {name: split["texts"] for name, split in splits.items()},
        "words": {name: split["words"] for name, split in splits.items()},
        "labels": len(runs[0]["labels"]),
        "steps": runs[0]["steps"],
        "best_at_end": sum(run["best_step"] == run["steps"] for run in runs) / len(runs),
        "seconds_per_run": statistics.median(run["speed"]["step_seconds"] for run in runs),
        "environment": runs[0]["speed"]["environment"],
    }


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(sweep.name for sweep in SWEEPS)}; default all")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the sweeps")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--collect", action="store_true", help="train nothing; take what is finished")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    arguments = parser.parse_args()
    known = {sweep.name: sweep for sweep in SWEEPS}
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"there is no sweep called {', '.join(unknown)}; there are {', '.join(known)}")
    for sweep in [known[name] for name in arguments.names] or SWEEPS:
        if arguments.list:
            print(shlex.join(["tokmask", *sweep.command]))
        elif not arguments.collect:
            where = [f"output_dir={arguments.runs}", "--workers", str(arguments.workers)]
            subprocess.run([sys.executable, "-m", "tokmask_peft", *sweep.command, *where], check=True)
        folder = arguments.runs / sweep.name
        if not arguments.list and any(folder.glob("*/result.json")):
            STUDY.mkdir(exist_ok=True)
            write_json(STUDY / f"{sweep.name}.json", collected(sweep, read_sweep(folder)))
    if not arguments.list:
        write()
        print(PAGE)


if __name__ == "__main__":
    main()
