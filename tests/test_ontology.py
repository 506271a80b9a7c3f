"""`data/ontology.py` and `ops/class_scores.py`: words to classes, similarities to names, and what
is refused.
"""

import json

import numpy as np
import pytest

from sis_jax.data.ontology import NEUTRAL, Ontology, ontology_of
from sis_jax.ops import class_scores
from sis_jax.types import UsageError

HAIR = {"black hair": "hair", "blond hair": "hair", "a hat": "hat", "the wall": None}


def test_a_dict():
    ontology = ontology_of(HAIR, neutral=["a photo"])
    assert ontology.classes == ("hair", "hat", None, NEUTRAL) and ontology.texts == (
        *HAIR,
        "a photo",
    )
    assert ontology.owner().tolist() == [0, 0, 1, 2, 3]
    assert ontology.prompts_of("hair") == ["black hair", "blond hair"] and ontology.prompts_of(
        None
    ) == ["the wall"]
    assert ontology_of(ontology) == ontology


def test_words_and_files_say_the_same(tmp_path):
    plain, rich = tmp_path / "a.json", tmp_path / "b.json"
    plain.write_text(json.dumps(HAIR))
    rich.write_text(
        json.dumps(
            {
                "classes": {"hair": ["black hair", "blond hair"], "hat": "a hat"},
                "background": ["the wall"],
                "neutral": ["x"],
            }
        )
    )
    words = [f"{prompt}={name or ''}" for prompt, name in HAIR.items()]
    assert ontology_of(str(plain)) == ontology_of(HAIR) == ontology_of(prompts=words)
    assert ontology_of(rich) == ontology_of(HAIR, neutral=["x"])
    assert ontology_of(plain, ["a coat = clothes"]).classes == ("hair", "hat", None, "clothes")
    assert ontology_of(prompts=["2+2=4=sum", "1=one"]).prompts[0] == ("2+2=4", "sum")


def test_a_folder_does_not_hide_the_ontology_that_ships(tmp_path, monkeypatch):
    """As a run of that name, `--out faces`, is."""
    usual = ontology_of("faces")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    assert ontology_of("faces") == usual


def test_finer_classes():
    face = {"face": ["skin"], "mouth": ["lips", "teeth"]}
    ontology = ontology_of({"classes": {"face": face, "hair": "curls"}, "background": ["a wall"]})
    assert ontology.classes == ("face", "hair", None)
    assert ontology.prompts_of("face") == ["skin", "lips", "teeth"]
    assert ontology.finer_of("face") == face and ontology.finer_of("hair") == {}
    assert ontology_of(ontology) == ontology
    with pytest.raises(UsageError, match=r"classes.face.mouth must be a list of texts, got 3"):
        ontology_of({"classes": {"face": {"mouth": 3}}})


def test_templates():
    ontology = ontology_of(HAIR, templates=["a photo of {}", "{} here"])
    assert (
        ontology.filled()[2] == ["a photo of a hat", "a hat here"] and len(ontology.filled()) == 4
    )
    assert ontology_of(HAIR).filled()[0] == ["black hair"]


