"""The words of the demo world: what can stand in a picture, where, and in which colours.

All that the renderer draws and the captions say is named here: the tokenizer's vocabulary follows from it.
"""

from __future__ import annotations

from typing import NamedTuple


class Head(NamedTuple):
    """Where a hat sits on a sprite, in fractions of the sprite's width, from its top left corner."""

    x: float
    y: float
    width: float


# Sprites that can wear a hat: they look at the viewer, so the top of the head is unambiguous.
# name -> (code point, head)
WEARERS: dict[str, tuple[str, Head]] = {
    "cat": ("1f431", Head(0.50, 0.26, 0.56)),
    "dog": ("1f436", Head(0.50, 0.16, 0.56)),
    "rabbit": ("1f430", Head(0.50, 0.42, 0.44)),
    "mouse": ("1f42d", Head(0.50, 0.30, 0.44)),
    "cow": ("1f42e", Head(0.50, 0.22, 0.48)),
    "pig": ("1f437", Head(0.50, 0.18, 0.50)),
    "tiger": ("1f42f", Head(0.50, 0.14, 0.54)),
    "lion": ("1f981", Head(0.50, 0.14, 0.54)),
    "bear": ("1f43b", Head(0.50, 0.18, 0.54)),
    "panda": ("1f43c", Head(0.50, 0.18, 0.54)),
    "koala": ("1f428", Head(0.50, 0.20, 0.48)),
    "fox": ("1f98a", Head(0.50, 0.34, 0.52)),
    "wolf": ("1f43a", Head(0.50, 0.30, 0.50)),
    "monkey": ("1f435", Head(0.50, 0.14, 0.54)),
    "hamster": ("1f439", Head(0.50, 0.26, 0.50)),
    "frog": ("1f438", Head(0.50, 0.30, 0.48)),
    "raccoon": ("1f99d", Head(0.50, 0.24, 0.50)),
    "chicken": ("1f414", Head(0.53, 0.24, 0.50)),
    "owl": ("1f989", Head(0.50, 0.18, 0.54)),
    "penguin": ("1f427", Head(0.50, 0.16, 0.44)),
    "robot": ("1f916", Head(0.50, 0.18, 0.54)),
    "ghost": ("1f47b", Head(0.50, 0.16, 0.50)),
    "alien": ("1f47d", Head(0.50, 0.14, 0.56)),
    "teddy": ("1f9f8", Head(0.50, 0.16, 0.42)),
}

# Everything else: 94 sprites with a one-word English name. name -> code point
THINGS: dict[str, str] = {
    # animals
    "horse": "1f40e", "sheep": "1f411", "goat": "1f410", "elephant": "1f418", "leopard": "1f406",
    "gorilla": "1f98d", "camel": "1f42a", "giraffe": "1f992", "zebra": "1f993", "deer": "1f98c",
    "kangaroo": "1f998", "hedgehog": "1f994", "squirrel": "1f43f-fe0f", "bat": "1f987", "beaver": "1f9ab",
    "otter": "1f9a6", "sloth": "1f9a5", "rooster": "1f413", "chick": "1f424", "bird": "1f426",
    "eagle": "1f985", "duck": "1f986", "swan": "1f9a2", "parrot": "1f99c", "flamingo": "1f9a9",
    "turtle": "1f422", "snake": "1f40d", "lizard": "1f98e", "crocodile": "1f40a", "dragon": "1f409",
    "dinosaur": "1f995", "whale": "1f433", "dolphin": "1f42c", "fish": "1f41f", "shark": "1f988",
    "octopus": "1f419", "crab": "1f980", "lobster": "1f99e", "snail": "1f40c", "butterfly": "1f98b",
    "bee": "1f41d", "ladybug": "1f41e", "spider": "1f577-fe0f", "unicorn": "1f984",
    # plants and food
    "mushroom": "1f344", "tree": "1f333", "cactus": "1f335", "tulip": "1f337", "rose": "1f339",
    "sunflower": "1f33b", "apple": "1f34e", "banana": "1f34c", "lemon": "1f34b", "pear": "1f350",
    "peach": "1f351", "strawberry": "1f353", "watermelon": "1f349", "pineapple": "1f34d", "tomato": "1f345",
    "carrot": "1f955", "corn": "1f33d", "broccoli": "1f966", "bread": "1f35e", "cheese": "1f9c0",
    "pizza": "1f355", "burger": "1f354", "cake": "1f370", "cookie": "1f36a", "donut": "1f369",
    # man-made
    "car": "1f697", "bus": "1f68c", "truck": "1f69a", "tractor": "1f69c", "bicycle": "1f6b2",
    "train": "1f682", "airplane": "2708-fe0f", "rocket": "1f680", "boat": "26f5", "guitar": "1f3b8",
    "drum": "1f941", "clock": "23f0", "book": "1f4d5", "key": "1f511", "bell": "1f514",
    "umbrella": "2602-fe0f", "house": "1f3e0", "castle": "1f3f0", "chair": "1fa91", "balloon": "1f388",
    "gift": "1f381", "star": "2b50", "heart": "2764-fe0f", "teapot": "1fad6", "backpack": "1f392",
}  # fmt: skip

ACCESSORIES: dict[str, str] = {"hat": "1f3a9", "crown": "1f451"}

OBJECTS: tuple[str, ...] = (*WEARERS, *THINGS)
CODE_POINTS: dict[str, str] = {name: code for name, (code, _) in WEARERS.items()} | THINGS | ACCESSORIES

# Objects with one main hue, so that a change of that hue alone makes "a blue car".
TINTABLE: tuple[str, ...] = ("car", "balloon", "heart", "apple", "book", "star", "umbrella", "teapot")
TINTS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink")

# sRGB in [0, 1]; the tints first, then the colours that only a background has.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.16, 0.18),
    "orange": (0.97, 0.55, 0.12),
    "yellow": (0.98, 0.83, 0.20),
    "green": (0.24, 0.68, 0.32),
    "blue": (0.18, 0.42, 0.90),
    "purple": (0.52, 0.28, 0.78),
    "pink": (0.96, 0.55, 0.74),
    "white": (0.95, 0.95, 0.95),
    "black": (0.09, 0.09, 0.10),
    "gray": (0.55, 0.55, 0.57),
    "brown": (0.48, 0.31, 0.20),
}

# Column and row on a 3 x 3 grid, and the words that say so.
PLACES: dict[tuple[int, int], str] = {
    (0, 0): "at the top left",
    (1, 0): "at the top",
    (2, 0): "at the top right",
    (0, 1): "on the left",
    (1, 1): "in the center",
    (2, 1): "on the right",
    (0, 2): "at the bottom left",
    (1, 2): "at the bottom",
    (2, 2): "at the bottom right",
}

SIZES: tuple[str, ...] = ("small", "big")

# Procedural backgrounds and the words that say so.
SCENERY: dict[str, str] = {
    "sea": "by the sea",
    "hills": "in the hills",
    "forest": "in a forest",
    "snow": "in the snow",
    "night": "in the night sky",
    "desert": "in a desert",
    "city": "in a city",
    "sunset": "at sunset",
}

GRAMMAR: tuple[str, ...] = ("a", "an", "and", "wearing", "on", "background", ",")


def words() -> list[str]:
    """Every word a caption can hold, each once, in a fixed order."""
    phrases = (*PLACES.values(), *SCENERY.values())
    ordered = [
        *GRAMMAR,
        *OBJECTS,
        *ACCESSORIES,
        *COLORS,
        *SIZES,
        *(word for p in phrases for word in p.split()),
    ]
    return list(dict.fromkeys(ordered))
