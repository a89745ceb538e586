"""What training relies on: scenes are reproducible, true to their captions, and fairly split."""
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from training import scenes
from training.scenes import (CAPTIONED, CELLS, COLOURS, GRID, OBJECTS, OPPOSITE, PAIR_SIZE, RELATIONS, SIZES,
                             UNCAPTIONED, VARIANTS, EmojiScenes, Scene, caption, held_out, random_scene, render)

SCENES = EmojiScenes("captioned").scenes(0, 2000)
VARIED = EmojiScenes("varied").scenes(0, 2000)


def boxes(scene):
    return [(x - k // 2, y - k // 2, x + k // 2, y + k // 2)
            for k, (x, y) in zip(scene.sizes, scene.centers)]


def parse(text):
    """Facts of a caption, variants included: (objects, relation, size word, colour)."""
    synonym = {words: plain for plain in RELATIONS for words in (plain, *VARIANTS[plain])}
    colour = "|".join(COLOURS)
    layouts = (rf"(?P<things>.+) (?:on|in front of) (?:an? )?(?P<colour>{colour}) background",
               rf"an? (?P<colour>{colour}) background with (?P<things>.+)")
    match = next(m for m in (re.fullmatch(layout, text) for layout in layouts) if m)
    words = "|".join(sorted(synonym, key=len, reverse=True))
    pair = re.fullmatch(rf"an? (.+?) ({words}) an? (.+)", match["things"])
    if pair:
        return (pair[1], pair[3]), synonym[pair[2]], None, match["colour"]
    single = re.fullmatch(r"an? (?:(small|large) )?(.+)", match["things"])
    return (single[2],), None, single[1], match["colour"]


# ---- objects and colours ---------------------------------------------------------------------

def test_there_are_80_objects_64_of_them_captioned_and_48_more_in_varied_scenes():
    """A name used twice would be two objects with one caption."""
    assert len(CAPTIONED) == 64 and len(UNCAPTIONED) == 16 and OBJECTS == CAPTIONED + UNCAPTIONED
    assert len(CELLS) == len(set(CELLS)) == 128 and set(OBJECTS) < set(CELLS)
    assert {"rocket", "moon", "red apple"} <= set(CAPTIONED) and "unicorn" in UNCAPTIONED
    assert {name for scene in VARIED for name in scene.objects} == set(CELLS)
    assert {name for scene in EmojiScenes("all").scenes(0, 1000) for name in scene.objects} == set(OBJECTS)


def test_names_are_plain_lower_case_words():
    """They go into captions unchanged, so they must read well after "a"."""
    assert all(re.fullmatch(r"[a-z]+( [a-z]+){0,2}", name) for name in CELLS)


def test_every_cell_of_the_sheet_has_its_own_image():
    """The table names cells only by their order: one missing or doubled cell would shift the rest."""
    with Image.open(scenes.ASSETS / "emoji.png") as sheet:
        assert (sheet.mode, sheet.size) == ("RGBA", (16 * 80, 8 * 80))
    sprites = [scenes.sprite(name, 40)[0].astype(int) for name in CELLS]
    assert all((scenes.sprite(name, 40)[1] < 128).mean() > 0.1 for name in CELLS)
    difference = [np.abs(a - b).mean() for a, b in itertools.combinations(sprites, 2)]
    assert min(difference) > 10


def test_colours_are_far_apart():
    """The judge calls a background right within an RGB distance of 40, half of the smallest gap."""
    gaps = [np.linalg.norm(np.subtract(a, b))
            for a, b in itertools.combinations(COLOURS.values(), 2)]
    assert len(COLOURS) == 8 and min(gaps) > 2 * 40


# ---- held-out pairs --------------------------------------------------------------------------

def test_about_a_tenth_of_all_pairs_is_held_out_in_either_order():
    """Asymmetry would show the pair in training after all, named the other way round."""
    pairs = list(itertools.combinations(CELLS, 2))
    assert 0.09 < np.mean([held_out(a, b) for a, b in pairs]) < 0.11
    assert all(held_out(a, b) == held_out(b, a) for a, b in pairs)
    assert sum(held_out(a, b) for a, b in itertools.combinations(CAPTIONED, 2)) >= 128


def test_held_out_pairs_never_appear_in_training_scenes():
    """Otherwise drawing them would be memory, not composition."""
    for scenes in (SCENES, VARIED):
        pairs = [scene.objects for scene in scenes if len(scene.objects) == 2]
        assert 0.55 < len(pairs) / len(scenes) < 0.65
        assert not any(held_out(*pair) for pair in pairs)


def test_held_out_scenes_show_nothing_else():
    """They are the test set."""
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, held_out_pairs=True) for _ in range(100)]
    assert all(len(s.objects) == 2 and held_out(*s.objects) for s in scenes)


