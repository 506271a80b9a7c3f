"""Captions from attributes: the words a small image-text model of faces is taught, and of which
images each is true.

The forty attributes are those of CelebA (Liu et al. 2015). "Attractive" and "Blurry" are left out:
one is an opinion, the other says nothing of a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

# attribute -> what is seen where it holds; each fits into "a person with ...".
WITH: dict[str, tuple[str, ...]] = {
    "5_o_Clock_Shadow": ("stubble", "a five o'clock shadow"),
    "Arched_Eyebrows": ("arched eyebrows", "thin eyebrows"),
    "Bags_Under_Eyes": ("bags under the eyes", "tired eyes"),
    "Bald": ("a bald head", "no hair"),
    "Bangs": ("bangs", "a fringe", "hair over the forehead"),
    "Big_Lips": ("big lips", "full lips"),
    "Big_Nose": ("a big nose", "a large nose"),
    "Black_Hair": ("black hair", "dark hair"),
    "Blond_Hair": ("blond hair", "blonde hair", "fair hair"),
    "Brown_Hair": ("brown hair",),
    "Bushy_Eyebrows": ("bushy eyebrows", "thick eyebrows"),
    "Chubby": ("a chubby face", "chubby cheeks"),
    "Double_Chin": ("a double chin",),
    "Eyeglasses": ("glasses", "eyeglasses", "spectacles"),
    "Goatee": ("a goatee", "a chin beard"),
    "Gray_Hair": ("gray hair", "grey hair", "white hair"),
    "Heavy_Makeup": ("heavy makeup", "makeup"),
    "High_Cheekbones": ("high cheekbones",),
    "Mouth_Slightly_Open": ("an open mouth", "visible teeth"),
    "Mustache": ("a mustache", "a moustache"),
    "Narrow_Eyes": ("narrow eyes",),
    "Oval_Face": ("an oval face",),
    "Pale_Skin": ("pale skin",),
    "Pointy_Nose": ("a pointy nose",),
    "Receding_Hairline": ("a receding hairline", "a high forehead"),
    "Rosy_Cheeks": ("rosy cheeks",),
    "Sideburns": ("sideburns",),
    "Smiling": ("a smile", "a smiling mouth"),
    "Straight_Hair": ("straight hair",),
    "Wavy_Hair": ("wavy hair", "curly hair"),
    "Wearing_Earrings": ("earrings",),
    "Wearing_Hat": ("a hat", "a cap"),
    "Wearing_Lipstick": ("lipstick", "red lips"),
    "Wearing_Necklace": ("a necklace",),
    "Wearing_Necktie": ("a necktie", "a tie", "a suit and tie"),
}
# attribute, value -> who is seen.
WHO: dict[tuple[str, bool], tuple[str, ...]] = {
    ("Male", True): ("a man",),
    ("Male", False): ("a woman",),
    ("Young", True): ("a young person",),
    ("Young", False): ("an old person", "an elderly person"),
    ("No_Beard", False): ("a person with a beard", "a bearded man", "a beard"),
    ("No_Beard", True): ("a person without a beard", "a shaved face"),
    ("Smiling", True): ("a smiling person",),
    ("Smiling", False): ("a serious person", "a person who does not smile"),
    ("Mouth_Slightly_Open", False): ("a closed mouth",),
    ("Bald", False): ("a person with hair",),
}
# what a word can be about -> the attributes that tell of it; which parts these are is found in
# images, see `grounded`.
TELLS: dict[str, tuple[str, ...]] = {
    "hair": (
        "Bald",
        "Black_Hair",
        "Blond_Hair",
        "Brown_Hair",
        "Gray_Hair",
        "Straight_Hair",
        "Wavy_Hair",
    ),
    "forehead": ("Bangs", "Receding_Hairline", "Wearing_Hat"),
    "eyebrows": ("Arched_Eyebrows", "Bushy_Eyebrows"),
    "eyes": ("Bags_Under_Eyes", "Eyeglasses", "Narrow_Eyes"),
    "nose": ("Big_Nose", "Pointy_Nose"),
    "mouth": ("Big_Lips", "Mouth_Slightly_Open", "Smiling", "Wearing_Lipstick"),
    "skin": ("Pale_Skin", "Rosy_Cheeks"),
    "beard": ("5_o_Clock_Shadow", "Goatee", "Mustache", "No_Beard", "Sideburns"),
    "clothes": ("Wearing_Necklace", "Wearing_Necktie"),
}
# Where the alignment of these photos puts what it aligns by, (x, y) in shares of the side.
LANDMARKS = {
    "eyes": ((0.3945, 0.4772), (0.6053, 0.4777)),
    "nose": ((0.5, 0.62),),
    "mouth": ((0.499, 0.749),),
}
# part of an image -> what it is called.
NOUNS: dict[str, tuple[str, ...]] = {
    "hair": ("hair", "a hairstyle", "a head of hair"),
    "eyebrows": ("eyebrows", "an eyebrow"),
    "eyes": ("eyes", "an eye"),
    "nose": ("a nose",),
    "mouth": ("a mouth", "lips"),
    "skin": ("skin", "a cheek", "cheeks", "the skin of a face"),
    "clothes": ("clothes", "clothing", "a shirt"),
    "background": ("the background", "a background", "a wall", "what is behind a person"),
}
NOUN_TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "the {}")
PLACE = 0.7  # weight of where a thing is, against what it is
ENOUGH = 0.5  # of the best part's evidence, for another part to be what a word is about
ALWAYS = (
    "a person",
    "a face",
    "a photo",
    "a photo of a face",
    "a portrait of a person",
    "somebody",
)
TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a face with {}",
    "a person with {}",
    "a photo of a person with {}",
    "the {}",
)
WITHOUT = (
    "Eyeglasses",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Earrings",
    "Bangs",
    "Mustache",
    "Heavy_Makeup",
    "Wearing_Necktie",
)
_RARE = 4.0  # how much more often a held attribute that few images have is mentioned


@dataclass(frozen=True)
class Caption:
    """A text, and the attributes (column, value) that an image must have for it to be true; none:
    true of every image.
    """

    text: str
    needs: tuple[tuple[int, bool], ...] = ()

    def true_of(self, attributes: Bool[np.ndarray, "n a"]) -> Bool[np.ndarray, "n"]:
        """Of which images it is true."""
        return (
            np.all([attributes[:, i] == value for i, value in self.needs], axis=0)
            if self.needs
            else np.ones(len(attributes), bool)
        )


def target(
    caption: Caption,
    concepts: Float[np.ndarray, "a d"],
    neutral: Float[np.ndarray, "d"],
    places: Mapping[int, Float[np.ndarray, "d"]] | None = None,
) -> Float[np.ndarray, "d"]:
    """Where a text belongs: the sum of the unit points of what it says, minus those of what it
    denies; `neutral` where it says nothing in particular.

    places: for attributes, the unit point of the part that they are about, which is added where the
        text says that they hold.
    """
    if not caption.needs:
        return neutral
    unit = concepts / np.linalg.norm(concepts, axis=1, keepdims=True)
    there = [PLACE * places[i] for i, value in caption.needs if value and places and i in places]
    return np.sum([*(unit[i] if value else -unit[i] for i, value in caption.needs), *there], axis=0)


def grounded(
    evidence: Float[np.ndarray, "a k"],
    names: Sequence[str],
    where: Float[np.ndarray, "k s s"],
    background: Sequence[int],
) -> tuple[dict[str, Float[np.ndarray, "k"]], dict[str, list[int]]]:
    """(how much each part is what the attributes of `TELLS` are about, 0..1; the parts of each of
    `NOUNS`), from images and attributes alone.

    evidence: how well each part by itself tells each attribute, area under the ROC curve. where:
        how often each pixel belongs to each part. background: parts that are known to be it. An
        attribute is about the parts that tell it better than they tell others, and better than
        others tell it: log odds of the evidence less the means of row and column, averaged over the
        attributes of one thing; and the part at the thing's landmark, if it has one. Hair, clothes
        and eyebrows are the parts with enough such evidence, eyes, nose and mouth those at their
        landmarks, skin the rest of what is not background.
    """
    rows = [names.index(n) for several in TELLS.values() for n in several]
    odds = np.log(evidence / (1 - np.clip(evidence, 0, 0.995)))[rows]
    left = odds - odds.mean(0) - odds.mean(1, keepdims=True) + odds.mean()
    owner = [thing for thing, several in TELLS.items() for _ in several]
    inside = np.setdiff1d(np.arange(len(where)), background)
    about, strength = {}, {}
    for thing in TELLS:
        mean = left[[o == thing for o in owner]].mean(0)
        strength[thing] = np.zeros(len(where), np.float32)
        strength[thing][inside] = mean[inside] / max(float(mean[inside].max()), 1e-6)
        about[thing] = np.where(strength[thing] >= ENOUGH, strength[thing], 0).astype(np.float32)
    nouns: dict[str, list[int]] = {noun: [] for noun in NOUNS} | {
        "background": [int(k) for k in background]
    }
    for thing, points in LANDMARKS.items():
        at = {
            int(where[inside][:, int(y * where.shape[1]), int(x * where.shape[2])].argmax())
            for x, y in points
        }
        nouns[thing] = sorted(int(inside[i]) for i in at)
        about[thing][nouns[thing]] = 1
    for k in map(int, inside):
        if not any(k in nouns[thing] for thing in LANDMARKS):
            best = max(("hair", "clothes", "eyebrows"), key=lambda thing: strength[thing][k])
            nouns[best if strength[best][k] >= ENOUGH else "skin"].append(k)
    return about, nouns


def about_table(
    about: dict[str, Float[np.ndarray, "k"]], names: Sequence[str]
) -> Float[np.ndarray, "a k"]:
    """`grounded`'s first answer per attribute; zeros for those that are about no part."""
    table = np.zeros((len(names), len(next(iter(about.values())))), np.float32)
    for thing, several in TELLS.items():
        table[[names.index(n) for n in several]] = about[thing]
    return table


