"""Evaluation: every number against its definition written out, the published protocols'
differences, and the verb on files.
"""

import json
import math

import numpy as np
import pytest
from fakes import configured
from PIL import Image
from scipy.ndimage import distance_transform_edt

from sis_jax.checkpoints.student import load_student
from sis_jax.data import draw
from sis_jax.data.benchmarks import open_benchmark
from sis_jax.evaluate import evaluate
from sis_jax.ops import metrics, protocols
from sis_jax.ops.resize import resize_plain
from sis_jax.ops.scoring import match_names, measure
from sis_jax.runs import cli
from sis_jax.runs.metrics import Metrics
from sis_jax.runs.page import write_page
from sis_jax.runs.run import RunFolder
from sis_jax.stages import evaluate as evaluate_stage
from sis_jax.types import Info, SisError, UsageError

pytestmark = pytest.mark.integration

PRED = [{"id": 0, "name": "background"}, {"id": 1, "name": "Hair"}, {"id": 2, "name": "part 2"}]
TRUE = [
    {"id": i, "name": n} for i, n in enumerate(["background", "skin", "hair", "l_eye", "r_eye"])
]
BINARY = [{"id": 0, "name": "background"}, {"id": 1, "name": "foreground"}]


def pairs(n=6, seed=0, size=(24, 20), classes=(3, 5)):
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        prediction, truth = (
            np.kron(rng.integers(0, k, (size[0] // 4, size[1] // 4)), np.ones((4, 4))).astype(
                np.uint8
            )
            for k in classes
        )
        truth[rng.random(truth.shape) < 0.05] = 255
        found.append((f"{i}", prediction, truth))
    return found


# ------------------------------------------------------------------------------------------ measure


def test_the_stored_exact_scores(goldens):
    with np.load(goldens / "misc" / "metrics.npz", allow_pickle=False) as file:
        golden = dict(file)
    classes = [{"id": i, "name": f"c{i}"} for i in range(5)]
    many = measure(
        [(str(i), golden[f"multi/{i}/pred"], golden[f"multi/{i}/gt"]) for i in range(4)],
        classes,
        classes,
        resamples=0,
    )
    np.testing.assert_array_equal(many["confusion"], golden["multi/confusion_gt_rows"])
    for key in ("iou", "f1", "precision", "recall"):
        np.testing.assert_allclose(
            [c[key] for c in many["zero_label"]["classes"]], golden[f"multi/{key}"], rtol=1e-12
        )
    assert many["zero_label"]["mean_iou"] == pytest.approx(
        float(golden["multi/miou_present"]), rel=1e-12
    )
    assert many["zero_label"]["accuracy"] == pytest.approx(
        float(golden["multi/accuracy"]), rel=1e-12
    )
    two = measure(
        [(str(i), golden[f"bin/{i}/pred"], golden[f"bin/{i}/gt"]) for i in range(4)],
        BINARY,
        BINARY,
        resamples=0,
    )
    found = [
        two["foreground"][f"border_{k}"] for k in ("iou_foreground", "iou_background", "mean_iou")
    ]
    np.testing.assert_allclose(found, golden["bin/total/iou_fg_bg_mean_r3.0"], rtol=1e-12)
    found = [two["foreground"][k] for k in ("iou_foreground", "iou_background", "mean_iou")]
    np.testing.assert_allclose(found, golden["bin/total/iou_fg_bg_mean_rall"], rtol=1e-12)
    json.dumps(many)


def test_zero_label_scores_by_definition():
    found = measure(pairs(), PRED, TRUE, resamples=0)
    hits = union = count = 0
    for _, p, t in pairs():
        keep = t != 255
        hits += ((p == 1) & (t == 2) & keep).sum()  # "Hair" means "hair"
        union += (((p == 1) | (t == 2)) & keep).sum()
        count += ((((p == 0) & (t == 0)) | ((p == 1) & (t == 2))) & keep).sum()
    rows = {c["name"]: c for c in found["zero_label"]["classes"]}
    assert rows["hair"]["iou"] == pytest.approx(hits / union)
    assert rows["skin"]["iou"] == 0.0  # nobody predicts it: its pixels are missed, not left out
    assert found["zero_label"]["accuracy"] == pytest.approx(count / found["pixels"])
    assert found["zero_label"]["mean_iou"] == pytest.approx(
        np.mean([c["iou"] for c in found["zero_label"]["classes"]])
    )
    assert found["assignment"]["zero_label"] == ["background", "hair", None]
    assert "skin, l_eye, r_eye" in found["warnings"][0]


def test_matchings_are_the_best_of_all_and_stay_apart():
    from itertools import permutations

    data = pairs(seed=3)
    found = measure(data, PRED, TRUE, resamples=0)
    counts = np.array(found["confusion"])
    best = max(
        permutations(range(5), 3), key=lambda to: sum(counts[t, p] for p, t in enumerate(to))
    )
    names = [c["name"] for c in TRUE]
    assert found["assignment"]["hungarian"] == [names[t] for t in best]
    assert found["hungarian"]["accuracy"] == pytest.approx(
        sum(counts[t, p] for p, t in enumerate(best)) / counts.sum()
    )
    assert found["assignment"]["majority"] == [names[t] for t in counts.argmax(0)]
    assert (
        found["majority"]["accuracy"]
        >= found["hungarian"]["accuracy"]
        >= found["zero_label"]["accuracy"]
    )
    alone = measure(data, PRED, TRUE, resamples=0, matching=())
    assert "hungarian" not in alone
    assert json.dumps(alone["zero_label"]) == json.dumps(
        found["zero_label"]
    )  # as text, because NaN is not NaN


def test_majority_leaves_a_class_nobody_predicts_alone():
    assert metrics.majority(np.array([[3, 0, 1], [1, 0, 5]])).tolist() == [0, -1, 1]
    assert metrics.hungarian(np.array([[5, 4, 0]])).tolist() == [0, -1, -1]


def test_foreground_is_class_0_against_the_rest():
    found = measure(pairs(), PRED, TRUE, resamples=0)["foreground"]
    total, per_image = np.zeros((2, 2), int), []
    for _, p, t in pairs():
        keep = t != 255
        counts = metrics.confusion((t > 0)[keep], (p > 0)[keep], 2)
        total += counts
        per_image.append(metrics.iou(counts)[1])
    np.testing.assert_allclose(
        [found["iou_background"], found["iou_foreground"]], metrics.iou(total)
    )
    assert found["iou_image_mean"] == pytest.approx(np.mean(per_image))
    assert found["accuracy"] == pytest.approx(np.trace(total) / total.sum())
    assert found["f1"] == pytest.approx(2 * total[1, 1] / (total.sum(0) + total.sum(1))[1])


def test_border_scores_of_classes_by_brute_force():
    found = measure(pairs(3), PRED, TRUE, resamples=0)
    hits = union = 0
    for _, p, t in pairs(3):
        band = metrics.boundary_band(t, 3.0)
        hits += ((p == 1) & (t == 2) & band).sum()
        union += (((p == 1) | (t == 2)) & band).sum()
    assert found["zero_label"]["classes"][2]["border_iou"] == pytest.approx(hits / union)


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.5, 6.0])
def test_the_border_band_is_that_of_distance_transforms(radius):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        mask = np.kron(
            rng.choice(np.array([0, 1, 2, 255], np.uint8), (4, 6)), np.ones((5, 3), np.uint8)
        )
        valid, band = mask != 255, np.zeros(mask.shape, bool)
        for own in (mask == class_id for class_id in range(3)):
            band |= own & (distance_transform_edt(~(valid & ~own)) <= radius)
        np.testing.assert_array_equal(metrics.boundary_band(mask, radius), band)


