"""What users of a service ask for, in words of the demo world: pictures changed in rounds, or popular ones again."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from fisedit_compile.quality.cases import Item, Scene, load_cases

_PROMPT = re.compile(r"(.*) on the left and (.*) on the right, (.*)")

#: What the three parts of a prompt are in a scene.
_PLACES = ("left", "right", "background")

#: Changes that a user makes to a picture, at least and at most.
ROUNDS = (1, 5)

#: Different requests of a trace of popular ones, and how fast their popularity falls with their rank.
POOL, EXPONENT = 60, 1.1


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        prompt: the words.
        seed: of the noise; None takes any picture of the words.
        scene: what a picture of them should show.
        changed: which place of the scene, or ``"background"``, is another than in the user's last picture; empty for a
            first one.
    """

    prompt: str
    seed: int | None
    scene: Scene
    changed: str = ""


#: Requests of one user, each made when the one before is answered.
User = tuple[Asked, ...]


def rounds(requests: int, seed: int) -> list[User]:
    """Users who make a picture and change one thing of it, one to five times; ``requests`` in all."""
    chance, world = random.Random(seed), World()
    users: list[User] = []
    left = requests
    while left:
        count = min(left, 1 + chance.randint(*ROUNDS))
        picture, noise = world.draw(chance), chance.getrandbits(32)
        user = [world.asked(picture, noise)]
        for _ in range(count - 1):
            picture, changed = world.change(picture, chance)
            user.append(world.asked(picture, noise, changed))
        users.append(tuple(user))
        left -= count
    return users


def zipf(requests: int, seed: int) -> list[User]:
    """Single requests for pictures of which some are asked for far more often than others."""
    chance, world = random.Random(seed), World()
    pool = [world.asked(world.draw(chance), None) for _ in range(POOL)]
    weights = [1 / rank**EXPONENT for rank in range(1, POOL + 1)]
    return [(asked,) for asked in chance.choices(pool, weights, k=requests)]


TRACES = {"rounds": rounds, "zipf": zipf}


class World:
    """Words for what stands left and right and for the background, and what each of them means.

    Attributes:
        parts: the words of each of the three.
    """

    def __init__(self) -> None:
        items: dict[str, Item] = {}
        backgrounds: dict[str, str] = {}
        for case in load_cases():
            for prompt, scene in ((case.prompt, case.before), (case.edit, case.after)):
                found = _PROMPT.fullmatch(prompt)
                assert found is not None, prompt
                items.update({found[1]: scene.items["left"], found[2]: scene.items["right"]})
                backgrounds[found[3]] = scene.background
        self._items, self._backgrounds = items, backgrounds
        self.parts = (sorted(items), sorted(items), sorted(backgrounds))

    def draw(self, chance: random.Random) -> tuple[str, ...]:
        """The words of any picture."""
        return tuple(chance.choice(words) for words in self.parts)

    def change(self, picture: tuple[str, ...], chance: random.Random) -> tuple[tuple[str, ...], str]:
        """The words with one thing changed, an object or the background, and where that is."""
        part = chance.randrange(len(picture))
        others = [each for each in self.parts[part] if each != picture[part]]
        return (*picture[:part], chance.choice(others), *picture[part + 1 :]), _PLACES[part]

    def asked(self, picture: tuple[str, ...], seed: int | None, changed: str = "") -> Asked:
        """A request for a picture of the words."""
        left, right, background = picture
        scene = Scene({"left": self._items[left], "right": self._items[right]}, self._backgrounds[background])
        return Asked(f"{left} on the left and {right} on the right, {background}", seed, scene, changed)
