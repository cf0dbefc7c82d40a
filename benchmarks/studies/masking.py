"""Does masking help? The sweeps behind `benchmarks/RESULTS.md`, each an ordinary `tokmask sweep`.

    TOKMASK_DATA=FOLDER python benchmarks/studies/masking.py trec trec-500   # these, then the JSON and the tables
    TOKMASK_DATA=FOLDER python benchmarks/studies/masking.py --all           # hours
    python benchmarks/studies/masking.py --list                              # the commands, to run them elsewhere

A finished run is not trained again, and an interrupted sweep is continued. The figures of each sweep go to
`benchmarks/results/masking/NAME.json`, from which `page.py` writes the tables of `benchmarks/RESULTS.md`.
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

from figures import RESULTS
from page import write

from tokmask_peft.artifacts import write_json
from tokmask_peft.study.results import SweepResults, analyse, read_sweep

RATES = ("--p", "0,0.1,0.2,0.3", "--seeds", "5")
REGULARIZERS = ("lora_dropout", "attention_dropout", "neftune", "label_smoothing")
COMBINED = [f"mask+{name}" for name in REGULARIZERS]
ARMS = ("--p", "0.1", "--seeds", "5", "--arms", ",".join(["none", *REGULARIZERS, "mask", *COMBINED]))
FEW = ("data.max_train=500", "training.epochs=10")
COMPARED = ("--p", "0.1", "--seeds", "3", "training.baseline=false")
PLAIN = (*COMPARED, "model.precision=fp32", "training.batching=padded")
TOP = (*COMPARED, "adapter.layers=0.5")
GROUPED = ("--p", "0", "--seeds", "3", "training.baseline=false", "training.batching=grouped")
SHORTER = ("training.epochs=6", "training.batch_size=32", "training.learning_rate=5e-4")


@dataclass(frozen=True, slots=True)
class Sweep:
    """One sweep: its name, the shipped recipe, and the further arguments."""

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
    Sweep("ud_tur_deu_lid", "ud_tur_deu_lid", (*RATES, *SHORTER)),
    Sweep("ud_tur_deu_pos", "ud_tur_deu_pos", (*RATES, *SHORTER)),
    Sweep("ud_tur_deu_lid-tuned", "ud_tur_deu_lid", ("--p", "0,0.1,0.3", "--seeds", "3")),
    Sweep("ud_tur_deu_pos-tuned", "ud_tur_deu_pos", ("--p", "0,0.1,0.3", "--seeds", "3")),
    Sweep("trec-500-arms", "trec", (*ARMS, *FEW)),
    Sweep("afrisenti_twi-500-arms", "afrisenti_twi", (*ARMS, *FEW)),
    Sweep("trec-500-plain", "trec", (*PLAIN, *FEW)),
    Sweep("trec-500-top", "trec", (*TOP, *FEW)),
    Sweep("ud_tur_deu_lid-plain", "ud_tur_deu_lid", (*PLAIN, *SHORTER)),
    Sweep("ud_tur_deu_lid-top", "ud_tur_deu_lid", (*TOP, *SHORTER)),
    Sweep("ud_tur_deu_pos-tuned-plain", "ud_tur_deu_pos", PLAIN),
    Sweep("ud_tur_deu_pos-tuned-top", "ud_tur_deu_pos", TOP),
    Sweep("trec-500-grouped", "trec", (*GROUPED, *FEW)),
    Sweep("afrisenti_twi-grouped", "afrisenti_twi", (*GROUPED, "training.epochs=4")),
    Sweep("mesent_mareng-grouped", "mesent_mareng", (*GROUPED, "training.epochs=2")),
)


def collected(sweep: Sweep, results: SweepResults) -> dict[str, Any]:
    """Return what the tables need of a sweep: its command, the analysis, the texts, and the machine."""
    runs = [run for by_seed in results.runs.values() for run in by_seed.values()]
    environments: list[dict[str, Any]] = []
    for run in runs:
        if (one := run["speed"]["environment"]) not in environments:
            environments.append(one)
    splits = runs[0]["data"]["splits"]
    return {
        "command": shlex.join(["tokmask", *sweep.command]),
        "analysis": analyse(results),
        "texts": {name: split["texts"] for name, split in splits.items()},
        "words": {name: split["words"] for name, split in splits.items()},
        "labels": len(runs[0]["labels"]),
        "steps": runs[0]["steps"],
        "best_at_end": {
            row.label: statistics.mean(run["best_step"] == run["steps"] for run in by_seed.values())
            for row, by_seed in results.runs.items()
        },
        "seconds_per_run": statistics.median(run["speed"]["step_seconds"] for run in runs),
        "environments": environments,
    }


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(sweep.name for sweep in SWEEPS)}")
    parser.add_argument("--all", action="store_true", help="every sweep, which takes hours")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the sweeps")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--collect", action="store_true", help="train nothing; take what is finished")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    arguments = parser.parse_args()
    known = {sweep.name: sweep for sweep in SWEEPS}
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"there is no sweep called {', '.join(unknown)}; there are {', '.join(known)}")
    if not (arguments.names or arguments.all or arguments.list):
        parser.error("name the sweeps to train, or give --all")
    for sweep in [known[name] for name in arguments.names] or SWEEPS:
        if arguments.list:
            print(shlex.join(["tokmask", *sweep.command]))
        elif not arguments.collect:
            where = [f"output_dir={arguments.runs}", "--workers", str(arguments.workers)]
            subprocess.run([sys.executable, "-m", "tokmask_peft", *sweep.command, *where], check=True)
        folder = arguments.runs / sweep.name
        if not arguments.list and any(folder.glob("*/result.json")):
            write_json(RESULTS / "masking" / f"{sweep.name}.json", collected(sweep, read_sweep(folder)))
    if not arguments.list:
        write()


if __name__ == "__main__":
    main()
