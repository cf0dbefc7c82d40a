"""Names of splits; a validation share, or a smaller training set: seeded, stratified, with duplicates together."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from tokmask_peft.data.cleaning import normalise
from tokmask_peft.errors import DataError
from tokmask_peft.examples import Example, LabelSet

_ALIASES = {"train": {"training"}, "validation": {"dev", "valid", "val", "development"}, "test": {"testing"}}
SPLITS = tuple(_ALIASES)
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.|$)")
NAME_A_SPLIT = (
    "Name one in data.train, data.validation or data.test; data.validation may be a share of train such as 0.1, and "
    "data.test may be null."
)


def aliases(split: str) -> set[str]:
    """Return the names that mean the same split: `validation`, `dev`, `valid` and `val` are one."""
    name = canonical(split)
    return {name.lower(), *_ALIASES.get(name, ())}


def canonical(split: str) -> str:
    """Return one name for all aliases of a split."""
    return next((name for name, others in _ALIASES.items() if split.lower() in {name, *others}), split)


def check_shards(names: Sequence[str], place: str) -> None:
    """Raise a DataError unless files named as `train-00000-of-00003` are all the shards of one split."""
    parts = [match.groups() for name in names if (match := SHARD.search(name))]
    totals = sorted({total for _, total in parts})
    wanted = [(f"{number:05}", total) for total in totals for number in range(int(total))]
    missing = tuple(f"{number}-of-{total}" for number, total in wanted if (number, total) not in parts)
    if len(totals) > 1 or sorted(parts) != wanted:
        problem = f"{', '.join(missing[:5])} {'and others ' if len(missing) > 5 else ''}missing"
        if len(totals) > 1 or not missing:
            several = f"several sets of shards are there ({', '.join(sorted(names)[:5])}); remove all but one"
            problem = several + (f"; {problem}" if missing else "")
        problem = f"{place}: the shards of the split are not complete: {problem}."
        raise DataError(problem, code="missing-shards", missing=missing, totals=tuple(map(int, totals)))


def carve(train: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Set a `share` of the distinct texts aside, for validation; return both parts, in their order.

    Texts that are the same after normalisation stay together, whatever their order. A label never leaves the training
    part altogether. DataError if there are too few texts to split.
    """
    keys = [normalise(example.string) for example in train]
    groups: dict[str, list[Example]] = defaultdict(list)
    for key, example in zip(keys, train, strict=True):
        groups[key].append(example)
    count = max(1, round(share * len(groups)))
    aside = _draw(groups, count, seed) if 1 < len(groups) > count else set()
    staying = {tag for key, group in groups.items() if key not in aside for tag in _tags(group)}
    for key in sorted(aside):
        if missing := _tags(groups[key]) - staying:
            aside.remove(key)
            staying |= missing
    if not aside:
        problem = f"a share of {share} of {len(groups)} distinct training texts leaves no text of some label in train"
        remedy = "Give more texts or name a validation file."
        raise DataError(f"data.validation: {problem}. {remedy}", code="too-few-texts", texts=len(groups), share=share)
    pairs = list(zip(keys, train, strict=True))
    return [example for key, example in pairs if key not in aside], [e for key, e in pairs if key in aside]


def subset(train: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Draw `count` training texts, stratified, in their order; every label keeps a text; DataError if it cannot."""
    if count >= len(train):
        return list(train)
    # copies of a text are numbered, so that they have keys of their own whatever the order of the file
    copies: Counter[str] = Counter()
    groups: dict[str, list[Example]] = {}
    for example in train:
        key = normalise(example.string)
        groups[f"{key}\0{copies[key]}"] = [example]
        copies[key] += 1
    chosen = _draw(groups, count, seed)
    counts = Counter(tag for key in chosen for tag in _tags(groups[key]))
    labels = _tags(train)
    for label in sorted(labels - set(counts)):
        if counts[label]:
            continue
        new = next(key for key in sorted(groups) if label in _tags(groups[key]))
        spare = [key for key in sorted(chosen) if all(counts[tag] > 1 for tag in _tags(groups[key]))]
        if not spare:
            listed = ", ".join(sorted(labels))
            problem = f"data.max_train: {count} texts cannot include all {len(labels)} labels ({listed})"
            raise DataError(problem, code="max-train", count=count, labels=len(labels))
        old = max(spare, key=lambda key: min((counts[tag] for tag in _tags(groups[key])), default=count))
        chosen.remove(old)
        chosen.add(new)
        counts.subtract(_tags(groups[old]))
        counts.update(_tags(groups[new]))
    wanted = {id(groups[key][0]) for key in chosen}
    return [example for example in train if id(example) in wanted]


def _tags(group: Sequence[Example]) -> set[str]:
    return {tag for example in group for tag in example.tags}


def _draw(groups: dict[str, list[Example]], count: int, seed: int) -> set[str]:
    """Draw `count` keys, stratified if the strata are large enough."""
    from sklearn.model_selection import train_test_split

    keys = sorted(groups)
    strata = _strata([groups[key][0] for key in keys], least=max(2, round(len(keys) / count)))
    enough = min(Counter(strata).values()) >= 2
    fits = len(set(strata)) <= min(count, len(keys) - count)
    _, drawn = train_test_split(keys, test_size=count, random_state=seed, stratify=strata if enough and fits else None)
    return set(drawn)


def _strata(examples: Sequence[Example], least: int) -> list[str]:
    """Name each text's stratum: its labels; small ones are merged by majority tag or rarest label, then into a rest."""
    joint = ["+".join(sorted(set(example.tags))) for example in examples]
    counts = Counter(tag for example in examples for tag in example.tags)

    def coarser(example: Example) -> str:
        if not isinstance(example.label, LabelSet):
            return "majority " + Counter(sorted(example.tags)).most_common(1)[0][0]
        return "rarest " + min(example.label, key=lambda tag: (counts[tag], tag), default="")

    majority = [coarser(example) for example in examples]
    strata = joint
    for fallback in (majority, ["rest"] * len(examples)):
        sizes = Counter(strata)
        strata = [name if sizes[name] >= least else coarse for name, coarse in zip(strata, fallback, strict=True)]
    sizes = Counter(strata)
    largest = sizes.most_common(1)[0][0]
    return [name if sizes[name] >= 2 else largest for name in strata]