def test_class_map_renames_merges_and_drops():
    rows, assigned, lookup, _ = match_names(
        PRED, TRUE, {"part 2": ["l_eye", "r_eye"], "hair": None}
    )
    assert rows == ["background", "skin", "hair", "part 2"]
    assert assigned.tolist() == [0, -1, 3]
    assert lookup[[0, 1, 2, 3, 4, 255]].tolist() == [0, 1, 2, 3, 3, 255]
    found = measure(pairs(), PRED, TRUE, classes_map={"part 2": ["l_eye", "r_eye"]}, resamples=0)
    hits = sum(((p == 2) & np.isin(t, (3, 4))).sum() for _, p, t in pairs())
    union = sum((((p == 2) | np.isin(t, (3, 4))) & (t != 255)).sum() for _, p, t in pairs())
    assert found["zero_label"]["classes"][3]["iou"] == pytest.approx(hits / union)
    assert (
        measure(pairs(), PRED, TRUE, classes_map={"part 2": "SKIN"}, resamples=0)["assignment"][
            "zero_label"
        ][2]
        == "skin"
    )
    with pytest.raises(
        UsageError, match=r"names 'beard', which is no true class; there are background, hair"
    ):
        match_names(PRED, TRUE, {"hair": "beard"})
    with pytest.raises(UsageError, match=r"names 'beard', which is no predicted class"):
        match_names(PRED, TRUE, {"beard": "hair"})