# ---- scenes ----------------------------------------------------------------------------------

def test_the_same_index_gives_the_same_image_whatever_came_before():
    """A training resumed at image n must continue as if it had never stopped."""
    images, captions = EmojiScenes(seed=3).batch(0, 12)
    again, again_captions = EmojiScenes(seed=3).batch(7, 5)
    np.testing.assert_array_equal(images[7:], again)
    assert captions[7:] == again_captions
    assert (EmojiScenes(seed=4).batch(0, 12)[0] != images).any()


def test_two_objects_never_overlap_and_stay_off_the_rim():
    """The judge and the relations rely on separate objects on plain background."""
    for scene in SCENES + VARIED:
        for left, top, right, bottom in boxes(scene):
            assert min(left, top) >= scenes.MARGIN and max(right, bottom) <= 128 - scenes.MARGIN
        if scene.relation:
            a, b = boxes(scene)
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_the_relation_agrees_with_the_centers():
    """Clearly: the distance along its axis is twice the distance across."""
    for scene in (s for s in SCENES + VARIED if s.relation):
        (x1, y1), (x2, y2) = scene.centers
        along, across = {"left of": (x2 - x1, y2 - y1), "right of": (x1 - x2, y2 - y1),
                         "above": (y2 - y1, x2 - x1), "below": (y1 - y2, x2 - x1)}[scene.relation]
        assert along >= 2 * abs(across) and along >= 36


def test_sizes_of_single_objects_leave_gaps_between_the_classes():
    """So that "small" and "large" are never a matter of taste."""
    sizes = {c: [s.sizes[0] for s in VARIED if s.size_class == c] for c in scenes.SIZE_CLASSES}
    assert min(map(len, sizes.values())) > 200
    assert max(sizes["small"]) < min(sizes["medium"]) <= max(sizes["medium"]) < min(sizes["large"])
    assert min(max(sizes[c]) - min(sizes[c]) for c in sizes) >= 6
    for c, size in SIZES.items():
        assert {s.sizes[0] for s in SCENES if s.size_class == c} == {size}


def test_objects_have_one_of_three_sizes_and_edges_on_a_grid():
    """Stage B remembers each object at each size and shift: the fewer, the sharper. Varied scenes have all shifts."""
    assert {size for scene in SCENES for size in scene.sizes} == {*SIZES.values(), PAIR_SIZE} == {40, 56, 80}
    assert GRID == 8 and {edge % 8 for scene in SCENES for box in boxes(scene) for edge in box} == {0}
    assert {edge % 8 for scene in VARIED for box in boxes(scene) for edge in box} == set(range(8))
    for size in SIZES.values():              # several places, and as often on each side of the middle
        centers = np.array([s.centers[0] for s in SCENES if len(s.sizes) == 1 and s.sizes[0] == size])
        assert len(np.unique(centers[:, 0])) >= 3 and np.abs(centers.mean(axis=0) - 64).max() < 1.5


# ---- images --------------------------------------------------------------------------------

def test_the_border_has_exactly_the_background_colour():
    """No frame, no gradient: a wrong background is the model's own mistake."""
    for scene in SCENES[:100]:
        image = render(scene)
        rim = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3),
                              image[:, :2].reshape(-1, 3), image[:, -2:].reshape(-1, 3)])
        assert image.dtype == np.uint8 and (rim == COLOURS[scene.colour]).all()


def test_render_equals_pillows_alpha_compositing():
    """Reference for the 16-bit arithmetic; 1 of 255 is left to the order of rounding."""
    for scene in SCENES[:50]:
        image = Image.new("RGBA", (128, 128), COLOURS[scene.colour])
        for name, k, (left, top, *_) in zip(scene.objects, scene.sizes, boxes(scene)):
            colour, transparency = scenes.sprite(name, k)
            glyph = np.concatenate([colour, 255 - transparency[..., :1]], axis=2)
            straight = Image.frombytes("RGBa", (k, k), glyph.tobytes()).convert("RGBA")
            image.alpha_composite(straight, (left, top))
        reference = np.asarray(image.convert("RGB"), int)
        assert np.abs(render(scene).astype(int) - reference).max() <= 2


# ---- captions --------------------------------------------------------------------------------

