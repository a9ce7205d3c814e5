"""Word lists for prompts: everyday words that most tokenizers keep in one piece."""

from __future__ import annotations

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
