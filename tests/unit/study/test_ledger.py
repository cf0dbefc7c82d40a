"""The cells that processes share: taken once, given up when the worker is gone, never lost."""

import pytest

pytest.importorskip("optuna")

import optuna

from tokmask_peft.errors import SweepError
from tokmask_peft.study import ledger as ledgers
from tokmask_peft.study.ledger import CellState, Ledger, open_storage
from tokmask_peft.study.plan import make_plan

STORAGES = pytest.mark.parametrize("open_ledger", ["journal", "database"], indirect=True)


@pytest.fixture
def open_ledger(tmp_path, request):
    """Return a function that opens the sweep as one more process would, in a journal unless a test asks for more."""
    is_database = getattr(request, "param", "journal") == "database"
    place = f"sqlite:///{tmp_path / 'sweep.db'}" if is_database else tmp_path / "sweep.journal"

    def make(*overrides, prune=False, retry_failed=False, **axes):
        plan = make_plan("quickstart", overrides, name="shared", **{"p": "0", "seeds": "1", **axes})
        return Ledger(plan, place, prune=prune, retry_failed=retry_failed)

    return make


@pytest.fixture
def as_worker(monkeypatch):
    """Return a function that makes this process look like another one to the ledger."""
    me = ledgers.identity()
    return lambda **changes: monkeypatch.setattr(ledgers, "identity", lambda: {**me, **changes})


def states(ledger):
    return [cell.state for cell in ledger.look().values()]


@STORAGES
def test_every_cell_is_claimed_once_in_the_order_of_the_plan(open_ledger):
    one, two = (open_ledger(p="0,0.1", seeds="2") for _ in range(2))
    claims = [one.claim(), two.claim(), one.claim(), two.claim()]
    assert [claim.cell.name for claim in claims] == [cell.name for cell in one.plan.cells]
    assert one.claim() is None
    assert states(two) == ["running"] * 4
    for claim in claims:
        one.close(claim.trial_id, "done", 0.5, seconds=2.0)
    assert two.look()["p0-seed1"] == CellState("done", 0.5, 2.0)
    assert two.claim() is None


@pytest.mark.parametrize("outcome", ["running", "done", "error"])
def test_of_two_that_take_a_cell_at_once_the_first_has_it(open_ledger, monkeypatch, outcome):
    one, two = open_ledger(), open_ledger()
    seen = two.look()
    claim = one.claim()
    if outcome != "running":
        one.close(claim.trial_id, outcome, 0.5 if outcome == "done" else None, reason="broken")
    with monkeypatch.context() as patch:
        patch.setattr(two, "look", lambda: seen)  # it looked before the other claimed
        assert two.claim() is None
    assert states(one) == states(two) == [{"error": "failed"}.get(outcome, outcome)]
    assert one.claim() is two.claim() is None


@pytest.mark.parametrize("other", [{"pid": 2**22 + 1}, {"started": 0.0}])  # no such process; its number is used again
def test_a_dead_worker_s_cell_is_run_again_once(open_ledger, as_worker, other):
    as_worker(**other)
    open_ledger().claim()
    as_worker()
    assert [bool(open_ledger().claim()) for _ in range(2)] == [True, False]


def test_a_living_worker_keeps_its_cell(open_ledger, as_worker):
    ledger = open_ledger()
    claim = ledger.claim()
    as_worker(pid=1, started=0.0)
    assert states(open_ledger()) == ["running"]
    assert ledger.beat(claim)


@STORAGES
def test_a_worker_of_another_machine_is_given_up_when_it_gives_no_sign_of_life(open_ledger, as_worker, monkeypatch):
    ledger, now = open_ledger(), [0.0]
    as_worker(host="elsewhere")
    claim = ledger.claim()
    as_worker()
    other = open_ledger()
    monkeypatch.setattr(ledgers.time, "monotonic", lambda: now[0])
    for now[0] in (1.0, ledgers.GRACE + 0.5):
        assert states(other) == ["running"]
    ledger.beat(claim)
    now[0] += 1.0
    assert states(other) == ["running"]
    now[0] += ledgers.GRACE + 1.0
    assert states(other) == ["waiting"]
    assert not ledger.beat(claim)  # it was slow, not dead: now it must stop
    assert not ledger.beat(claim, (1, 0.5))
    ledger.close(claim.trial_id, "done", 0.1)  # too late
    assert states(other) == ["waiting"]


def test_failed_is_final_until_asked_for_and_interrupted_is_continued(open_ledger):
    ledger = open_ledger()
    ledger.close(ledger.claim().trial_id, "interrupted")
    assert states(ledger) == ["waiting"]
    ledger.close(ledger.claim().trial_id, "error", reason="out of memory")
    assert ledger.look()["p0-seed1"].reason == "out of memory"
    again = open_ledger(retry_failed=True)
    again.close(again.claim().trial_id, "error", reason="still")
    assert again.look()["p0-seed1"].reason == "still"
    assert again.claim() is None


