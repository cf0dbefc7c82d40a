"""What parts of a recipe check and do by themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tokmask_peft.errors import RecipeError
from tokmask_peft.masking.config import TokenMaskConfig
from tokmask_peft.recipe.data import DataConfig, SourceConfig
from tokmask_peft.recipe.schema import ModelConfig, Recipe

SHARES = st.floats(0.0, 1.0)
RATES = st.floats(0.0, 1.0, exclude_max=True)


@st.composite
def masking(draw):
    begin, end = sorted(draw(st.lists(SHARES, min_size=2, max_size=2, unique=True)))
    return TokenMaskConfig(
        p=draw(RATES),
        schedule=draw(st.sampled_from(["constant", "linear", "cosine", "warmup"])),
        p_start=draw(RATES),
        begin=begin,
        end=end,
        unit=draw(st.sampled_from(["token", "word", "span"])),
        span_length=draw(st.integers(1, 50)),
        mask_token=draw(st.sampled_from(["auto", "mask", "spare", "unk"]) | st.integers(0, 10**6)),
        trainable_mask=draw(st.booleans()),
        protect=tuple(draw(st.lists(st.integers(0, 10**6), max_size=4))),
        seed=draw(st.none() | st.integers(0, 2**62)),
    )


class TestTokenMaskConfig:
    @given(config=masking())
    def test_saved_and_read_back_it_is_equal(self, tmp_path_factory, config):
        folder = tmp_path_factory.mktemp("masking")
        path = config.save_pretrained(folder)
        assert path == folder / "tokmask_config.json"
        assert TokenMaskConfig.from_pretrained(folder) == config
        with pytest.raises(FileNotFoundError):
            TokenMaskConfig.from_pretrained(folder / "none")

    @given(p=st.floats() | st.integers(-5, 5))
    def test_a_rate_is_from_0_to_below_1(self, p):
        if 0 <= p < 1:
            assert TokenMaskConfig(p=p).p == p
        else:
            with pytest.raises(ValidationError):
                TokenMaskConfig(p=p)

    @given(begin=SHARES, end=SHARES, schedule=st.sampled_from(["constant", "linear", "cosine", "warmup"]))
    def test_a_rate_that_moves_begins_before_it_ends(self, begin, end, schedule):
        if schedule == "constant" or begin < end:
            assert TokenMaskConfig(schedule=schedule, begin=begin, end=end).make_schedule().end == end
        else:
            with pytest.raises(ValidationError, match="must rise after it begins"):
                TokenMaskConfig(schedule=schedule, begin=begin, end=end)

    @pytest.mark.parametrize(("schedule", "end"), [("warmup", 0.1), ("linear", 1.0), ("cosine", 1.0)])
    def test_where_a_rise_ends_by_itself(self, schedule, end):
        assert TokenMaskConfig(schedule=schedule).make_schedule().end == end

    @pytest.mark.parametrize(
        ("key", "value"),
        [("mask_token", -1), ("mask_token", True), ("mask_token", "MASK"), ("span_length", 0), ("protect", (-1,)),
         ("seed", -1), ("trainable_mask", "yes"), ("rate", 0.1)],
    )  # fmt: skip
    def test_what_it_refuses(self, key, value):
        with pytest.raises(ValidationError):
            TokenMaskConfig(**{key: value})

    def test_it_cannot_be_changed(self):
        with pytest.raises(ValidationError, match="frozen"):
            TokenMaskConfig().p = 0.5


class TestExpanded:
    def test_variables_and_home_are_replaced_in_a_copy(self, monkeypatch):
        monkeypatch.setenv("TOKMASK_DATA", "/corpora")
        monkeypatch.setenv("HOME", "/home/me")
        source = SourceConfig(path="${TOKMASK_DATA}/lid${TOKMASK_DATA}")
        assert source.expanded().path == "/corpora/lid/corpora"
        assert source.path == "${TOKMASK_DATA}/lid${TOKMASK_DATA}"
        assert SourceConfig(path="~/texts").expanded().path == "/home/me/texts"

    def test_the_source_of_the_test_texts_too(self, monkeypatch):
        monkeypatch.setenv("TOKMASK_DATA", "/corpora")
        test = SourceConfig(path="${TOKMASK_DATA}/b")
        found = DataConfig(task="token", hub="a/b", test_source=test, max_length=9).expanded()
        assert found.test_source.path == "/corpora/b"
        assert (found.path, found.hub, found.max_length) == (None, "a/b", 9)

    @pytest.mark.parametrize("value", [None, ""])
    def test_every_variable_that_is_not_set_is_named_with_its_field(self, monkeypatch, value):
        for name in ("TOKMASK_A", "TOKMASK_B"):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        config = DataConfig(task="token", path="${TOKMASK_A}/a", test_source=SourceConfig(path="${TOKMASK_B}/b"))
        with pytest.raises(RecipeError) as caught:
            config.expanded()
        first, second = caught.value.problems
        assert first.startswith("data.path: is ${TOKMASK_A}/a, but the environment variable TOKMASK_A is not set")
        assert "give data.path=FOLDER" in first
        assert second.startswith("data.test_source.path: is ${TOKMASK_B}/b, but the environment variable TOKMASK_B")
        assert "give data.test_source.path=FOLDER" in second


@pytest.mark.parametrize("key", ["backbone", "backbone_path"])
def test_a_backbone_in_a_relative_folder_is_the_same_from_any_directory(tmp_path, monkeypatch, key):
    """As it stands, `models/bert` would be somebody's id on the Hub from another directory."""
    (tmp_path / "models" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(**{"backbone": "any/name", key: "models/bert"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert getattr(config, key) == str(tmp_path / "models" / "bert")
    assert ModelConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("folder", ["package:some/model", "/no/such/folder", "x" * 5000, None])
def test_a_backbone_elsewhere_stays_as_given(tmp_path, monkeypatch, folder):
    (tmp_path / "user" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(backbone="user/name", backbone_path=folder)
    assert config.backbone_path == folder
    assert config.backbone == ("user/name" if folder else str(tmp_path / "user" / "name"))
    assert ModelConfig(backbone="").backbone == ""


@pytest.mark.parametrize(
    ("task", "data", "problem"),
    [
        ("sequence", {"label_on": "last"}, "data.label_on"),
        ("multilabel", {"label_on": "first"}, "data.label_on"),
        ("token", {"label_on": "last"}, None),
        ("sequence", {"label_separator": ";"}, "label_separator"),
        ("token", {"test_source": {"path": "x", "label_separator": ";"}}, "label_separator"),
        ("multilabel", {"label_separator": ";"}, None),
        ("multilabel", {"label_column": ["joy", "joy", "fear"]}, "'joy' twice"),
        ("multilabel", {"label_column": ["joy", "fear"]}, None),
        ("sequence", {"text_column": ["text", "text"]}, "'text' twice.* two columns"),
        ("sequence", {"text_column": ["0", 0]}, "'0' twice"),
        ("sequence", {"text_column": ["text", "title"]}, None),
        ("sequence", {"label_map": {"neutral": ""}}, "'neutral' an empty label.*data.missing"),
        ("multilabel", {"label_map": {"neutral": ""}}, None),
        ("sequence", {"test": 0.2}, "only validation .*null"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(task, data, problem):
    given = {"name": "x", "model": {"backbone": "a/b"}, "data": {"task": task, "path": "x", **data}}
    if problem is None:
        Recipe.model_validate(given)
    else:
        with pytest.raises(ValidationError, match=problem):
            Recipe.model_validate(given)


@pytest.mark.parametrize(
    ("task", "spans", "metric", "problem"),
    [
        ("sequence", "bio", "f1_macro", "data.spans"),
        ("sequence", "auto", "f1_entities", "training.best_metric"),
        ("token", "none", "f1_entities", "training.best_metric"),
        ("token", "auto", "f1_entities", None),
        ("token", "bilou", "f1_entities", None),
        ("sequence", "auto", "accuracy", None),
    ],
)
def test_entities_need_labels_of_words(task, spans, metric, problem):
    given = {"data": {"task": task, "spans": spans, "builtin": True}, "training": {"best_metric": metric}}
    given |= {"name": "x", "model": {"backbone": "a/b"}}
    if problem is None:
        assert Recipe.model_validate(given).training.best_metric == metric
    else:
        with pytest.raises(ValidationError, match=problem):
            Recipe.model_validate(given)