@pytest.mark.parametrize(
    ("source", "prompts", "said"),
    [
        (None, [], "no ontology was given: give --ontology FILE"),
        ({}, [], "the ontology is empty"),
        ({"hair": "hair"}, [], "the class 'hair' only, which every part would get"),
        ({"hair": "hair", "Hair ": "wig", "a": None}, [], "'Hair ' is there twice"),
        ({"hair": "hair"}, ["hair=wig"], "'hair' is there twice"),
        ({"  ": "hair", "b": "c"}, [], "a prompt must be a text that is not empty"),
        ({"hair": "", "b": "c"}, [], "the class of the prompt 'hair' must be a name, or null"),
        ({"hair": 3, "b": "c"}, [], "must be a name, or null for the background, got 3"),
        (None, ["hair"], "--prompt got 'hair', expected \"prompt=class\""),
        (["hair"], [], "must be a dict or the path of a JSON file, got list"),
        ("nowhere.json", [], "there is no ontology file nowhere.json"),
        ({"classes": {"hair": 3}}, [], "classes.hair must be a list of texts, got 3"),
        ({"classes": {"hair": ["a"]}, "colours": {}}, [], "the field 'colours'"),
    ],
)
def test_refused(source, prompts, said):
    with pytest.raises(UsageError) as error:
        ontology_of(source, prompts)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ('{"a": "b", "a": "c"}', "'a' twice"),
        ("[1]", "holds list, no"),
    ],
)
def test_files_that_are_no_ontology(tmp_path, text, said):
    (tmp_path / "o.json").write_text(text)
    with pytest.raises(UsageError) as error:
        ontology_of(tmp_path / "o.json")
    assert said in str(error.value) and "o.json" in str(error.value)


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_templates_need_one_place(template):
    with pytest.raises(UsageError, match=r'must hold "\{\}" once'):
        Ontology((("a", "b"), ("c", "d")), templates=(template,))


# Scores


def test_scores_are_those_of_the_best_prompt():
    regions = np.array([[1, 0, 0], [0, 0, 2]], np.float32)
    prompts = np.array([[1, 0, 0], [0, 1, 0], [0.6, 0, 0.8]], np.float32)
    cosine, probability = class_scores.class_scores(regions, prompts, np.array([0, 0, 1]), 10.0)
    np.testing.assert_allclose(cosine, [[1, 0.6], [0, 0.8]], atol=1e-6)
    np.testing.assert_allclose(probability[0, 0], 1 / (1 + np.exp(-4)), rtol=1e-5)
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-6)


def test_describing_a_class_more_often_changes_nothing():
    rng = np.random.default_rng(0)
    regions, prompts = (
        rng.standard_normal((4, 8)).astype(np.float32),
        rng.standard_normal((2, 8)).astype(np.float32),
    )
    once = class_scores.class_scores(regions, prompts, np.array([0, 1]), 20.0)[1]
    often = class_scores.class_scores(regions, prompts[[0, 0, 0, 1]], np.array([0, 0, 0, 1]), 20.0)[
        1
    ]
    np.testing.assert_allclose(once, often, rtol=1e-5)


def test_a_region_without_content_is_nothing():
    probability = class_scores.class_scores(
        np.zeros((1, 2), np.float32), np.eye(2, dtype=np.float32), np.array([0, 1]), 100.0
    )[1]
    assert probability.tolist() == [[0.5, 0.5]] and not class_scores.decide(probability)[0].named


def test_the_rule():
    rows = np.array([[0.55, 0.45, 0.0], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]], np.float32)
    first, second, third = class_scores.decide(rows, 0.2, neutral=[2])
    assert (first.best, first.second, first.named) == (
        0,
        1,
        False,
    ) and first.margin == pytest.approx(0.1, abs=1e-6)
    assert (second.best, second.named) == (1, True) and second.score == pytest.approx(0.6)
    assert (third.second, third.named) == (2, False)  # neutral
    assert third.margin == pytest.approx(-0.7) and third.score == pytest.approx(0.1)
    assert class_scores.decide(rows, 0.0)[0].named and class_scores.decide(rows, 0.2)[2].named


def test_parts_are_told_apart_beside_each_other():
    """All of it is most like skin; what the last two have more of decides."""
    logits = np.array([[6.0, 0, 0], [6, 0.5, 0], [5.5, 5, 0], [6, 0, 5]])
    owner = np.array([0, 1, 2])
    assert class_scores.softmax(logits).argmax(1).tolist() == [0, 0, 0, 0]
    assert class_scores.apart(logits, owner).argmax(1).tolist() == [0, 0, 1, 2]
    np.testing.assert_allclose(
        class_scores.apart(logits[:1], owner), class_scores.softmax(logits[:1])
    )