def test_two_true_classes_take_every_part_as_foreground():
    data = [(n, p, np.where(t == 255, 255, t > 0).astype(np.uint8)) for n, p, t in pairs()]
    found = measure(data, PRED, BINARY, resamples=0)
    assert found["assignment"]["zero_label"] == ["background", "foreground", "foreground"]
    assert found["zero_label"]["mean_iou"] == pytest.approx(found["foreground"]["mean_iou"])


def test_bootstrap_intervals_are_those_of_resampled_images():
    data = pairs(12)
    found = measure(data, PRED, TRUE, resamples=200, seed=5)
    again = measure(data, PRED, TRUE, resamples=200, seed=5)
    assert json.dumps(found) == json.dumps(again)
    assert json.dumps(found) != json.dumps(measure(data, PRED, TRUE, resamples=200, seed=6))
    drawn = []
    for weights in metrics.resampling_weights(12, 200, 5):
        picked = [data[i] for i, times in enumerate(weights) for _ in range(times)]
        drawn.append(measure(picked, PRED, TRUE, resamples=0, matching=())["foreground"])
    for key in ("mean_iou", "iou_image_mean", "max_f", "accuracy", "f1"):
        np.testing.assert_allclose(
            found["foreground"]["intervals"][key],
            np.percentile([d[key] for d in drawn], [2.5, 97.5]),
            rtol=1e-6,
        )
    low, high = found["zero_label"]["mean_iou_interval"]
    assert low < found["zero_label"]["mean_iou"] < high
    assert measure(data[:1], PRED, TRUE)["zero_label"]["mean_iou_interval"] is None


def test_worst_images_come_first_and_predictions_of_another_size_are_resized():
    truth = np.kron(np.array([[0, 1], [1, 0]]), np.ones((8, 8))).astype(np.uint8)
    found = measure(
        [("good", truth[::2, ::2], truth), ("bad", 1 - truth, truth)], BINARY, BINARY, resamples=0
    )
    assert [r["name"] for r in found["per_image"]] == ["bad", "good"]
    assert [r["iou_foreground"] for r in found["per_image"]] == [0.0, 1.0]


def test_what_cannot_be_measured():
    with pytest.raises(SisError, match="nothing was measured"):
        measure([], PRED, TRUE)
    with pytest.raises(SisError, match="prediction of a holds class id 7"):
        measure([("a", np.full((2, 2), 7), np.zeros((2, 2), np.uint8))], PRED, TRUE)
    with pytest.raises(SisError, match="mask of a holds class id 9"):
        measure([("a", np.zeros((2, 2), int), np.full((2, 2), 9, np.uint8))], PRED, TRUE)
    with pytest.raises(UsageError, match="did you mean 'melas'"):
        measure(pairs(), PRED, TRUE, "mela")
    with pytest.raises(UsageError, match="type 'hungarian' or 'majority'"):
        measure(pairs(), PRED, TRUE, matching=("greedy",))


# ---------------------------------------------------------------------------------------- protocols


