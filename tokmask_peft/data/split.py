"""Set texts aside: a validation share, or a smaller training set; seeded, stratified, duplicates kept together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from tokmask_peft.data.cleaning import normalise
from tokmask_peft.errors import DataError
from tokmask_peft.tasks import Example


def carve(train: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split `train` into a training and a validation part.

    Texts that are the same after normalisation stay on one side. The result does not depend on the order of the
    texts; both parts keep it. A label never leaves the training part altogether.

    Args:
        train: texts to split.
        share: share of the distinct texts that goes to validation.
        seed: seed of the draw.

    Returns:
        The remaining training texts and the validation texts.

    Raises:
        DataError: there are too few texts to split.
    """
    groups = _groups(train)
    count = max(1, round(share * len(groups)))
    if len(groups) < 2 or count >= len(groups):
        raise DataError(
            f"data.validation: a share of {share} cannot be cut from {len(groups)} distinct training texts. Give more "
            "texts or name a validation file."
        )
    aside = _draw(groups, count, seed)
    staying = {tag for key, group in groups.items() if key not in aside for tag in _tags(group)}
    for key in sorted(aside):
        missing = _tags(groups[key]) - staying
        if missing:
            aside.remove(key)
            staying |= _tags(groups[key])
    keys = [normalise(example.string) for example in train]
    remaining = [example for example, key in zip(train, keys, strict=True) if key not in aside]
    validation = [example for example, key in zip(train, keys, strict=True) if key in aside]
    if not validation:
        raise DataError(
            f"data.validation: a share of {share} of {len(groups)} distinct texts leaves no text to set aside without "
            "taking the only text of a label from train. Give more texts or name a validation file."
        )
    return remaining, validation


def subset(train: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Draw `count` training texts, stratified, in their order; every label keeps a text.

    Raises:
        DataError: there are more labels than texts to keep.
    """
    if count >= len(train):
        return list(train)
    keys = {f"{normalise(example.string)}\0{index}": [example] for index, example in _numbered(train)}
    chosen = _draw(keys, count, seed)
    held = Counter(tag for key in chosen for tag in _tags(keys[key]))
    labels = {tag for group in keys.values() for tag in _tags(group)}
    for label in sorted(labels - set(held)):
        if held[label]:
            continue
        new = next(key for key in sorted(keys) if label in _tags(keys[key]))
        spare = [key for key in sorted(chosen) if all(held[tag] > 1 for tag in _tags(keys[key]))]
        if not spare:
            raise DataError(
                f"data.max_train: {count} texts cannot hold all {len(labels)} labels ({', '.join(sorted(labels))})"
            )
        spare.sort(key=lambda key: -min(held[tag] for tag in _tags(keys[key])))
        chosen.remove(spare[0])
        chosen.add(new)
        held.subtract(_tags(keys[spare[0]]))
        held.update(_tags(keys[new]))
    wanted = {id(keys[key][0]) for key in chosen}
    return [example for example in train if id(example) in wanted]


def _numbered(train: Sequence[Example]) -> list[tuple[int, Example]]:
    """Number the copies of each text, so that copies have keys of their own whatever the order of the file."""
    copies: Counter[str] = Counter()
    numbered = []
    for example in train:
        key = normalise(example.string)
        numbered.append((copies[key], example))
        copies[key] += 1
    return numbered


def _groups(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Group texts that are the same after normalisation."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[normalise(example.string)].append(example)
    return groups


def _tags(group: Sequence[Example]) -> set[str]:
    """Labels of a group."""
    return {tag for example in group for tag in example.tags}


def _draw(groups: dict[str, list[Example]], count: int, seed: int) -> set[str]:
    """Draw `count` keys, stratified where the strata are large enough."""
    from sklearn.model_selection import train_test_split

    keys = sorted(groups)
    strata = _strata([groups[key][0] for key in keys], least=max(2, round(len(keys) / count)))
    enough = min(Counter(strata).values()) >= 2
    fits = len(set(strata)) <= min(count, len(keys) - count)
    _, drawn = train_test_split(keys, test_size=count, random_state=seed, stratify=strata if enough and fits else None)
    return set(drawn)


def _strata(examples: Sequence[Example], least: int) -> list[str]:
    """Name a stratum for each text: its label, or the set of its tags.

    A stratum with fewer than `least` texts falls back to the majority tag, and then to a common rest.
    """
    joint = ["+".join(sorted(set(example.tags))) for example in examples]
    majority = ["majority " + Counter(sorted(example.tags)).most_common(1)[0][0] for example in examples]
    strata = joint
    for fallback in (majority, ["rest"] * len(examples)):
        sizes = Counter(strata)
        strata = [name if sizes[name] >= least else coarse for name, coarse in zip(strata, fallback, strict=True)]
    sizes = Counter(strata)
    largest = sizes.most_common(1)[0][0]
    return [name if sizes[name] >= 2 else largest for name in strata]
