"""The queue that workers share: claimed once, given up when the worker is gone, never lost."""

import sqlite3

import pytest

pytest.importorskip("optuna")

import optuna

from tokmask_peft.errors import SweepError
from tokmask_peft.study import ledger as worker
from tokmask_peft.study.ledger import Ledger, open_storage
from tokmask_peft.study.plan import make_plan


@pytest.fixture
def open_ledger(tmp_path):
    """Return a function that opens the sweep as one more process would."""

    def make(overrides=(), prune=False, **axes):
        plan = make_plan("quickstart", overrides, name="shared", **{"p": "0,0.1", "seeds": "2", **axes})
        return Ledger(plan, f"sqlite:///{tmp_path / 'sweep.db'}", prune=prune)

    return make


def states(ledger):
    return [cell.state for cell in ledger.look().values()]


def test_every_cell_is_claimed_once_in_the_order_of_the_plan(open_ledger):
    one, two = open_ledger(), open_ledger()
    one.tidy()
    two.tidy()
    claims = [one.claim(), two.claim(), one.claim(), two.claim()]
    assert [claim.cell.name for claim in claims] == [cell.name for cell in one.plan.cells]
    assert one.claim() is None
    assert states(two) == ["running"] * 4
    for claim in claims:
        one.done(claim, 0.5, {"seconds": 2.0})
    assert two.tidy()["p0-seed1"].score == 0.5
    assert two.look()["p0-seed1"].seconds == 2.0
    assert two.claim() is None
    assert len(one._study.get_trials()) == 4


def test_a_cell_that_was_enqueued_twice_is_run_once(open_ledger):
    one, two = open_ledger(), open_ledger()
    for ledger in (one, two):  # as when both look before either adds
        for cell in ledger.plan.cells:
            ledger._enqueue(cell, -1)
    claims = [claim for _ in range(4) for ledger in (two, one) if (claim := ledger.claim())]
    assert sorted(claim.cell.name for claim in claims) == sorted(cell.name for cell in one.plan.cells)
    for claim in claims:
        one.failed(claim, "broken")
    assert [one.claim(), two.claim()] == [None, None]
    assert [cell.state for cell in two.tidy().values()] == ["failed"] * 4


def test_the_double_of_a_failed_trial_is_no_second_chance(open_ledger):
    ledger = open_ledger(p="0", seeds="1")
    for _ in range(2):
        ledger._enqueue(ledger.plan.cells[0], -1)
    ledger.failed(ledger.claim(), "broken")
    assert ledger.claim() is None
    assert ledger.tidy()["p0-seed1"].state == "failed"