def soft_pairs(n=5):
    """Scores of two classes against noisy truths, one pair without any foreground."""
    rng = np.random.default_rng(1)
    found = []
    for i in range(n):
        truth = np.kron(rng.integers(0, 2, (3, 4)), np.ones((5, 5))).astype(np.uint8) * (i > 0)
        p = (
            np.clip(0.25 + 0.5 * truth + rng.normal(0, 0.3, truth.shape), 0, 1)
            if i
            else np.zeros(truth.shape)
        )
        found.append((str(i), np.stack([1 - p, p], -1).astype(np.float32), truth.astype(np.uint8)))
    return found


def f_values(data, thresholds, beta2):
    """F per image and threshold, from the definition."""
    table = []
    for _, scores, truth in data:
        row = []
        for k in thresholds:
            predicted = np.round(scores[..., 1].astype(np.float64) * 255, 4) > k
            tp, pp, gt = (predicted & (truth > 0)).sum(), predicted.sum(), (truth > 0).sum()
            precision, recall = tp / pp if pp else 1.0, tp / gt if gt else 1.0
            below = beta2 * precision + recall
            row.append((1 + beta2) * precision * recall / below if below else 0.0)
        table.append(row)
    return np.array(table)


@pytest.mark.parametrize(
    ("name", "thresholds", "beta2", "combine"),
    [
        ("voynov", range(255), 0.3, lambda f: f.mean(0).max()),
        ("melas", range(1, 255), 0.3, lambda f: f.mean(0).max()),
        ("selfmask", range(255), 0.09, lambda f: f.max(1).mean()),
    ],
)
def test_max_f_of_the_three_families(name, thresholds, beta2, combine):
    data = soft_pairs()
    if name == "voynov":  # the soft mask is an 8-bit picture
        data = [(n, np.round(s * 255).astype(np.float32) / 255, t) for n, s, t in data]
    rule = protocols.get(name)
    found = measure(data, BINARY, BINARY, rule, resamples=0)["foreground"]
    assert found["max_f"] == pytest.approx(combine(f_values(data, thresholds, beta2)), abs=2e-3)
    exact = [protocols.f_curve(s[..., 1], t > 0, t < 255, beta2) for _, s, t in data]
    np.testing.assert_allclose(np.stack(exact), f_values(data, range(255), beta2), atol=1e-6)


def test_an_image_without_foreground_counts_0_for_melas_and_is_left_out_elsewhere():
    data = soft_pairs()
    each = [
        metrics.iou(metrics.confusion(t, (s[..., 1] > 0.5).astype(np.uint8), 2))[1]
        for _, s, t in data
    ]
    assert math.isnan(each[0])
    results = {
        p: measure(data, BINARY, BINARY, p, resamples=0)["foreground"]["iou_image_mean"]
        for p in ("melas", "selfmask")
    }
    assert results["selfmask"] == pytest.approx(np.nanmean(each))
    assert results["melas"] == pytest.approx(np.nansum(each) / 5)


def test_photos_as_the_protocols_show_them():
    photo = np.random.default_rng(0).integers(0, 256, (300, 401, 3)).astype(np.uint8)
    shapes = {p: protocols.get(p).photo(photo).shape[:2] for p in protocols.PROTOCOLS}
    short = (128, 171)  # 128 * 401 // 300
    assert shapes == {
        "native": (300, 401),
        "sis": (128, 128),
        "l4f": (300, 401),
        "voynov": short,
        "melas": short,
        "selfmask": (300, 401),
    }
    assert protocols.get("sis").at(64).photo(photo).shape[:2] == (64, 64)
    assert protocols.get("sis").at(0).photo(photo).shape[:2] == (300, 401)
    assert protocols.get("native").at(150).photo(photo).shape[:2] == (150, 200)
    squeezed = np.asarray(Image.fromarray(photo).resize((512, 512), Image.Resampling.BILINEAR))
    corners = protocols.get("sis").photo(photo)[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_array_equal(
        corners, squeezed[[0, 0, -1, -1], [0, -1, 0, -1]]
    )  # aligned corners keep the corners


@pytest.mark.parametrize(("key", "aligned"), [("bilinear", False), ("bilinear_ac", True)])
def test_resize_matches_the_stored_reference(goldens, key, aligned):
    with np.load(goldens / "misc" / "resize.npz", allow_pickle=False) as file:
        cases = {k.split("/")[0] for k in file.files}
        for case in cases:
            x, expected = file[f"{case}/x"][0], file[f"{case}/{key}"][0]
            np.testing.assert_allclose(
                resize_plain(x, expected.shape[:2], aligned=aligned), expected, atol=1e-5
            )


def test_probabilities_are_resized_as_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (6, 7, 4)).astype(np.float32)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids, soft = protocols.get("sis").masks(scores, 30, 33)
    large = resize_plain(logits, (30, 33), aligned=True)
    np.testing.assert_array_equal(ids, large.argmax(-1))
    np.testing.assert_allclose(soft, 1 - np.exp(large[..., 0]) / np.exp(large).sum(-1), atol=1e-4)


