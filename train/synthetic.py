"""Documents with a structure that a small model can learn and a test can check; made from a seed, so nothing is needed.

    {synthetic: needle, documents: 2000, words: 90, seed: 0}      one kind, as a data source of a recipe
    synthetic                                                     2000 documents of all kinds

`copy` repeats a list of words; `arithmetic` adds numbers; `needle` hides facts in filler and states them again at the
end, each value then being predictable from its first mention alone; `mixed` draws a kind for each document.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

KEYS = (
    "amber birch cedar daisy ember fern ginger hazel iris jasper kelp laurel maple nectar olive pearl quartz rose sage "
    "thistle umber violet willow yarrow zinnia clover coral ivory jade lotus"
).split()
VALUES = (
    "acorn badger crane dolphin eagle falcon gecko heron ibis jaguar koala lynx marten newt otter panda quail raven "
    "salmon tiger urchin viper walrus yak zebra beetle cricket ferret goose hornet"
).split()
NOUNS = "road river house garden market bridge tower field window harbour".split()
ADJECTIVES = "old quiet long narrow bright empty cold green".split()
VERBS = "stands lies rests waits ends begins".split()
FACT = "The code of {} is"


def filler(chooser: random.Random) -> str:
    """A sentence that says nothing of any code."""
    near = chooser.choice(("near", "behind", "beside", "before"))
    first, second = chooser.sample(NOUNS, 2)
    return f"The {chooser.choice(ADJECTIVES)} {first} {chooser.choice(VERBS)} {near} the {second}."


def fact(key: str, value: str) -> str:
    return f"{FACT.format(key)} {value}."


def needle(chooser: random.Random, words: int) -> str:
    """Facts at random places in filler, one to four of them, and all of them again at the end in another order. From a
    quarter of `words` to all of them: a model that only sees one length finds facts at that length alone."""
    words = chooser.randint(words // 4, words)
    facts = [fact(*pair) for pair in zip(chooser.sample(KEYS, chooser.randint(1, 4)), chooser.sample(VALUES, 4))]
    sentences: list[str] = []
    left = words - 2 * sum(len(sentence.split()) for sentence in facts)
    while left > 0:
        sentences.append(filler(chooser))
        left -= len(sentences[-1].split())
    for sentence in facts:
        sentences.insert(chooser.randint(0, len(sentences)), sentence)
    return " ".join([*sentences, *chooser.sample(facts, len(facts))])


def copy(chooser: random.Random, words: int) -> str:
    parts = []
    while words > 0:
        row = " ".join(chooser.choices(NOUNS, k=chooser.randint(3, 8)))
        parts.append(f"Again: {row}; {row}.")
        words -= len(parts[-1].split())
    return " ".join(parts)


def arithmetic(chooser: random.Random, words: int) -> str:
    sums = ((chooser.randint(0, 99), chooser.randint(0, 99)) for _ in range(max(1, words // 5)))
    return " ".join(f"{a} + {b} = {a + b}." for a, b in sums)


def mixed(chooser: random.Random, words: int) -> str:
    return chooser.choice((needle, copy, arithmetic))(chooser, words)


KINDS: dict[str, Callable[[random.Random, int], str]] = {
    kind.__name__: kind for kind in (copy, arithmetic, needle, mixed)
}


def synthetic_documents(
    synthetic: str = "mixed", documents: int = 2000, words: int = 90, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Name and text of each document; the i-th depends on kind, words, seed and i alone.

    Raises: ValueError for another kind, and for numbers that are none or below 1.
    """
    if synthetic not in KINDS:
        raise ValueError(f"data source: synthetic={synthetic!r} is not one of {', '.join(KINDS)}")
    for name, value in (("documents", documents), ("words", words), ("seed", seed)):
        least = 0 if name == "seed" else 1
        if type(value) is not int or value < least:
            raise ValueError(f"data source: {name}={value!r} is not possible: a whole number of at least {least}")
    for i in range(documents):
        yield {"name": f"{synthetic}#{i}", "text": KINDS[synthetic](random.Random(f"{seed} {i}"), words) + "\n"}