def test_a_finer_class_is_found_where_it_fits_best():
    skin, lip, lid, brow = range(4)
    owner = np.array([skin, lip, lid, brow])
    rows = [[5.0, -5, -5, -5], [5, -2, -4, -4], [6, 2, -6, -6], [3, -5, 3, 2]]
    found = class_scores.finer(np.array(rows), owner, usual=skin)
    assert found[:2] == [None, None]  # the second has something of a lip, the third more
    assert found[2].best == lip and found[2].score == pytest.approx(1)
    assert found[3].best == lid and found[3].second == brow and 0.6 < found[3].score < 0.8
    assert class_scores.finer(np.array(rows), owner, usual=skin, margin=0.6)[3] is None
    alone = class_scores.finer(np.array(rows)[:, 1:], owner[:3], usual=None)
    assert [v and v.best for v in alone[2:]] == [0, 1]


def test_ensembles_weigh_every_template_alike():
    texts = np.array([[[10, 0], [0, 1]]], np.float32)
    np.testing.assert_allclose(class_scores.ensemble(texts), [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_what_ships_goes_by_its_name(tmp_path, monkeypatch):
    faces = ontology_of("faces")
    assert set(faces.classes) == {"hair", "face", "neck and clothes", None}
    assert list(faces.finer_of("face")) == ["face", "eyes", "nose", "mouth"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").write_text('{"a cat": "cat", "a wall": null}')
    assert set(ontology_of("faces").classes) == {"cat", None}  # a file of that name goes first


def test_the_shipped_text_model_knows_its_words_and_refuses_others():
    import sis_jax
    from sis_jax.stages.naming import check_words, default_clip

    clip = sis_jax.load_clip(default_clip("faces64"))
    assert (
        clip.info.name == "faces-clip" and default_clip("cats256") == "openai/clip-vit-base-patch32"
    )
    check_words(
        clip,
        [*ontology_of("faces").texts, "a person with glasses", "a photo of a man with blond hair"],
    )
    with pytest.raises(
        UsageError, match=r"faces-clip does not know 'car', 'sky'.*clip-vit-base-patch32"
    ):
        check_words(clip, ["a car", "the sky"])
    for text, word in (("a person of 40 years", "40"), ("\u4eba", "\u4eba"), ("\u00e4", "\u00e4")):
        with pytest.raises(UsageError, match=f"does not know '{word}'"):
            check_words(clip, [text])


def test_words_are_checked_before_anything_is_computed():
    import sis_jax
    from sis_jax.methods.segmentation_in_style import SegmentationInStyle
    from sis_jax.runs.configs.discover import DiscoverConfig, RareClass
    from sis_jax.stages.texts import Texts

    gen = sis_jax.load_generator()
    for ontology, rare in (
        ({"a giraffe": "giraffe", "a wall": None}, None),
        (None, "a giraffe"),
        ({"hair": "hair", "a wall": None}, "a giraffe"),
    ):
        with pytest.raises(UsageError, match="does not know 'giraffe'"):
            asked = RareClass(rare=rare, neutral="a person", rare_n=20)
            config = DiscoverConfig(ontology=ontology, clip="faces-clip", rare_class=asked)
            Texts.of(gen, SegmentationInStyle(), config)


def test_the_shipped_text_model_keeps_parts_apart():
    """Every prompt of the default ontology is nearest to those of its own class."""
    import sis_jax

    faces, clip = ontology_of("faces"), sis_jax.load_clip("faces-clip")
    points = np.asarray(clip.encode_text(list(faces.texts)))
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    alike, owner = points @ points.T - 2 * np.eye(len(points)), faces.owner()
    several = [
        i
        for i in range(len(owner))
        if (owner == owner[i]).sum() > 1 and faces.classes[owner[i]] != "face"
    ]
    assert (owner[alike.argmax(1)] == owner)[several].all()