# ----------------------------------------------------------------------------------------- the verb


class Threshold:
    """A network that calls bright pixels "disc", softly."""

    classes = ({"id": 0, "name": "background"}, {"id": 1, "name": "disc"})

    def __init__(self):
        self.seen = []

    def scores(self, images):
        self.seen += [i.shape[:2] for i in images]
        return [
            np.stack([1 - p, p], -1)
            for p in (np.asarray(i[..., 0], np.float32) / 255 for i in images)
        ]


def disc_folders(place, n=5, size=(40, 50)):
    y, x = np.mgrid[: size[0], : size[1]]
    for kind in ("photos", "masks", "grey", "predicted"):
        (place / kind).mkdir(parents=True)
    for i in range(n):
        mask = (np.hypot(x - 25, y - 20) < 8 + i).astype(np.uint8)
        wrong = mask.copy()
        wrong[:, : 2 * i] = 1
        photo = np.repeat((60 + 140 * wrong)[..., None], 3, 2).astype(np.uint8)
        Image.fromarray(photo).save(place / "photos" / f"{i}.png")
        draw.palette_png(mask).save(place / "masks" / f"{i}.png")
        Image.fromarray(mask * 255).save(place / "grey" / f"{i}.png")
        draw.palette_png(wrong).save(place / "predicted" / f"{i}.png")
    for kind in ("masks", "predicted"):
        (place / kind / "classes.json").write_text(json.dumps(list(Threshold.classes)))
    return place


def test_a_network_and_its_saved_masks_score_alike(tmp_path):
    place = disc_folders(tmp_path)
    live = evaluate(
        Threshold(), images=str(place / "photos"), masks=str(place / "masks"), resamples=50
    )
    saved = evaluate(
        images=str(place / "photos"),
        masks=str(place / "masks"),
        predictions=str(place / "predicted"),
        resamples=50,
    )
    assert live["confusion"] == saved["confusion"]
    assert live["zero_label.mean_iou"] == saved["zero_label.mean_iou"] < 1
    grey = evaluate(
        Threshold(), images=str(place / "photos"), masks=str(place / "grey"), resamples=0
    )
    assert grey["foreground.mean_iou"] == live["foreground.mean_iou"]
    assert live.values["true_classes"] == ["background", "disc"]


def test_size_and_protocol_decide_what_the_network_sees(tmp_path):
    place = disc_folders(tmp_path)
    seen = {}
    for name, options in (
        ("native", {}),
        ("sis", {}),
        ("melas", {}),
        ("native", {"size": 20}),
        ("sis", {"size": 0}),
    ):
        network = Threshold()
        evaluate(
            network,
            images=str(place / "photos"),
            masks=str(place / "masks"),
            protocol=name,
            resamples=0,
            batch=2,
            **options,
        )
        seen[name, options.get("size")] = set(network.seen)
    assert seen == {
        ("native", None): {(40, 50)}, ("sis", None): {(128, 128)}, ("melas", None): {(128, 160)},
        ("native", 20): {(20, 25)}, ("sis", 0): {(40, 50)},
    }  # fmt: skip