def test_rates_and_seeds_may_be_added_but_not_another_recipe(open_ledger):
    ledger = open_ledger(p="0,0.1", seeds="2")
    ledger.close(ledger.claim().trial_id, "done", 0.5)
    wider = open_ledger(p="0,0.1,0.2", seeds="3")
    assert states(wider).count("done") == 1
    with pytest.raises(SweepError, match=r"training.epochs: .* before, 9.0 now.*another --name") as caught:
        open_ledger("training.epochs=9")
    assert caught.value.code == "other-sweep"
    with pytest.raises(SweepError) as caught:
        open_ledger(grid=["adapter.r=4,8"])
    assert [line.partition(":")[0] for line in caught.value.fields["differences"]] == ["axes"]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_samplers_draw_what_is_asked_for_and_a_rerun_draws_the_same(open_ledger, sampler):
    axes = {"sampler": sampler, "trials": 12, "grid": ["training.learning_rate=1e-5..1e-3:log", "adapter.r=4..8"]}
    ledger = open_ledger(p="0,0.1", seeds="2", **axes)
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
            ledger.close(claim.trial_id, "done", recipe.training.learning_rate)
    assert ledger.claim() is None
    assert len(set(drawn.values())) > 6
    ledger.close(claim.trial_id, "interrupted")
    assert ledger.claim().drawn == drawn["trial-0011"]


def test_pruning_compares_trials_at_the_same_step(open_ledger):
    ledger = open_ledger(prune=True, p="0,0.1", seeds="3")
    for _ in range(4):
        claim = ledger.claim()
        for step in (10, 20, 30):
            ledger.beat(claim, (step, 0.8))
        ledger.close(claim.trial_id, "done", 0.8)
    good, bad = ledger.claim(), ledger.claim()
    for step in (10, 20):
        ledger.beat(good, (step, 0.9))
        ledger.beat(bad, (step, 0.2))
    assert not ledger.is_hopeless(good)
    assert ledger.is_hopeless(bad)
    ledger.close(bad.trial_id, "pruned")
    assert ledger.look()[bad.cell.name].state == "pruned"


class TestStorage:
    @pytest.mark.parametrize("url", ["nonsense", "nosuch://host/db", "sqlite:////no/such/folder/x.db"])
    def test_a_database_that_cannot_be_opened(self, url):
        with pytest.raises(SweepError) as caught:
            open_storage(url)
        assert (caught.value.code, caught.value.fields) == ("bad-storage", {"storage": url})

    def test_a_damaged_journal(self, open_ledger, tmp_path):
        open_ledger()
        with (tmp_path / "sweep.journal").open("ab") as file:
            file.write(b"half a li\n{}\n")
        with pytest.raises(SweepError, match="remove it first") as caught:
            open_storage(tmp_path / "sweep.journal")
        assert caught.value.code == "storage-failed"

    def test_a_storage_that_fails_later(self, open_ledger, monkeypatch):
        ledger = open_ledger(prune=True)
        claim = ledger.claim()

        def fail(*_, **__):
            raise optuna.exceptions.StorageInternalError("locked")

        monkeypatch.setattr(ledger.storage, "get_trial", fail)
        monkeypatch.setattr(optuna, "create_study", fail)
        for use in (open_ledger, lambda: ledger.is_hopeless(claim)):
            with pytest.raises(SweepError) as caught:
                use()
            assert caught.value.code == "storage-failed"

    def test_a_sweep_of_an_older_version_goes_on_in_its_database(self, tmp_path):
        plan = make_plan("quickstart", p="0,0.1", seeds="1", name="shared")
        place = f"sqlite:///{tmp_path / 'sweep.db'}"
        ledger = Ledger(plan, place)
        states, create = optuna.trial.TrialState, optuna.trial.create_trial
        attributes = {"cell": "p0-seed1", "after": -1, "seed": 1, "outcome": {"kind": "done", "seconds": 3.0}}
        done = create(state=states.COMPLETE, value=0.5, user_attrs=attributes)
        waiting = create(state=states.WAITING, user_attrs={"cell": "p0.1-seed1", "after": -1})  # as it enqueued cells
        for trial in (done, waiting):
            ledger.storage.create_new_trial(ledger.study_id, trial)
        again = Ledger(plan, place)
        assert again.look()["p0-seed1"].seconds == 3.0
        assert again.claim().cell.name == "p0.1-seed1"


def test_a_database_is_optuna_s_and_its_claims_are_numbered_as_committed(tmp_path):
    plan, place = make_plan("quickstart", p="0", seeds="3", name="shared"), f"sqlite:///{tmp_path / 'sweep.db'}"
    one, two = (Ledger(plan, place) for _ in range(2))
    for ledger in (one, two, one):
        ledger.claim()
    trials = optuna.load_study(study_name="shared", storage=place).trials
    assert [trial.number for trial in sorted(trials, key=lambda trial: trial._trial_id)] == [0, 1, 2]
