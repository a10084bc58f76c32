"""Which pronoun follows a girl's or a boy's story: the behaviour of small story models."""

from __future__ import annotations

from circuitkit.errors import TaskError
from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import choose, generator
from circuitkit.tasks.own import from_pairs
from circuitkit.tasks.text import encode

TEMPLATES = (
    "Once upon a time, there was a little {noun} named {name}.",
    "One day, a little {noun} named {name} went to the park.",
    "{name} was a little {noun} who loved to play.",
    "Once there was a small {noun}. The {noun} was named {name}.",
    "One day, a {noun} named {name} saw a big dog.",
    "{name} was a happy little {noun}.",
    "Once upon a time, there was a brave {noun} named {name}.",
    "A little {noun} named {name} was in the garden.",
    "Once upon a time, {name} was a little {noun} with a big smile.",
)
GIRLS = (
    "Lily", "Lucy", "Mia", "Anna", "Sara", "Sally", "Emma", "Amy", "Sue", "Jane", "Mary", "Daisy", "Ella",
    "Molly", "Kate", "Lola", "Nina", "Lisa", "Lulu", "Jill", "Lila", "Grace", "Susie", "Kitty", "Bella",
    "Eva", "Ana", "Tina", "Polly", "Alice", "Emily", "Lena", "Katie", "Ellie", "Nora", "Ivy", "Ann", "Beth",
    "Abby",
)  # fmt: skip
BOYS = (
    "Tim", "Tom", "Ben", "Max", "Sam", "Jack", "Bob", "Joe", "Leo", "Timmy", "Tommy", "Mike", "Jim", "John",
    "Jimmy", "Billy", "Bobby", "Peter", "Fred", "Dan", "Mark", "Luke", "Nick", "Adam", "Alex", "David",
    "Paul", "James", "Harry", "Eric", "Jake", "Will", "Bill", "Ted", "Roy", "Ron", "Tony", "Toby", "Matt",
    "Noah", "Dave", "Joey", "Kevin",
)  # fmt: skip


@task("gender-pronoun")
def gender_pronoun(model: Vocabulary, *, n: int = 64, seed: int = 0) -> Task:
    """ " She" against " He" after a sentence about a girl or a boy; the corrupt sentence swaps noun and name.

    Half of the clean sentences are about girls and half about boys, so that no fixed liking for one pronoun
    helps. A name is paired only with names of as many tokens. Templates and names are those on which
    stories260K's logit difference was seen to have the right sign with room to spare.

    Args:
        model: a model with a tokenizer.
        n: how many pairs.
        seed: seed of the generator that draws them.

    Raises:
        TaskError: if the tokenizer does not fit, or fewer than n pairs exist.
    """
    rng = generator(seed)
    places = [(template, girl, boy) for girl, boy in _name_pairs(model) for template in TEMPLATES]
    stories = [(place, about_girl) for about_girl in (True, False) for place in places]
    if n > len(stories):
        choose(stories, n, rng)
    girls = choose(places, n - n // 2, rng)
    chosen = [(place, True) for place in girls] + [(place, False) for place in choose(places, n // 2, rng)]
    clean, corrupt = [], []
    for (template, girl, boy), about_girl in chosen:
        pair = template.format(noun="girl", name=girl), template.format(noun="boy", name=boy)
        clean.append(pair[0] if about_girl else pair[1])
        corrupt.append(pair[1] if about_girl else pair[0])
    right = [" She" if about_girl else " He" for _, about_girl in chosen]
    wrong = [" He" if about_girl else " She" for _, about_girl in chosen]
    return from_pairs(model, clean, corrupt, right, wrong, name="gender-pronoun")


def _name_pairs(model: Vocabulary) -> list[tuple[str, str]]:
    """Girl and boy names that keep every template at the same number of tokens."""

    def sizes(name: str, noun: str) -> tuple[int, ...]:
        return tuple(len(ids) for ids in encode(model, [t.format(noun=noun, name=name) for t in TEMPLATES]))

    girls = {name: sizes(name, "girl") for name in GIRLS}
    boys = {name: sizes(name, "boy") for name in BOYS}
    pairs = [(girl, boy) for girl in GIRLS for boy in BOYS if girls[girl] == boys[boy]]
    if not pairs:
        raise TaskError(f"no girl's and boy's name have as many tokens as each other for {model.name!r}")
    return pairs