def test_benchmarks_are_cut_square_and_thresholded_as_the_protocol_says(tmp_path):
    root = tmp_path / "CUB_200_2011"
    for folder in (root / "images" / "1.B", root / "segmentations" / "1.B"):
        folder.mkdir(parents=True)
    grey = np.zeros((20, 40), np.uint8)
    grey[5:15, 5:15], grey[5:15, 15:25] = 255, 100
    Image.fromarray(np.repeat(grey[..., None], 3, 2)).save(root / "images" / "1.B" / "a.png")
    Image.fromarray(grey).save(root / "segmentations" / "1.B" / "a.png")
    (root / "images.txt").write_text("1 1.B/a.png\n")
    (root / "train_test_split.txt").write_text("1 0\n")
    pixels = {}
    for name in ("native", "melas", "selfmask"):
        found = evaluate(
            Threshold(), benchmark="cub", root=str(tmp_path), protocol=name, resamples=0
        )
        pixels[name] = (found["pixels"], int(np.sum(found["confusion"][1])))
    assert pixels == {"native": (800, 100), "melas": (400, 50), "selfmask": (800, 200)}
    assert (
        evaluate(Threshold(), benchmark="cub", root=str(tmp_path), protocol="melas").paper[
            "iou_image_mean"
        ]
        == 0.664
    )
    assert len(open_benchmark("cub", tmp_path)) == 1


def test_a_run_keeps_every_evaluation_and_does_not_repeat_one(tmp_path):
    place = disc_folders(tmp_path)
    run = tmp_path / "run"
    with (
        RunFolder.open(run) as folder,
        folder.stage(configured("discover", k=3, layer="32x32"), generator=Info("discs")),
    ):
        pass
    given = {
        "images": str(place / "photos"),
        "masks": str(place / "masks"),
        "predictions": str(place / "predicted"),
        "resamples": 20,
    }
    first = evaluate(run, **given)
    evaluate(run, protocol="melas", **given)
    content = json.loads((run / "metrics.json").read_text())
    assert set(content["evaluations"]) == {"photos-native-predictions", "photos-melas-predictions"}
    ours = {row["name"]: row["ours"] for row in content["metrics"]}
    assert ours["photos-native-predictions: foreground IoU"] == first["foreground.iou_foreground"]
    stamp = (run / "metrics" / "photos-native-predictions.json").stat().st_mtime_ns
    again = evaluate(run, **given)
    assert (run / "metrics" / "photos-native-predictions.json").stat().st_mtime_ns == stamp
    assert again.values == Metrics.load(run, "photos-native-predictions").values
    with pytest.raises(UsageError, match="resamples=20, now asked for 30"):
        evaluate(run, **(given | {"resamples": 30}))
    assert evaluate(run, **(given | {"resamples": 0}), overwrite=True)["foreground.intervals"] == {}
    with pytest.raises(
        UsageError, match=r"has the evaluations photos-melas-predictions, photos-native-predictions"
    ):
        Metrics.load(run)
    assert "photos-melas-predictions: max F-beta" in write_page(run).read_text()


def test_metrics_save_load_and_show(tmp_path):
    place = disc_folders(tmp_path)
    found = evaluate(
        Threshold(),
        images=str(place / "photos"),
        masks=str(place / "masks"),
        out=str(tmp_path / "m.json"),
    )
    loaded = Metrics.load(tmp_path / "m.json")
    assert loaded.name == found.name
    assert loaded["foreground.mean_iou"] == found["foreground.mean_iou"]
    text = found.show()
    assert f"{found['foreground.iou_foreground']:.4f}" in text
    assert "Hungarian matching, chosen with the labels" in text
    with pytest.raises(UsageError, match="there is no file"):
        Metrics.load(tmp_path / "none.json")