def test_captions_describe_the_scene():
    """Read back by an independent grammar: objects, relation in either order, size, colour."""
    rng = np.random.default_rng(0)
    for scene in SCENES:
        text = caption(scene, rng)
        objects, relation, size_word, colour = parse(text)
        assert colour == scene.colour and text == text.lower().strip(".")
        assert size_word in (None, scene.size_class)
        if relation == OPPOSITE.get(scene.relation) and objects != scene.objects:
            objects, relation = objects[::-1], OPPOSITE[relation]
        assert (objects, relation) == (scene.objects, scene.relation)


def test_about_one_caption_in_seven_is_a_variant_and_half_name_the_size():
    """Variants make a model understand other words; too many would blur the plain grammar."""
    rng = np.random.default_rng(0)
    texts = [caption(scene, rng) for scene in SCENES]
    plain = {scenes.plain_caption(objects, s.colour, relation, size)
             for s in SCENES for size in (None, "small", "large")
             for objects, relation in ((s.objects, s.relation),
                                       (s.objects[::-1], OPPOSITE.get(s.relation)))}
    assert 0.12 < np.mean([text not in plain for text in texts]) < 0.18
    named = [parse(t)[2] is not None for t, s in zip(texts, SCENES)
             if s.size_class in ("small", "large")]
    assert 0.4 < np.mean(named) < 0.6


@pytest.mark.parametrize("words, expected", [("octopus", "an octopus"), ("orange", "an orange"),
                                             ("unicorn", "a unicorn"), ("moon", "a moon")])
def test_articles_follow_the_sound(words, expected):
    """CLIP has read English; "a orange background" would be a rare phrase to it."""
    assert scenes.article(words) == expected


def test_scenes_with_uncaptioned_objects_have_no_caption_in_the_mixed_set():
    """Stage C must not learn the names that are kept for fine-tuning, nor miss one of its own."""
    scenes, captions = EmojiScenes("all").scenes(0, 300), EmojiScenes("all").batch(0, 300)[1]
    for scene, text in zip(scenes, captions):
        assert (text == "") == (not set(scene.objects) <= set(CAPTIONED))
    fine_tune = EmojiScenes("uncaptioned")
    assert all(set(s.objects) <= set(UNCAPTIONED) for s in fine_tune.scenes(0, 100))
    assert all(fine_tune.batch(0, 20)[1])


# ---- errors ----------------------------------------------------------------------------------

@pytest.mark.parametrize("make, message", [
    (lambda: Scene(("rokcet",), (40,), ((64, 64),), "red"), "unknown object 'rokcet', expected for example .*rocket"),
    (lambda: Scene(("rocket",), (40,), ((64, 64),), "gren"), "unknown colour 'gren', expected .*green"),
    (lambda: Scene(("rocket", "moon"), (40, 40), ((30, 64), (90, 64)), "red", "left"),
     "unknown relation 'left', expected .*left of"),
    (lambda: EmojiScenes("captions"), "unknown set of objects 'captions', expected .*captioned"),
    (lambda: render(Scene(("rocket",), (60,), ((10, 64),), "red")),
     "'rocket' of 60 px .* extends beyond the 128 px canvas"),
    (lambda: random_scene(np.random.default_rng(0), ["cat"], held_out_pairs=True),
     "no held-out pair among these 1 objects: give more objects"),
])
def test_errors_say_what_was_wrong_and_what_is_near(make, message):
    """In one line, with a remedy."""
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_sprite_sheet_is_written_once(tmp_path, monkeypatch):
    """Trained weights remember the images of the sheet that is kept, so nothing overwrites it, also not by default."""
    from PIL import ImageFont

    from loading.errors import UserError
    from tools import make_sprites
    (tmp_path / "x.ttf").write_bytes(b"no font")
    for out, message in (([], "emoji.png exists already and will not be overwritten"),
                         (["--out", f"{tmp_path}/x.ttf"], "cannot write to .*emoji.png"),
                         (["--out", f"{tmp_path}/new"], "x.ttf cannot be read as the bitmap version of Noto")):
        with pytest.raises(UserError, match=message):
            make_sprites.main(["--font", f"{tmp_path}/x.ttf", *out])
    font = ImageFont.load_default(109)
    monkeypatch.setattr(ImageFont, "truetype", lambda *_: font)
    make_sprites.main(["--font", f"{tmp_path}/x.ttf", "--out", f"{tmp_path}/new"])
    assert Image.open(tmp_path / "new" / "emoji.png").size == (1280, 640)
    with pytest.raises(UserError, match="exists already"):
        make_sprites.main(["--font", f"{tmp_path}/x.ttf", "--out", f"{tmp_path}/new"])
