"""The loop of a sweep: what it does with its trials when the storage says that they are not its own any more."""

import sqlite3
from unittest.mock import Mock

import pytest

pytest.importorskip("optuna")

from tokmask_peft.study.ledger import Ledger
from tokmask_peft.study.plan import make_plan
from tokmask_peft.study.runner import Loop, Options


class Trial:
    """A running trial without a process."""

    def __init__(self, claim, recipe):
        self.claim, self.recipe, self.run = claim, recipe, Mock()
        self.code, self.killed, self.seconds, self.signals = None, 0, 1.0, 0
        self.evaluations = []

    def poll(self):
        return self.code

    def kill(self):
        self.killed, self.code = self.killed + 1, -9

    def close(self):
        pass

    def reason(self, code):
        return "stopped"

    def new_evaluations(self):
        return iter(self.evaluations)


@pytest.fixture
def loop(tmp_path):
    """A loop with both of its trials running."""
    plan = make_plan("quickstart", [f"output_dir={tmp_path}"], p="0,0.1", seeds="1,", name="mine")
    ledger = Ledger(plan, f"sqlite:///{tmp_path / 'sweep.db'}", prune=True)
    ledger.tidy()
    made = Loop(plan, ledger, Options(workers=2, prune=True, command=("true",)), Mock())
    for _ in plan.cells:
        claim = ledger.claim()
        made.running.append(Trial(claim, plan.recipe_of(claim.cell)))
    return made


def age_heartbeats(folder):
    database = sqlite3.connect(folder / "sweep.db")
    database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-10 minutes')")
    database.commit()
    database.close()


def said(loop):
    return [call.args[0] for call in loop.display.say.call_args_list]


def test_after_the_machine_has_slept_it_keeps_its_own_trials(loop, tmp_path):
    age_heartbeats(tmp_path)  # the clock that tells when a beat is due stood still
    loop._look()
    assert [cell.state for cell in loop.cells.values()] == ["running", "running"]
    assert not any(trial.killed for trial in loop.running)
    assert len(loop.running) == 2


def test_an_evaluation_of_a_trial_that_was_taken_over_stops_it(loop):
    gone, kept = loop.running
    loop.ledger.give_back(gone.claim)
    for trial in (gone, kept):
        trial.evaluations = [(10, 0.5), (20, 0.6)]
    loop._prune()
    assert (gone.killed, kept.killed) == (1, 0)
    assert loop.running == [kept]
    assert said(loop) == ["p0-seed1 was taken over by another worker; stopped here"]


def test_a_trial_that_is_stopped_while_another_ends_has_no_outcome(loop):
    ended, gone = loop.running
    loop.ledger.give_back(gone.claim)
    ended.code = 1
    loop._step()
    assert gone.killed == 1
    assert [line.split(":")[0] for line in said(loop) if "failed" in line] == ["failed p0-seed1"]
    assert gone not in loop.running