def test_long_names_stand_whole_in_the_tables():
    """Each name in one cell of the scores, and word by word above its column of the confusion."""
    parts = [*PRED[:2], {"id": 2, "name": "hair with neck and clothes"}]
    true = [*TRUE[:4], {"id": 4, "name": "everything that is worn"}]
    text = Metrics("m", measure(pairs(), parts, true, resamples=0), {}).show()
    scores, _, confusion = text.partition("confusion, rows are the ground truth\n")
    assert "everything that is worn" in scores and "everything that is worn" in confusion
    heads = [line.split() for line in confusion.splitlines()[:3]]
    assert heads == [["hair", "with"], ["neck", "and"], ["background", "Hair", "clothes"]]
    assert len({len(line) for line in confusion.splitlines()[3:8]}) == 1


def test_an_npz_holds_photos_and_masks(tmp_path):
    place = disc_folders(tmp_path)
    read = [
        [np.asarray(Image.open(place / k / f"{i}.png")) for i in range(5)]
        for k in ("photos", "masks")
    ]
    np.savez(tmp_path / "both.npz", images=np.stack(read[0]), masks=np.stack(read[1]))
    alone = evaluate(Threshold(), images=str(tmp_path / "both.npz"), resamples=0)
    folders = evaluate(
        Threshold(), images=str(place / "photos"), masks=str(place / "masks"), resamples=0
    )
    assert alone["confusion"] == folders["confusion"]
    assert (
        evaluate(Threshold(), images=str(tmp_path / "both.npz"), limit=2, resamples=0)["images"]
        == 2
    )


def test_the_student_that_ships_is_measured_by_name(tmp_path, monkeypatch):
    place = disc_folders(tmp_path, n=2, size=(64, 64))
    given = {
        "images": str(place / "photos"),
        "masks": str(place / "masks"),
        "resamples": 0,
        "matching": (),
    }
    monkeypatch.chdir(tmp_path)
    found = evaluate("faces-student", **given)
    assert (
        found["images"] == 2
        and found["confusion"] == evaluate(load_student("faces-student"), **given)["confusion"]
    )
    assert not (tmp_path / "faces-student").exists()  # nothing to write into: it is no run here
    with pytest.raises(UsageError, match="did you mean 'faces-student'"):
        evaluate("faces-studnet", **given)


def test_from_the_shell(tmp_path, capsys):
    place = disc_folders(tmp_path)
    argv = [
        "--images",
        str(place / "photos"),
        "--masks",
        str(place / "masks"),
        "--predictions",
        str(place / "predicted"),
    ]
    assert (
        cli.run(
            evaluate, argv=[*argv, "--out", str(tmp_path / "m.json"), "--matching", "hungarian"]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert shown.out.split() == [str(tmp_path / "m.json")]
    assert "mean IoU of foreground and background" in shown.err
    assert "majority" not in shown.err
    assert cli.run(evaluate, argv=["--images", str(place / "photos")]) == 2
    assert "give a RUN with a student, or --predictions" in capsys.readouterr().err
    assert cli.run(evaluate, argv=["run", "--benchmark", "cub"]) == 2
    assert "--benchmark cub needs --root" in capsys.readouterr().err
    assert cli.run(evaluate, argv=[]) == 2
    assert "got neither" in capsys.readouterr().err


def test_mistakes_in_files_are_named(tmp_path):
    place = disc_folders(tmp_path)
    given = {"images": str(place / "photos"), "masks": str(place / "masks")}
    (place / "predicted" / "3.png").unlink()
    with pytest.raises(
        UsageError, match=r"has no mask for 1 of 5 photos, the first would be 3\.png"
    ):
        evaluate(predictions=str(place / "predicted"), **given)
    with pytest.raises(UsageError, match=r"has no classes\.json"):
        evaluate(predictions=str(place / "photos"), **given)
    with pytest.raises(UsageError, match="is no JSON file or text"):
        evaluate(Threshold(), classes_map="nothing.json", **given)
    with pytest.raises(UsageError, match=r"a dict is no network that can be measured"):
        evaluate_stage._load({})
    (place / "masks" / "4.png").unlink()
    found = evaluate(Threshold(), resamples=0, **given)
    assert found["images"] == 4
    assert found["warnings"] == ["1 files had no partner and were left out"]
