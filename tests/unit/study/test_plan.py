import pytest

from tokmask_peft.errors import RecipeError
from tokmask_peft.study.plan import Axis, make_plan, read_axis, read_seeds, split_values

LINEAR = ("masking.schedule=linear", "masking.p_start=0.3")


def problems_of(*overrides, **axes):
    with pytest.raises(RecipeError) as caught:
        make_plan("quickstart", overrides, **axes)
    return "\n".join(caught.value.problems)


def test_cells_are_every_seed_setting_and_rate():
    plan = make_plan("quickstart", p="0,.10,0.3", seeds="2", grid=["training.learning_rate=1e-4,3e-4"])
    assert len(plan.cells) == len({cell.name for cell in plan.cells}) == 12
    assert [cell.name for cell in plan.cells[:4]] == [
        "p0-learning_rate1e-4-seed1",
        "p0.1-learning_rate1e-4-seed1",
        "p0.3-learning_rate1e-4-seed1",
        "p0-learning_rate3e-4-seed1",
    ]
    assert plan.name == "quickstart-sweep"
    recipe = plan.recipe_of(plan.cells[-1])
    assert (recipe.masking.p, recipe.seed, recipe.training.learning_rate) == (0.3, 2, 3e-4)
    assert recipe.run_dir == plan.folder / plan.cells[-1].name
    # only the first arm of a seed and setting fits the baseline
    assert [plan.recipe_of(cell).training.baseline for cell in plan.cells] == [True, False, False] * 4


class TestArms:
    def test_each_switches_on_what_it_names(self):
        arms = "none,lora_dropout,attention_dropout,neftune:15,label_smoothing,mask,mask+neftune"
        plan = make_plan("quickstart", p="0,0.1,0.3", seeds="1,", arms=arms)
        found = {}
        for cell in plan.cells:
            r = plan.recipe_of(cell)
            values = (r.adapter.dropout, r.model.attention_dropout, r.training.neftune_alpha)
            found[cell.arm.label] = (*values, r.training.label_smoothing, r.masking.p)
        assert found == {
            "none": (0, 0, None, 0, 0),
            "lora_dropout": (0.1, 0, None, 0, 0),
            "attention_dropout": (0, 0.1, None, 0, 0),
            "neftune15": (0, 0, 15, 0, 0),
            "label_smoothing": (0, 0, None, 0.1, 0),
            "mask0.1": (0, 0, None, 0, 0.1),
            "mask0.3": (0, 0, None, 0, 0.3),
            "mask0.1+neftune": (0, 0, 5, 0, 0.1),
            "mask0.3+neftune": (0, 0, 5, 0, 0.3),
        }

    @pytest.mark.parametrize(("batching", "becomes"), [("padding_free", "padded"), ("grouped", "grouped")])
    def test_neftune_takes_padded_batches_where_it_must(self, batching, becomes):
        plan = make_plan("quickstart", [f"training.batching={batching}"], arms="none,neftune", seeds="1,")
        assert [plan.recipe_of(cell).training.batching for cell in plan.cells] == [batching, becomes]


def test_all_mistakes_at_once_with_the_nearest_names():
    grid = ["learning_rate=1", "training.batch_size=x,8", "masking=3", "adapter.r"]
    sweep = {"p": "0,2", "seeds": "many", "grid": grid, "sampler": "gird", "name": "a/b"}
    found = problems_of("seed=3", "trainin.epochs=2", **sweep)
    for expected in (
        "seed=3: in a sweep use --seeds",
        "trainin: unknown key. Did you mean 'training'?",
        "'2' is not a masking rate",
        "--seeds many: expected",
        "learning_rate: unknown key. Did you mean 'training.learning_rate'?",
        "training.batch_size: is 'x'; expected ",
        "masking: is 3; expected a section with keys such as p",
        "--grid adapter.r: expected dotted.key=value,value",
        "--sampler gird: expected grid, random, tpe. Did you mean 'grid'?",
        "--name a/b: the name becomes a folder",
    ):
        assert expected in found


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"grid": ["masking.p=0,0.1"]}, "--grid masking.p: use --p"),
        ({"grid": ["adapter.r=4,4"]}, "a value is given twice"),
        ({"grid": ["adapter.r=4", "adapter.r=8"]}, "--grid adapter.r: is given twice"),
        ({"grid": ["training.learning_rate=1e-4,0.0001"]}, "are the same run"),
        ({"grid": ["adapter.dropout=0,0.1"], "arms": "none,mask"}, "--arms sets it"),
        ({"grid": ["adapter.r=4..8"]}, "a range needs --sampler random or tpe"),
        ({"p": "0,0.0"}, "a rate is given twice"),
        ({"p": "0", "trials": 3}, "a grid has as many trials as cells"),
        ({"p": "0", "sampler": "tpe"}, "give the number of runs with --trials"),
        ({"sampler": "random", "trials": 3}, "there is nothing to draw"),
        ({"seeds": "0"}, "expected 1 to 1000 seeds"),
        ({"seeds": "4,4"}, "a seed is given twice"),
        ({"grid": ["masking.trainable_mask=true", "adapter.layers=2"]}, "adapter.layers would save nothing"),
        ({"arms": "none,nefune"}, "there is no arm 'nefune'. Did you mean 'neftune'?"),
        ({"arms": "none+mask"}, "'none+mask'"),
        ({"arms": "mask+drop"}, "there is no arm 'mask+drop'"),  # an arm masks in one way only
        ({"arms": "drop+anneal"}, "there is no arm 'drop+anneal'"),
        ({"arms": "neftune:"}, "there is no arm 'neftune:'"),
        ({"arms": "mask,mask", "p": "0.1"}, "'mask0.1' is given twice"),
        ({"arms": "label_smoothing:2"}, "training.label_smoothing: is 2;"),
    ],
)
def test_mistakes_one_by_one(axes, expected):
    assert expected in problems_of(**axes)


