"""Word lists for prompts: everyday words that most tokenizers keep in one piece, and words made by code where more are needed."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

KEYS = (
    "apple", "river", "tiger", "piano", "silver", "window", "garden", "castle", "bridge", "planet", "orange", "dragon", "mirror", "candle", "forest",
    "island", "ocean", "temple", "violin", "winter",
)  # fmt: skip

ADJECTIVES = (
    "quiet", "brave", "gentle", "rapid", "narrow", "golden", "hollow", "bitter", "clever", "dusty", "eager", "frozen", "humble", "jolly", "lively",
    "modest", "noble", "polite", "rusty", "sturdy", "tender", "vivid", "wooden", "young",
)  # fmt: skip

TOPICS = {
    "animal": (
        "horse", "tiger", "rabbit", "eagle", "dolphin", "spider", "monkey", "camel", "turtle", "wolf", "sheep", "snake", "goat", "whale", "parrot",
        "donkey", "salmon", "beetle", "otter", "fox",
    ),
    "food": (
        "bread", "cheese", "soup", "rice", "butter", "salad", "honey", "pasta", "cake", "potato", "onion", "sausage", "yogurt", "pancake", "carrot",
        "tomato", "cookie", "bacon", "noodle", "pie",
    ),
    "place": (
        "library", "airport", "museum", "station", "hospital", "school", "market", "hotel", "village", "bakery", "farm", "office", "church", "park",
        "beach", "prison", "palace", "factory", "stadium", "harbor",
    ),
    "music": (
        "piano", "guitar", "drum", "flute", "song", "opera", "trumpet", "melody", "choir", "rhythm", "concert", "cello", "symphony", "banjo", "chord",
        "ballad", "organ", "harp", "saxophone", "orchestra",
    ),
    "sport": (
        "tennis", "football", "golf", "boxing", "hockey", "rugby", "cricket", "baseball", "swimming", "cycling", "skiing", "rowing", "wrestling",
        "volleyball", "judo", "surfing", "fencing", "archery", "marathon", "badminton",
    ),
}  # fmt: skip

# the lists above are parts of prompts whose results are written down: longer needs draw on these as well
MORE_ADJECTIVES = (
    "able", "amber", "ample", "ancient", "angry", "arctic", "ashen", "autumn", "awake", "basic", "bold", "bright", "brisk", "broad", "calm",
    "careful", "cheap", "cheerful", "chilly", "civil", "clean", "clear", "cloudy", "cold", "common", "cosy", "crisp", "curious", "curly", "damp",
    "daring", "dark", "deep", "dense", "distant", "double", "dry", "dull", "early", "easy", "elder", "empty", "equal", "even", "exact", "faint",
    "fair", "famous", "fancy", "far", "fast", "fearless", "fertile", "fierce", "final", "firm", "flat", "fluffy", "foggy", "formal", "fragile",
    "free", "fresh", "friendly", "full", "funny", "fuzzy", "generous", "giant", "glad", "glossy", "grand", "grateful", "gray", "green", "handy",
    "happy", "hardy", "harsh", "heavy", "helpful", "hidden", "high", "honest", "huge", "hungry", "icy", "ideal", "idle", "jagged", "joyful", "keen",
    "kind", "large", "late", "lazy", "light", "little", "local", "lonely", "long", "loose", "loud", "lovely", "loyal", "lucky", "lunar", "major",
    "mellow", "mild", "mighty", "misty", "muddy", "mute", "neat", "nervous", "new", "nimble", "normal", "odd", "old", "olive", "open", "patient",
    "perfect", "plain", "plump", "precise", "pretty", "prompt", "proud", "pure", "purple", "ragged", "rare", "raw", "ready", "regal", "rich",
    "rigid", "ripe", "robust", "rosy", "rough", "round", "royal", "rural", "sandy", "scarce", "secret", "serene", "shady", "sharp", "shiny",
    "short", "shy", "silent", "simple", "single", "slim", "slow", "small", "smart", "smooth", "snowy", "social", "soft", "solar", "solid", "sour",
    "spare", "spicy", "steady", "steep", "stern", "sticky", "still", "stormy", "strange", "strict", "strong", "subtle", "sudden", "sunny", "super",
    "sweet", "swift", "tall", "tame", "tart", "tasty", "thick", "thin", "tidy", "timid", "tiny", "tired", "total", "tough", "tranquil", "true",
    "typical", "unique", "upper", "urban", "usual", "vague", "vast", "vocal", "warm", "weary", "whole", "wicked", "wide", "wild", "wise", "witty",
    "worthy", "yellow", "zesty",
)  # fmt: skip

MORE_NOUNS = (
    "acorn", "actor", "album", "anchor", "angle", "apron", "arch", "arrow", "artist", "attic", "author", "badge", "ball", "bamboo", "banner",
    "barrel", "basket", "beacon", "bell", "bench", "berry", "blanket", "board", "boat", "bottle", "bowl", "branch", "brick", "bucket", "button",
    "cabin", "cable", "camera", "canal", "canvas", "carpet", "cellar", "chain", "chair", "chalk", "cherry", "circle", "cliff", "clock", "cloud",
    "coast", "coat", "coin", "comet", "compass", "copper", "corner", "cotton", "cradle", "crane", "crown", "crystal", "cup", "curtain", "daisy",
    "desert", "desk", "diamond", "doctor", "door", "drawer", "dream", "duck", "dust", "engine", "fabric", "falcon", "feather", "fence", "ferry",
    "field", "finger", "flag", "flame", "flower", "fountain", "frame", "friend", "frog", "fruit", "galaxy", "gate", "ghost", "giraffe", "glacier",
    "glass", "glove", "grain", "grape", "grass", "hammer", "hat", "hedge", "helmet", "hill", "hive", "honor", "hook", "house", "iron", "ivory",
    "jacket", "jar", "jewel", "jungle", "kettle", "key", "kitten", "knight", "ladder", "lake", "lamp", "lantern", "leaf", "lemon", "letter",
    "lighthouse", "lily", "lion", "lizard", "lock", "maple", "marble", "mask", "meadow", "medal", "melon", "meteor", "mill", "mint", "mitten",
    "moon", "moth", "motor", "mountain", "needle", "nest", "net", "novel", "oak", "oasis", "oven", "owl", "paddle", "page", "paint", "panda",
    "panel", "paper", "path", "peach", "pearl", "pebble", "pencil", "pepper", "picnic", "pilot", "pine", "pirate", "plate", "plum", "pocket",
    "poem", "pond", "poppy", "prism", "puzzle", "quartz", "queen", "quill", "radar", "raft", "rail", "rain", "raven", "ribbon", "ring", "road",
    "robin", "robot", "rocket", "roof", "root", "rope", "rose", "ruby", "saddle", "sail", "sand", "scarf", "seal", "seed", "shadow", "shell",
    "ship", "shoe", "shovel", "signal", "silk", "smoke", "snail", "snow", "sofa", "spark", "spoon", "spring", "square", "stair", "star", "statue",
    "stone", "storm", "stove", "straw", "stream", "street", "string", "sugar", "summit", "swan", "table", "teapot", "tent", "thistle", "thread",
    "throne", "thunder", "ticket", "toast", "tower", "town", "train", "tree", "tulip", "tunnel", "umbrella", "valley", "vase", "vessel", "vine",
    "voyage", "wagon", "wall", "walnut", "water", "wave", "whistle", "wheel", "willow", "wind", "wing", "wizard", "wool", "yacht", "zebra",
)  # fmt: skip

ALL_ADJECTIVES = (*ADJECTIVES, *MORE_ADJECTIVES)
# words that are in two lists, such as "piano", once
ALL_NOUNS = tuple(dict.fromkeys((*KEYS, *MORE_NOUNS, *(word for words in TOPICS.values() for word in words))))


def made_up_words(rng: random.Random, length: int = 6) -> Iterator[str]:
    """Words of `length` random letters without end, each once."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choices(string.ascii_lowercase, k=length))
        if word not in seen:
            seen.add(word)
            yield word
