"""The runs of stages 1 and 2 of `benchmarks/studies/PLAN.md`, many at a time on one GPU.

    bash .gpu/measure.sh study                                 stage 1, on the machine (E5 in `pack.sh` made .gpu-e5)
    bash .gpu/measure.sh study --stage 2 --arms mask+views,annealed
    bash .gpu/measure.sh study --list                          the sweeps as commands
    DRY=1 bash benchmarks/gpu/measure.sh study --only stage1-trec/none      on a CPU, two steps of a tiny model

A stage is a list of sweeps. Their runs share the workers in the order of their seeds, so that a call that is cut off
leaves whole seeds. `$OUT/stage1.tar.gz` grows with every run that ends. The next call goes on from the archives in
`.gpu-study`. Unpacked in the repository's root it is what `benchmarks/studies/masking.py NAME --collect` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import re
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from measure import END, OUT

from tokmask_peft.artifacts import Result, RunFolder
from tokmask_peft.recipe.loading import differences, load_recipe
from tokmask_peft.recipe.schema import Recipe
from tokmask_peft.study.plan import SWEEP_FILE, Plan, make_plan
from tokmask_peft.study.worker import Worker, train_cell

DRY = os.environ.get("DRY") == "1"
RATES = ("3.0e-4", "1.0e-3")
"""Learning rates, of which validation chooses at p = 0 with seed 1."""
SCREENED = ("mask", "drop:0.1", "share:0.5", "overfit:0.3", "mask+views", "views", "annealed", "twice")
OWN = {  # arms that change the recipe, so that each is a sweep
    "annealed": ("anneal:0.1", ("masking.replace=drop",)),
    "twice": ("none", ()),
}


@dataclass(frozen=True, slots=True)
class Texts:
    """What a data set trains on."""

    recipe: str
    epochs: int  # about 320 steps with batches of 16
    most: int | None
    learning_rate: str | None = None  # if validation has chosen it already


TEXTS = {
    1: {
        "trec": Texts("trec", 10, 500, "1.0e-3"),  # by a CPU in fp32: .9183 on validation, and .8996 with 3e-4
        "twi": Texts("afrisenti_twi", 5, 1000),
        "sagt": Texts("ud_tur_deu_lid", 9, None),
    },
    2: {
        "kin": Texts("afrisenti_kin", 5, 1000),
        "swa": Texts("afrisenti_swa", 5, 1000),
        "tso": Texts("afrisenti_tso", 6, 1000),  # it has 804
        "sentimix": Texts("sa_spaeng", 5, 1000),
        "melid": Texts("melid_mareng", 10, 500),
        "lince": Texts("lid_spaeng", 10, 500),
    },
}
SEEDS = {1: "11,12,13", 2: "21,22,23,24,25,26,27,28"}


@dataclass(frozen=True, slots=True)
class Sweep:
    """The words of one `tokmask sweep`."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    seeds: str
    arms: str | None = None
    grid: str | None = None

    @property
    def command(self) -> str:
        """The command line, as it is typed on a machine that has the whole backbone."""
        words = ["tokmask", "sweep", self.recipe, *self.overrides, "--name", self.name, "--seeds", self.seeds]
        words += ["--grid", self.grid] if self.grid else []
        return shlex.join([*words, *(["--p", "0,0.1", "--arms", self.arms] if self.arms else [])])

    def plan(self, *more: str) -> Plan:
        """Return the runs, with further settings."""
        rates, grid = ("0,0.1" if self.arms else None), [self.grid] if self.grid else []
        given = (*self.overrides, *more)
        return make_plan(self.recipe, given, p=rates, seeds=self.seeds, grid=grid, arms=self.arms, name=self.name)


def tuning(stage: int, name: str) -> Sweep:
    """Return the sweep that chooses the learning rate of a data set."""
    one = _sweep(stage, name, f"lr-{name}", ("masking.p=0", "training.baseline=false"))
    return replace(one, seeds="1,", grid=f"training.learning_rate={','.join(RATES)}")