@pytest.mark.parametrize(
    ("overrides", "axes"),
    [
        (LINEAR, {}),
        (LINEAR, {"sampler": "random", "trials": 2}),
        (LINEAR, {"p": "0.1", "arms": "none,mask"}),
        (LINEAR[:1], {"grid": ["masking.p_start=0,0.3"]}),
        (LINEAR[1:], {"grid": ["masking.schedule=constant,linear"]}),
    ],
)
def test_a_schedule_that_masks_the_reference(overrides, axes):
    assert "set masking.p_start=0" in problems_of(*overrides, **{"p": "0,0.1", **axes})


def test_arms_without_a_reference_may_mask_from_the_start():
    assert make_plan("quickstart", LINEAR, p="0,0.1", arms="mask", seeds="1,").cells


def test_an_override_of_an_axis():
    found = problems_of("masking.p=0.2", "adapter.r=2", p="0,0.1", grid=["adapter.r=4,8"])
    assert "masking.p=0.2: in a sweep use --p" in found
    assert "adapter.r=2: the key is also an axis" in found


class TestReading:
    def test_values_with_commas_inside(self):
        assert split_values("[q, v],[q],null") == ("[q, v]", "[q]", "null")
        plan = make_plan("quickstart", grid=["adapter.targets=[query, key],auto"], seeds="1,")
        assert [plan.recipe_of(cell).adapter.targets for cell in plan.cells] == [("query", "key"), "auto"]

    @pytest.mark.parametrize(("text", "seeds"), [("3", (1, 2, 3)), ("7,", (7,)), ("11, 12", (11, 12))])
    def test_seeds(self, text, seeds):
        assert read_seeds(text, []) == seeds

    def test_ranges(self):
        assert read_axis("adapter.r=4..16", []) == Axis("adapter.r", (), 4, 16, False)
        rate = "training.learning_rate"
        assert read_axis(f"{rate}=1e-5..1e-3:log", []) == Axis(rate, (), 1e-5, 1e-3, True)
        problems = []
        assert read_axis("training.weight_decay=0..1:log", problems) is None
        assert "above 0 and rising" in problems[0]


def test_long_names_stay_apart():
    modules = ["[" + ", ".join(f"layer{i}_{j}" for j in range(12)) + "]" for i in range(2)]
    plan = make_plan("quickstart", grid=[f"adapter.targets={','.join(modules)}"], seeds="1,")
    names = [cell.name for cell in plan.cells]
    assert len(set(names)) == 2
    assert max(map(len, names)) < 120


def test_arms_that_mask_in_a_way_of_their_own():
    names = "none,mask,drop,drop:0.3,anneal:0.2,share,overfit,views,mask+views"
    plan = make_plan("quickstart", arms=names, p="0.1", seeds="1,")
    found = {cell.arm.name: plan.recipe_of(cell) for cell in plan.cells}
    expected = ["none", "mask 0.1", "drop", "drop:0.3", "anneal:0.2", "share", "overfit", "views", "mask 0.1 + views"]
    assert list(found) == expected
    masking = {name: recipe.masking for name, recipe in found.items()}
    assert (masking["drop"].replace, masking["drop"].p, masking["drop:0.3"].p) == ("drop", 0.1, 0.3)
    rates = [masking["anneal:0.2"].make_schedule().rate(progress) for progress in (0.0, 0.35, 0.7, 1.0)]
    assert rates == pytest.approx([0.2, 0.1, 0.0, 0.0])
    assert (masking["share"].share, masking["overfit"].schedule) == (0.5, "overfit")
    assert [found[name].training.views for name in ("none", "views", "mask 0.1 + views")] == [1, 2, 2]
    assert {cell.arm.name for cell in plan.cells if cell.arm.is_unmasked} == {"none", "views"}