def test_the_claim_locks_against_other_processes(open_ledger, tmp_path):
    # SELECT … FOR UPDATE does nothing on SQLite: without a lock from the first read two workers can claim one trial
    ledger = open_ledger()
    with ledger.storage.engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        other = sqlite3.connect(tmp_path / "sweep.db", timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_a_dead_worker_s_trial_is_run_again_once(open_ledger, monkeypatch):
    ledger = open_ledger(p="0", seeds="1")
    ledger.tidy()
    me = worker.identity()
    monkeypatch.setattr(worker, "identity", lambda: {**me, "pid": 2**22 + 1})  # no such process
    ledger.claim()
    monkeypatch.setattr(worker, "identity", lambda: me)
    others = [open_ledger(p="0", seeds="1") for _ in range(2)]
    for other in others:
        other.tidy()
    assert [bool(other.claim()) for other in others] == [True, False]
    numbers = [(trial.state.name, trial.user_attrs["cell"]) for trial in ledger._study.get_trials()]
    assert numbers == [("FAIL", "p0-seed1"), ("RUNNING", "p0-seed1")]


def test_a_living_worker_keeps_its_trial(open_ledger):
    ledger = open_ledger(p="0", seeds="1")
    ledger.tidy()
    claim = ledger.claim()
    assert open_ledger(p="0", seeds="1").tidy()["p0-seed1"].state == "running"
    assert ledger.beat(claim)


def test_a_worker_of_another_machine_is_given_up_when_its_heartbeat_is_old(open_ledger, tmp_path, monkeypatch):
    ledger = open_ledger(p="0", seeds="1")
    ledger.tidy()
    me = worker.identity()
    monkeypatch.setattr(worker, "identity", lambda: {**me, "host": "elsewhere", "pid": 2**22 + 1})
    claim = ledger.claim()
    monkeypatch.setattr(worker, "identity", lambda: me)
    other = open_ledger(p="0", seeds="1")
    assert other.tidy()["p0-seed1"].state == "running"
    database = sqlite3.connect(tmp_path / "sweep.db")
    database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-10 minutes')")
    database.commit()
    database.close()
    assert other.tidy()["p0-seed1"].state == "waiting"
    assert not ledger.beat(claim)  # it was slow, not dead: now it must stop
    ledger.done(claim, 0.1, {})  # too late
    assert other.look()["p0-seed1"].state == "waiting"


def test_failed_is_final_until_asked_for(open_ledger):
    ledger = open_ledger(p="0", seeds="1")
    ledger.tidy()
    ledger.failed(ledger.claim(), "out of memory")
    assert ledger.tidy()["p0-seed1"].reason == "out of memory"
    again = open_ledger(p="0", seeds="1")
    again.retry_failed()
    again.tidy()
    again.failed(again.claim(), "still")
    assert again.tidy()["p0-seed1"].reason == "still"
    assert again.claim() is None


def test_interrupted_goes_on(open_ledger):
    ledger = open_ledger(p="0", seeds="1")
    ledger.tidy()
    ledger.give_back(ledger.claim())
    assert ledger.tidy()["p0-seed1"].state == "waiting"
    assert ledger.claim() is not None


def test_rates_and_seeds_may_be_added_but_not_another_recipe(open_ledger):
    ledger = open_ledger()
    ledger.tidy()
    ledger.done(ledger.claim(), 0.5, {})
    wider = open_ledger(p="0,0.1,0.2", seeds="3")
    assert [cell.state for cell in wider.tidy().values()].count("done") == 1
    with pytest.raises(SweepError, match=r"training.epochs: .* before, 9.0 now.*another --name"):
        open_ledger(["training.epochs=9"])
    with pytest.raises(SweepError, match="axes"):
        open_ledger(grid=["adapter.r=4,8"])


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_draw_what_is_asked_for_and_a_rerun_draws_the_same(open_ledger, sampler):
    axes = {"sampler": sampler, "trials": 12, "grid": ["training.learning_rate=1e-5..1e-3:log", "adapter.r=4..8"]}
    ledger = open_ledger(**axes)
    ledger.tidy()
    drawn = {}
    for number in range(12):
        claim = ledger.claim()
        recipe = ledger.plan.recipe_of(claim.cell, claim.drawn)
        assert recipe.masking.p in (0, 0.1)
        assert 1e-5 <= recipe.training.learning_rate <= 1e-3
        assert 4 <= recipe.adapter.r <= 8
        assert recipe.seed == 1 + number % 2
        drawn[claim.cell.name] = claim.drawn
        if number < 11:
            ledger.done(claim, recipe.training.learning_rate, {})
    assert ledger.claim() is None
    assert len(set(drawn.values())) > 6
    ledger.give_back(claim)
    ledger.tidy()
    assert ledger.claim().drawn == drawn["trial-0011"]


def test_pruning_looks_at_trials_at_the_same_step(open_ledger):
    ledger = open_ledger(prune=True, seeds="3")
    ledger.tidy()
    for _ in range(4):
        claim = ledger.claim()
        for step in (10, 20, 30):
            ledger.report(claim, step, 0.8)
        ledger.done(claim, 0.8, {})
    good, bad = ledger.claim(), ledger.claim()
    for step in (10, 20):
        ledger.report(good, step, 0.9)
        ledger.report(bad, step, 0.2)
    assert not ledger.is_hopeless(good)
    assert ledger.is_hopeless(bad)
    ledger.pruned(bad)
    assert ledger.look()[bad.cell.name].state == "pruned"


class TestStorage:
    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("nonsense", "is not a database URL"),
            ("nosuch://host/db", "driver|cannot be opened|not a database"),
            ("sqlite:////no/such/folder/x.db", "cannot be opened: unable to open database file"),
        ],
    )
    def test_mistakes_are_told(self, url, said):
        with pytest.raises(SweepError, match=said):
            open_storage(url)

    def test_is_optuna_s(self, open_ledger, tmp_path):
        ledger = open_ledger()
        ledger.tidy()
        found = optuna.load_study(study_name="shared", storage=f"sqlite:///{tmp_path / 'sweep.db'}")
        assert len(found.trials) == 4