def sweeps(stage: int, name: str, learning_rate: str, arms: Iterable[str]) -> list[Sweep]:
    """Return the sweeps of a data set: one of its arms and, if they are among them, those of `OWN`."""
    arms, rate = [*arms], f"training.learning_rate={learning_rate}"
    shared = ",".join(["none", "label_smoothing", *(arm for arm in arms if arm not in OWN)])
    found = [replace(_sweep(stage, name, name, (rate,)), arms=shared)]
    for arm in (arm for arm in arms if arm in OWN):
        own, more = OWN[arm]
        more = (rate, *more, "training.baseline=false")
        found.append(replace(_sweep(stage, name, f"{name}-{arm}", more, 2 if arm == "twice" else 1), arms=own))
    return found


def _sweep(stage: int, name: str, suffix: str, more: tuple[str, ...], times: int = 1) -> Sweep:
    texts = TEXTS[stage][name]
    few = (f"data.max_train={texts.most}",) if texts.most else ()
    overrides = (*few, f"training.epochs={texts.epochs * times}", "training.batch_size=16", *more)
    return Sweep(f"stage{stage}-{suffix}", f"{texts.recipe}/e5-small", overrides, SEEDS[stage])


class Archive:
    """A .tar.gz that grows: each run is a compressed piece of its own, so one that is cut off has all earlier ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"")

    def add(self, files: Iterable[Path], **texts: str) -> None:
        """Append files, and texts by their paths, in one write."""
        buffer = io.BytesIO()
        tar = tarfile.open(fileobj=buffer, mode="w")  # noqa: SIM115 (not closed: that would write the end of the archive)
        for file in files:
            if file.is_file():
                tar.add(file)
        for path, text in texts.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
        with self.path.open("ab") as file:
            file.write(gzip.compress(buffer.getvalue()))

    @staticmethod
    def unpack(path: Path) -> None:
        """Write the runs of an archive to the current folder; of one that is cut off those that are whole."""
        piece: dict[Path, bytes] = {}
        with contextlib.suppress(tarfile.ReadError, EOFError), tarfile.open(path, "r:gz") as tar:
            for entry in tar:
                file, content = Path(entry.name), tar.extractfile(entry)
                piece[file] = content.read() if content else b""
                if file.name == "result.json" and file.parts[0] == "runs" and ".." not in file.parts:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    for one in (one for one in piece if one.parent == file.parent):
                        one.write_bytes(piece[one])


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


class Stage:
    """The runs of a stage that wait, in order, and those that are done."""

    def __init__(self, number: int, arms: Sequence[str], only: str, settings: Sequence[str], archive: Archive) -> None:
        self.number, self.arms, self.only, self.settings = number, arms, re.compile(only), settings
        self.archive = archive
        self.waiting: list[tuple[int, int, int, Recipe]] = []
        self.done = self.failed = 0
        self.tuned: dict[str, Plan | None] = {}
        for name, texts in TEXTS[number].items():
            if texts.learning_rate is None:
                self.tuned[name] = self._queue(name, tuning(number, name))
            else:
                self._queue_arms(name, texts.learning_rate)
        self.choose()

    def choose(self) -> None:
        """Queue the arms of the data sets whose learning rate can be chosen now."""
        for name, plan in self.tuned.items():
            runs = [] if plan is None else [(RunFolder(plan.folder / cell.name), cell) for cell in plan.cells]
            if runs and all(run.finished() for run, _ in runs):
                scores = {cell.setting[0][1]: Result.read(run.result).validation["f1_macro"] for run, cell in runs}
                say(f"learning rate of {name}: {scores}")
                self.tuned[name] = None
                self._queue_arms(name, max(scores, key=scores.__getitem__))

    def _queue_arms(self, name: str, learning_rate: str) -> None:
        for sweep in sweeps(self.number, name, learning_rate, self.arms):
            self._queue(name, sweep)

    def _queue(self, name: str, sweep: Sweep) -> Plan:
        plan = sweep.plan("model.backbone_path=e5", "output_dir=runs", *self.settings)
        plan.folder.mkdir(parents=True, exist_ok=True)
        plan.write()
        command = json.dumps({"command": sweep.command}, indent=2) + "\n"
        self.archive.add([plan.folder / SWEEP_FILE], **{f"benchmarks/results/masking2/{sweep.name}.json": command})
        for cell in plan.cells:
            recipe = plan.recipe_of(cell)
            run = RunFolder(recipe.run_dir)
            if run.finished():
                changed = differences(load_recipe(run.recipe), recipe)
                # each call has a folder of its own
                if changed := [line for line in changed if not line.startswith("model.backbone_path:")]:
                    sys.exit(f"{run.root} was made by another recipe: {'; '.join(changed)}")
                self.keep(run)
            elif self.only.search(f"{sweep.name}/{cell.name}"):
                self.waiting.append((cell.seed, [*TEXTS[self.number]].index(name), len(self.waiting), recipe))
        self.waiting.sort(key=lambda one: one[:3])
        return plan

    def keep(self, run: RunFolder) -> None:
        """Add a finished run to the archive."""
        self.archive.add([run.recipe, run.predictions, run.result])
        self.done += 1

    def train(self, count: int) -> None:
        """Train what waits with as many workers, until nothing is left or the time is over."""
        workers, running = [Worker(train_cell, 1) for _ in range(count)], set[Worker]()
        try:
            while (self.waiting or running) and time.time() < END:
                for worker in [one for one in running if one.poll() is not None]:
                    running.remove(worker)
                    self._settle(worker)
                for worker in [one for one in workers if one not in running][: len(self.waiting)]:
                    worker.begin(self.waiting.pop(0)[-1])
                    running.add(worker)
                time.sleep(0.2)
        finally:
            for worker in workers:
                worker.end()
        left = f"{len(self.waiting) + len(running)} known ones are left"
        say(f"stage {self.number}: {self.done} runs are done, {self.failed} failed, {left}")

    def _settle(self, worker: Worker) -> None:
        name, code = f"{worker.run.root.parent.name}/{worker.run.root.name}", worker.poll() or 0
        if code == 0 and worker.run.finished():
            self.keep(worker.run)
            say(f"{name} in {worker.seconds:.0f} s")
            self.choose()
        else:
            self.failed += 1
            self.archive.add([worker.log])
            say(f"{name} failed: {worker.reason(code)}")


def main() -> None:
    """Run the command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=TEXTS, default=1)
    parser.add_argument("--arms", help=f"of stage 2, the arms that are confirmed; of {', '.join(SCREENED)}")
    parser.add_argument("--workers", type=int, default=12, help="runs at once")
    parser.add_argument("--only", default="", help="a regular expression: train runs whose SWEEP/RUN matches")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    given = parser.parse_args()
    arms = given.arms.split(",") if given.arms else SCREENED
    if unknown := {*arms} - {*SCREENED}:
        parser.error(f"there is no arm {', '.join(sorted(unknown))}; there are {', '.join(SCREENED)}")
    if given.stage == 2 and not given.arms:
        parser.error("stage 2 needs --arms: those that stage 1 chose")
    if given.list:
        for name, texts in TEXTS[given.stage].items():
            chosen = [] if texts.learning_rate else [tuning(given.stage, name)]
            for sweep in (*chosen, *sweeps(given.stage, name, texts.learning_rate or "CHOSEN", arms)):
                say(sweep.command)
        return
    archives = sorted((Path(os.environ.get("REPO", ".")).resolve() / ".gpu-study").glob("*.tar.gz"))
    out, backbone = OUT.resolve(), Path(os.environ.get("E5", "missing")).resolve()
    folder = Path(os.environ.get("GPU_WORK", tempfile.gettempdir())) / "study"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for archive in archives:
        Archive.unpack(archive)
    if DRY and not Path("e5").exists():
        from tiny_models import build

        model, tokenizer = build("bert")
        for one in (model.base_model, tokenizer):
            one.save_pretrained("e5")
    elif not DRY:
        if not backbone.is_dir() or "TOKMASK_DATA" not in os.environ:
            sys.exit("The study needs .gpu-e5, which pack.sh makes if E5 and TOKMASK_DATA are set.")
        Path("e5").unlink(missing_ok=True)
        Path("e5").symlink_to(backbone)
    tiny = ("training.max_steps=2", "data.max_train=64", "data.max_length=64") if DRY else ()
    Stage(given.stage, arms, given.only, tiny, Archive(out / f"stage{given.stage}.tar.gz")).train(given.workers)


if __name__ == "__main__":
    main()