def single_captions(names: Sequence[str]) -> list[Caption]:
    """Every caption that mentions one attribute, and those that are true of all. names: of the
    columns.
    """
    at = {name: i for i, name in enumerate(names)}
    found = [Caption(text) for text in ALWAYS]
    for name, phrases in WITH.items():
        found += [Caption(_fill(t, p), ((at[name], True),)) for p in phrases for t in TEMPLATES]
    for (name, value), phrases in WHO.items():
        found += [
            Caption(_fill(t, p), ((at[name], value),)) for p in phrases for t in TEMPLATES[:3]
        ]
    for name in WITHOUT:
        bare = WITH[name][0].removeprefix("a ")
        found += [
            Caption(f"a {who} without {bare}", ((at[name], False),)) for who in ("person", "face")
        ]
    return found


def _fill(template: str, phrase: str) -> str:
    if template.startswith("the "):
        return f"the {phrase.removeprefix('a ').removeprefix('an ')}"
    return template.replace("{}", phrase)


def composed_caption(
    row: Bool[np.ndarray, "a"],
    names: Sequence[str],
    frequency: Float[np.ndarray, "a"],
    rng: np.random.Generator,
) -> Caption:
    """A caption of one to four things that hold for one image, rare ones more often: "a photo of
    a young woman with blond hair and a smile".

    row: its attributes; frequency: share of all images that have each.
    """
    at = {name: i for i, name in enumerate(names)}
    held = [name for name in WITH if row[at[name]]]
    weight = np.array([1 / (1 / _RARE + frequency[at[n]]) for n in held])
    count = min(len(held), int(rng.integers(1, 4)))
    chosen = (
        [str(n) for n in rng.choice(held, count, replace=False, p=weight / weight.sum())]
        if count
        else []
    )
    needs = [(at[n], True) for n in chosen]
    who = ["person"]
    if rng.random() < 0.6:
        who, needs = (
            [("man" if row[at["Male"]] else "woman")],
            [*needs, (at["Male"], bool(row[at["Male"]]))],
        )
    if rng.random() < 0.4:
        who, needs = (
            [("young" if row[at["Young"]] else "old"), *who],
            [*needs, (at["Young"], bool(row[at["Young"]]))],
        )
    things = [str(rng.choice(WITH[n])) for n in chosen]
    start = str(rng.choice(("", "a photo of ", "a picture of ", "a portrait of ")))
    article = "an" if who[0][0] in "aeiou" else "a"
    text = f"{start}{article} {' '.join(who)}"
    if things:
        text += f"{rng.choice((' with ', ', ')) if len(things) > 1 else ' with '}{_listed(things)}"
    return Caption(text, tuple(needs))


def _listed(things: list[str]) -> str:
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
