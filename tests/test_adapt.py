"""Labels of photos that are framed like the generated images."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sis_jax.checkpoints.student import Student
from sis_jax.models.students import StudentConfig
from sis_jax.stages import adapt, train_student
from sis_jax.training.photo_labels import PhotoLabels

SIZE = 48
CORE, LIMB = (slice(12, 24), slice(16, 32)), (slice(24, 44), slice(18, 30))


class Timid(nnx.Module):
    """Certain of what is red, doubtful of what is blue."""

    def __call__(self, x, tape=None):
        red, blue = x[..., :1] > 0, x[..., 2:] > 0
        object_ = jnp.where(red, 1.5, jnp.where(blue, -1.0, -4.0))
        return jnp.concatenate([-object_, object_], -1)


def people(count=8):
    """(photos of red over blue before a grey wall, their masks)."""
    rng = np.random.default_rng(0)
    photos = rng.integers(80, 110, (count, SIZE, SIZE, 3))
    mask = np.zeros((SIZE, SIZE), bool)
    for place, colour in ((CORE, (220, 30, 30)), (LIMB, (30, 40, 200))):
        photos[(slice(None), *place)] = np.array(colour) + rng.integers(-10, 10, (count, 1, 1, 3))
        mask[place] = True
    return photos.astype(np.uint8), mask


def overlap(round_, mask):
    found = round_.target[..., 0] < 128
    return float((found & mask).sum() / (found | mask).sum())


def test_a_classifier_replaces_the_teachers_background():
    """What a timid teacher takes for background, and colours then confirm, is found; the other
    classes share the rest as the teacher has it.
    """
    photos, mask = people()
    classes = tuple({"id": i, "name": name} for i, name in enumerate(("background", "person")))
    teacher = Student(Timid(), StudentConfig(), classes, SIZE)
    given = {"mirrored": False, "pasted": False}
    plain = adapt.Round.labelled(teacher, photos, SIZE, "photos", **given)

    class Told(PhotoLabels):
        def __init__(self):
            pass

        def __call__(self, some):
            coarse = 1 - mask[::2, ::2].astype(np.float32)
            return np.broadcast_to(coarse, (len(some), *coarse.shape))

    told = adapt.Round.labelled(teacher, photos, SIZE, "photos", **given, classifier=Told())
    assert overlap(plain, mask) < 0.6 and overlap(told, mask) > 0.9
    assert np.abs(told.target.sum(-1, dtype=int) - 255).max() <= 1


@pytest.mark.parametrize(("minutes", "rounds"), [(None, 4), (100 / 60, 2), (0.0, 1)])
def test_no_round_begins_that_would_end_too_late(monkeypatch, minutes, rounds):
    """Rounds of 40 seconds: two fit 100."""
    now, done = [0.0], []
    monkeypatch.setattr(train_student.time, "perf_counter", lambda: now[0])
    training = object.__new__(train_student.StudentTraining)
    training.job = SimpleNamespace(rounds=4)
    training.stop_at = np.inf if minutes is None else 60 * minutes
    training.state = SimpleNamespace(facts={"phase": "adapt", "round": 0})

    def adapt_once():
        now[0] += 40
        done.append(training.state.facts["round"])

    training._adapt = adapt_once
    training._begin = lambda number: training.state.facts.update(round=number)
    training._choose = lambda: None
    training._finish = lambda: training.state.facts.update(phase="done")
    training.run()
    assert done == list(range(rounds))
