"One's own images: what is read, what is refused, what comes out, and that nothing is encoded or tuned twice."
import datetime, json, subprocess, sys
import numpy as np, pytest, torch
from PIL import Image
import cdfss
from cdfss.basics import InputError
from cdfss.episode import Episode
from cdfss.data.images import pixels_of, to_input
from cdfss.engine.adapt import AdaptOptions
from cdfss.use.pictures import UNKNOWN, cut_out, pairs_in, read_boxes, read_labels, read_picture
from cdfss.use.results import Result, annotations, from_run_lengths, palette, run_lengths, save_coco
from cdfss.use.folder import FolderOptions, segment_folder
from cdfss.use.segment import FewShot, blend, load, windows

pytestmark = pytest.mark.usefixtures('one_thread')
H, W = 60, 80

def scene(seed, classes=(1,), h=H, w=W, radius=14):
    "A grey picture with a red disc (class 1) and a green one (class 2), and their map."
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:h, :w]
    picture, labels = np.full((h, w, 3), 90.) + rng.normal(0, 6, (h, w, 3)), np.zeros((h, w), np.int64)
    for k in classes:
        cx, cy = (w//4 if k == 1 else 3*w//4) + rng.integers(-4, 5), h//2 + rng.integers(-8, 9)
        disc = np.hypot(y - cy, x - cx) < radius
        labels[disc], picture[disc] = k, picture[disc] + {1: (110, -60, -60), 2: (-60, 110, -60)}[k]
    return picture.clip(0, 255).astype(np.uint8), labels

def iou(a, b): return (a & b).sum()/max((a | b).sum(), 1)
def line(f, *args, **kw):
    with pytest.raises(InputError) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)

SHOWN, ASKED = [scene(i, (1, 2)) for i in range(3)], scene(9, (1, 2))

@pytest.fixture(scope='module')
def seg(): return load('ssp', size=96).fit(*map(list, zip(*SHOWN)))

# ---- what is read -----------------------------------------------------------------------------------------------------------
GREY = np.random.default_rng(0).integers(0, 256, (12, 18), dtype=np.uint8)
RGB = GREY[..., None].repeat(3, 2)
GUISES = dict(array=RGB, grey=GREY, one_channel=GREY[..., None], alpha=np.dstack([RGB, GREY]), floats=RGB/255, float32=(RGB/255).astype(np.float32), deep=GREY.astype(np.uint16)*257, ten_bits=GREY.astype(np.uint16) << 2,
              twelve_bits=GREY.astype(np.int32) << 4, longs=GREY.astype(np.int64), tensor=torch.from_numpy(RGB).permute(2, 0, 1), grey_tensor=torch.from_numpy(GREY), float_tensor=torch.from_numpy(RGB/255.).permute(2, 0, 1),
              pil=Image.fromarray(RGB), pil_grey=Image.fromarray(GREY), pil_deep=Image.fromarray(GREY.astype(np.uint16)*257), pil_alpha=Image.fromarray(np.dstack([RGB, GREY])), pil_la=Image.fromarray(GREY).convert('LA'),
              cmyk=Image.fromarray(255 - np.dstack([RGB, GREY*0 + 255]), 'CMYK'))
@pytest.mark.parametrize('guise', GUISES)
def test_a_picture_in_any_guise(guise): assert np.array_equal(read_picture(GUISES[guise]).pixels, RGB)

FILES = dict(png=Image.fromarray(RGB), tif=Image.fromarray(RGB), bmp=Image.fromarray(RGB), grey=Image.fromarray(GREY), alpha=Image.fromarray(np.dstack([RGB, GREY])), deep=Image.fromarray(GREY.astype(np.uint16)*257),
             deep_tif=Image.fromarray(GREY.astype(np.uint16)*257), ten_bits=Image.fromarray(GREY.astype(np.uint16) << 2), cmyk_tif=Image.fromarray(255 - np.dstack([RGB, GREY*0 + 255]), 'CMYK'), palette=Image.fromarray(GREY).convert('P'))
@pytest.mark.parametrize('name', FILES)
def test_a_file_of_any_kind(tmp_path, name):
    path = tmp_path/f"a.{name if name in ('tif', 'bmp') else 'tif' if name.endswith('tif') else 'png'}"
    FILES[name].save(path)
    for given in (path, str(path)):
        p = read_picture(given)
        assert np.array_equal(p.pixels, RGB) and p.name == 'a' and p.size == (18, 12)

@pytest.mark.parametrize('turn', range(1, 9))
def test_exif_is_honoured_in_picture_and_mask(tmp_path, turn):
    exif = Image.Exif(); exif[0x0112] = turn
    upright, labels = scene(0)
    back = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: lambda a: np.rot90(a, -1)}[turn]
    stored = np.ascontiguousarray(back(upright))
    Image.fromarray(stored).save(tmp_path/'a.png', exif=exif)
    Image.fromarray(np.ascontiguousarray(back(labels)).astype(np.uint8)).save(tmp_path/'m.png', exif=exif)
    p = read_picture(tmp_path/'a.png')
    assert np.array_equal(p.pixels, upright) and np.array_equal(read_labels(tmp_path/'m.png', p.size), labels)
    with Image.open(tmp_path/'a.png') as im: assert np.array_equal(read_picture(im).pixels, upright)
    if turn >= 5: assert 'turned upright by its EXIF' in line(read_labels, back(labels), p.size)

NAN = RGB/255; NAN[3, 4, 1] = np.nan
BAD = {'NaN or infinite at 1 of': NAN, 'floats from 0 to 255, expected 0 to 1': RGB*1., 'floats from -1 to': RGB/127.5 - 1, 'transpose(1, 2, 0)': RGB.transpose(2, 0, 1), 'permute(2, 0, 1)': torch.rand(12, 18, 3),
       'shape (2, 3, 12, 18)': torch.rand(2, 3, 12, 18), 'shape (12, 18, 5)': np.zeros((12, 18, 5), np.uint8), 'type <U1': np.full((12, 18), 'a'), 'type complex128': GREY*1j, 'missing file': 'nowhere.png', 'int, expected a path': 3,
       'without a sign': -RGB.astype(int), 'shape (0, 5)': np.zeros((0, 5)), 'floating-point image': Image.fromarray(GREY*1.5)}
@pytest.mark.parametrize('said', BAD)
def test_what_is_no_picture(said): assert said in line(read_picture, BAD[said])

@pytest.mark.parametrize('content,said', [(b'text', 'not an image file'), (b'', 'not an image file'), (None, 'damaged image')])
def test_files_that_cannot_be_read(tmp_path, content, said):
    path = tmp_path/'a.png'
    Image.fromarray(RGB).save(path)
    path.write_bytes(path.read_bytes()[:80] if content is None else content)
    for read in (read_picture, lambda p: read_labels(p, (18, 12))): assert said in line(read, path) and 'a.png' in line(read, path)
    assert 'a folder' in line(read_picture, tmp_path)

DISC = np.hypot(*np.mgrid[-6:6, -9:9]) < 4
TWO = DISC*(1 + (np.mgrid[:12, :18][1] > 9))
def indexed(values, colours):
    im = Image.fromarray(values.astype(np.uint8), 'P'); im.putpalette(np.asarray(colours, np.uint8).tobytes()); return im
MASKS = dict(bools=DISC, bytes=DISC*np.uint8(255), ones=DISC*1, floats=DISC*1., soft=DISC*.9 + .05, tensor=torch.from_numpy(DISC), deep_tensor=torch.from_numpy(DISC)[None], last=DISC[..., None], bit=Image.fromarray(DISC),
             grey=Image.fromarray(DISC*np.uint8(255)), rgb=Image.fromarray(DISC*np.uint8(255)).convert('RGB'), rgba=Image.fromarray(DISC*np.uint8(255)).convert('RGBA'), index=indexed(DISC, palette()), deep=Image.fromarray(DISC*np.uint16(65535)),
             inverted=indexed(~DISC, [[255]*3, [0]*3]), whole_floats=DISC*7.)
@pytest.mark.parametrize('guise', MASKS)
def test_a_mask_in_any_guise(guise): assert np.array_equal(read_labels(MASKS[guise], (18, 12)) > 0, DISC)

def test_numbers_and_undecided_pixels(tmp_path):
    void = np.where(DISC, TWO, 255)
    for source, ignore, expected in ((TWO, 255, TWO), (indexed(TWO, palette()), 255, TWO), (void, 255, np.where(DISC, TWO, UNKNOWN)), (void, None, void), (TWO, 1, np.where(TWO == 1, UNKNOWN, TWO)), (np.where(TWO == 2, -1, TWO), -1, np.where(TWO == 2, UNKNOWN, TWO))):
        assert np.array_equal(read_labels(source, (18, 12), ignore=ignore), expected)
    assert np.array_equal(read_labels(np.where(DISC, 1, 255), (18, 12)), np.where(DISC, 1, UNKNOWN))                 # strokes on the object alone
    Image.fromarray(DISC*np.uint8(250)).save(tmp_path/'m.jpg')
    assert iou(read_labels(tmp_path/'m.jpg', (18, 12)) == 1, DISC) > .9

BAD_MASKS = {'a mask of 17x12 for a picture of 18x12': DISC[:, :17], 'turned upright by its EXIF': DISC.T, 'different values, expected class numbers': GREY, 'NaN at': np.where(DISC, np.nan, 1), 'class numbers from -2': -TWO, 'class numbers from 0 to 300': DISC*300,
             'shape (12, 18, 3), expected (h, w)': RGB, 'a mask in colours': Image.fromarray(np.dstack([GREY, GREY, 255 - GREY])), 'floats from 0 to 1.5': DISC*1.5, 'type <U1': np.full((12, 18), 'a'), 'list, expected a path': DISC.tolist()}
@pytest.mark.parametrize('said', BAD_MASKS)
def test_what_is_no_mask(said): assert said in line(read_labels, BAD_MASKS[said], (18, 12), 'mask 3') and 'mask 3' in line(read_labels, BAD_MASKS[said], (18, 12), 'mask 3')

NAMES = {1: 'cell', 4: 'root'}
@pytest.mark.parametrize('boxes,classes,expected', [((1, 2, 5, 6), None, [(1, 2, 5, 6, 1)]), ([(1.4, 2, 5, 6, 3)], None, [(1, 2, 5, 6, 3)]), ([(-3, -3, 99, 99, 'root')], NAMES, [(0, 0, 18, 12, 4)]), (np.array([[1, 2, 5, 6], [0, 0, 2, 2]]), None, [(1, 2, 5, 6, 1), (0, 0, 2, 2, 1)])])
def test_boxes(boxes, classes, expected): assert read_boxes(boxes, (18, 12), 'a', classes) == expected

@pytest.mark.parametrize('boxes,said', [([(5, 2, 5, 6)], 'holds no pixel'), ([(1, 6, 5, 2)], 'holds no pixel'), ([(20, 2, 25, 6)], 'holds no pixel'), ([(1, 2, 5)], 'expected (x0, y0, x1, y1)'), ([(1, 2, 5, 6, 'rot')], "did you mean 'root'?"), ([(1, 2, 5, 6, 2)], 'is of class 2, which is not known'),
                                        ([(1, 2, np.inf, 6)], 'expected numbers of pixels'), ([], 'no box')])
def test_bad_boxes(boxes, said): assert said in line(read_boxes, boxes, (18, 12), 'a', NAMES)

def test_pairs_of_a_folder(tmp_path):
    for d, names in (('images', ('a.jpg', 'b.png', 'c.png', '.hidden.png')), ('masks', ('a.png', 'b_mask.png'))):
        (tmp_path/d).mkdir()
        for n in names: Image.fromarray(RGB).save(tmp_path/d/n)
    assert [[p.name for p in ps] for ps in pairs_in(tmp_path/'images', tmp_path/'masks')] == [['a.jpg', 'b.png'], ['a.png', 'b_mask.png']]
    Image.fromarray(RGB).save(tmp_path/'masks'/'z.png')
    assert 'z.png: no picture z.*' in line(pairs_in, tmp_path/'images', tmp_path/'masks') and 'no such folder' in line(pairs_in, tmp_path/'none', tmp_path/'masks')
    (tmp_path/'empty').mkdir()
    assert 'no picture there' in line(pairs_in, tmp_path/'empty', tmp_path/'masks')

# ---- fit and predict --------------------------------------------------------------------------------------------------------
def test_several_classes_are_found_at_native_resolution(seg):
    r = seg.predict(ASKED[0])
    assert r.mask.shape == (H, W) and r.mask.dtype == np.uint8 and r.scores.shape == (2, H, W) == r.probabilities.shape and r.classes == {1: 'class 1', 2: 'class 2'}
    assert min(iou(r.mask == k, ASKED[1] == k) for k in (1, 2)) > .5
    best, sure = r.scores.argmax(0) + 1, r.scores.max(0) > 0
    assert np.array_equal(r.mask, np.where(sure, best, 0))

def plainly(s, shown, asked, cls):
    "The same by an `Episode`, as anything else in the house would ask: score at native size."
    size, net = s.options.size, s.segmenter.backbone
    prepare = lambda p: torch.from_numpy(pixels_of(Image.fromarray(p), size))
    nearest = lambda m: torch.nn.functional.interpolate(torch.from_numpy(m)[None, None].float(), (size, size), mode='nearest')[0, 0] == cls
    x = to_input(torch.stack([prepare(p) for p in (asked, *(i for i, _ in shown))]), net.mean, net.std)
    with torch.inference_mode():
        e = Episode(x[:1], x[None, 1:], torch.stack([nearest(m) for _, m in shown])[None], support_ignore=torch.zeros(1, len(shown), size, size, dtype=torch.bool))
        if names := s.segmenter.extras_needed: e.extras = {n: torch.stack([m[0] for m in maps])[None] for n, maps in ((n, [s._maps_of(torch.from_numpy(pixels_of(Image.fromarray(p), size))[None])[n] for p in (asked, *(i for i, _ in shown))]) for n in names)}
        p = s.segmenter.decide(s.segmenter.match(e), asked.shape[:2])
    return (p.scores[0, 1] - p.scores[0, 0]).numpy(), p.mask[0].numpy()

@pytest.mark.parametrize('recipe', ['prototype', 'ssp+lem+lcm', 'hsl', 'hsnet', 'ssp+hsm'])
@pytest.mark.parametrize('k', [1, 3])
def test_it_is_the_segmenter(recipe, k):
    s = load(recipe, size=64).fit([i for i, _ in SHOWN[:k]], [m for _, m in SHOWN[:k]])
    r = s.predict(ASKED[0])
    answers = [plainly(s, SHOWN[:k], ASKED[0], c) for c in (1, 2)]
    for n, (scores, _) in enumerate(answers): assert np.allclose(r.scores[n], scores, atol=2e-3)
    sure, best = np.stack([m for _, m in answers]), np.stack([np.where(m, v, -np.inf) for v, m in answers])
    assert (r.mask == np.where(sure.any(0), best.argmax(0) + 1, 0)).mean() > .999

def test_a_class_is_what_it_is_without_the_others():
    "Supports that lack a class say nothing about it."
    only, both = [scene(i, (1,)) for i in (20, 21)], SHOWN[:1]
    all_, alone = load('ssp', size=64).fit(*map(list, zip(*only, *both))), load('ssp', size=64).fit(both[0][0], both[0][1])
    assert [t.at for t in all_.tasks] == [[0, 1, 2], [2]]
    assert np.allclose(all_.predict(ASKED[0]).scores[1], alone.predict(ASKED[0]).scores[1], atol=1e-4)

def test_one_picture_or_a_list_and_any_source(tmp_path, seg):
    one, same = load('ssp', size=64).fit(*SHOWN[0]), load('ssp', size=64).fit([Image.fromarray(SHOWN[0][0])], torch.from_numpy(SHOWN[0][1]))
    Image.fromarray(SHOWN[0][0]).save(tmp_path/'a.png'); Image.fromarray(SHOWN[0][1].astype(np.uint8)).save(tmp_path/'m.png')
    files = load('ssp', size=64).fit(tmp_path/'a.png', str(tmp_path/'m.png'))
    scores = [s.predict(ASKED[0]).scores for s in (one, same, files)]
    assert np.array_equal(scores[0], scores[1]) and np.array_equal(scores[0], scores[2])
    two = seg.predict([ASKED[0], SHOWN[0][0]])
    assert np.array_equal(two[0].scores, seg.predict(ASKED[0]).scores) and [r.name for r in two] == ['image 1', 'image 2']

def test_everything_is_encoded_once():
    s = load('hsl', size=64)
    seen = []
    s.segmenter.backbone.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    s.fit(*map(list, zip(*SHOWN)))
    assert sum(seen) == 3 == s.encoded
    s.predict(ASKED[0]), s.predict(ASKED[0])
    assert sum(seen) == 5 == s.encoded                                    # two classes, one pass

def test_boxes_are_cut_down_to_the_object():
    boxes = [[(*(v.min() for v in reversed(np.nonzero(m == 1))), *(v.max() + 1 for v in reversed(np.nonzero(m == 1))))] for _, m in SHOWN]
    images, truth = [i for i, _ in SHOWN], np.stack([m == 1 for _, m in SHOWN])
    whole = np.stack([read_labels(np.zeros((H, W)), (W, H)).astype(bool) for _ in SHOWN])
    for w, [(x0, y0, x1, y1)] in zip(whole, boxes): w[y0:y1, x0:x1] = True
    cut = np.stack([cut_out(i, w) for i, w in zip(images, whole)])
    assert .7 < iou(whole, truth) < .85 and iou(cut, truth) > .95 and not (cut & ~whole).any()
    drawn, refined = (load('ssp', size=96).fit(images, boxes=boxes, cut_boxes=c) for c in (False, True))
    assert (refined.labels == 1).sum() < (drawn.labels == 1).sum() and not ((refined.labels == 1) & (drawn.labels == 0)).any()
    assert iou(refined.predict(ASKED[0]).mask == 1, ASKED[1] == 1) > .5

@pytest.mark.parametrize('pixels', [np.zeros((H, W, 3), np.uint8), np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)], ids=['black', 'noise'])
@pytest.mark.parametrize('box', [np.s_[10:40, 20:50], np.s_[0:H, 0:W], np.s_[5:6, 5:6], np.s_[0:H, 0:70]], ids=str)
def test_a_box_is_never_lost(pixels, box):
    where = np.zeros((H, W), bool); where[box] = True
    kept = cut_out(pixels, where)
    assert kept.shape == where.shape and not (kept & ~where).any() and kept.sum() >= .09*where.sum()

def test_masks_and_boxes_may_be_mixed_and_smaller_boxes_win():
    s = load('ssp', size=64)
    s.fit([SHOWN[0][0], SHOWN[1][0]], [SHOWN[0][1], None], boxes=[None, [(10, 10, 20, 20, 2), (0, 0, 40, 40, 1)]], cut_boxes=False)
    assert (s.labels[1] == 2).any() and [t.at for t in s.tasks] == [[0, 1], [0, 1]]

def test_scribbles_use_only_what_is_marked():
    (picture, labels), other = SHOWN[0], ASKED[0]
    marked = np.full((H, W), 255); marked[::6] = labels[::6]
    s = load('ssp', size=192).fit(picture, marked)
    assert (s.labels == UNKNOWN).float().mean() > .7
    before = s.labels.clone()
    r = s.predict(other)
    assert min(iou(r.mask == k, ASKED[1] == k) for k in (1, 2)) > .6
    m = s.tasks[0].match
    assert not (m['fg'] * m['bg']).any() and torch.equal((m['fg'] + m['bg'])[0, 0] == 0, before[0] == UNKNOWN)

@pytest.mark.parametrize('tile,overlap', [(40, .25), (40, 0), (33, .5), (200, .25)])
def test_windows_cover_and_blend(tile, overlap):
    cover = np.zeros((H, W))
    for r, c in windows(H, W, tile, overlap): cover[r, c] += 1
    assert cover.min() >= 1 and (tile < 200 or len(windows(H, W, tile, overlap)) == 1)
    s, big = load('ssp', size=64, tile=tile, overlap=overlap).fit(*SHOWN[0]), scene(4, (1, 2), 120, 160)
    r = s.predict(big[0])
    assert r.mask.shape == (120, 160) and np.isfinite(r.scores).all()

def test_a_blend_of_equal_windows_is_the_window():
    "Scores of windows that agree are left as they are, whatever the weights."
    s = load('ssp', size=64, tile=30).fit(*SHOWN[0])
    s._window = lambda p: (torch.full((2, *p.shape[:2]), .25), torch.ones(2, *p.shape[:2], dtype=torch.bool))
    r = s.predict(ASKED[0])
    assert np.allclose(r.scores, .25, atol=1e-6) and (r.mask == 1).all() and (blend(7, 9) > 0).all()

def test_tiles_see_small_things():
    "An object of a hundredth of the side is lost in the whole picture, and found in windows."
    big, where = scene(3, (1,), 400, 400, radius=5)
    assert 'too few pixels' in line(load('ssp', size=32).fit, big, np.pad(np.ones((1, 1), int), ((200, 199), (201, 198))))
    s = load('ssp', size=96, tile=64).fit(big, where)
    other, truth = scene(5, (1,), 400, 400, radius=5)
    assert iou(s.predict(other).mask[truth > 0] == 1, np.ones((truth > 0).sum(), bool)) > .5
    assert len(s.labels) == sum((where[r, c] > 0).any() for r, c in windows(400, 400, 64, .25))

# ---- tuning -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('recipe', ['ssp+apm_s', 'hsnet+acpa', 'patnet', 'ifa'])
def test_tuning_is_done_at_fit_once(recipe, tmp_path, monkeypatch):
    import cdfss.use.segment as room
    calls = []
    for name in ('tune', 'tune_together'): monkeypatch.setattr(room, name, lambda *a, f=getattr(room, name): (calls.append(1), f(*a))[1])
    s = load(recipe, size=64, adapt_steps=2).fit(*map(list, zip(*SHOWN[:2])))
    assert len(calls) == (1 if recipe == 'ifa' else 2)
    r = s.predict(ASKED[0])
    s.predict(ASKED[0])
    assert len(calls) == (1 if recipe == 'ifa' else 2)
    untuned = load(recipe, size=64, adapt_steps=0).fit(*map(list, zip(*SHOWN[:2]))).predict(ASKED[0])
    assert not np.array_equal(untuned.scores, r.scores)
    s.save(tmp_path/'s.safetensors')
    again = load(tmp_path/'s.safetensors')
    assert np.array_equal(again.predict(ASKED[0]).scores, r.scores)
    for one in (s, again): assert np.array_equal(one.fit(*map(list, zip(*SHOWN[:2]))).predict(ASKED[0]).scores, r.scores)      # what was learned before is forgotten

# ---- the fitted state in a file ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize('how', [dict(recipe='lcm'), dict(recipe='hsl'), dict(recipe='ssp', tile=40), dict(recipe='ssp', ssp_refine=False)], ids=str)
def test_save_and_load(tmp_path, how):
    s = load(**how, size=64).fit(*map(list, zip(*SHOWN)), classes={1: 'red', 2: 'green'})
    path = s.save(tmp_path/'fitted.safetensors')
    for again in (cdfss.load(path), cdfss.FewShot.load(str(path))):
        a, b = s.predict(ASKED[0]), again.predict(ASKED[0])
        assert np.array_equal(a.scores, b.scores) and np.array_equal(a.mask, b.mask) and a.classes == b.classes == {1: 'red', 2: 'green'}
        assert again.options == s.options and repr(again) == repr(s) and list(again.stages) == list(s.stages)
    again.fit(*SHOWN[0])
    assert again.classes == {1: 'class 1', 2: 'class 2'}

def test_files_that_are_not_ours(tmp_path):
    from safetensors.torch import save_file
    save_file({'a': torch.zeros(1)}, tmp_path/'weights.safetensors'); (tmp_path/'text').write_text('hello')
    assert 'not a file that FewShot.save wrote' in line(load, tmp_path/'weights.safetensors') and 'cannot be read' in line(load, tmp_path/'text') and 'no such file' in line(FewShot.load, tmp_path/'none')
    path = load('ssp', size=64).fit(*SHOWN[0]).save(tmp_path/'s.safetensors')
    path.write_bytes(path.read_bytes()[:2000])
    assert 'cannot be read' in line(load, path)

# ---- refusals of fit and predict --------------------------------------------------------------------------------------------
P, M = SHOWN[0]
REFUSED = {'predict before fit': lambda s: s.predict(P), 'save before fit': lambda s: s.save('x'), 'no foreground': lambda s: s.fit(P, M*0), 'a mask of 79x60': lambda s: s.fit(P, M[:, 1:]), 'neither mask nor box': lambda s: s.fit(P), 'both a mask and boxes': lambda s: s.fit(P, M, boxes=(1, 1, 5, 5)),
           'masks: 1 for 2 images': lambda s: s.fit([P, P], [M]), 'boxes: 3 for 2 images': lambda s: s.fit([P, P], boxes=[(1, 1, 5, 5)]*3), 'holds the number 2, which has no name': lambda s: s.fit(P, M, classes=['a']), 'which is not known': lambda s: s.fit(P, boxes=(1, 1, 5, 5, 3), classes=['a', 'b']),
           'no background beside class 1': lambda s: s.fit(P, M*0 + 1), 'at least one picture': lambda s: s.fit([], []), 'image 2: NaN': lambda s: s.fit([P, np.full((5, 5, 3), np.nan)], [M, M]), 'mask 2: a mask of': lambda s: s.fit([P, P], [M, M.T]),
           "unknown class in a box of image 1: 'tre': did you mean 'tree'": lambda s: s.fit(P, boxes=[(1, 1, 5, 5, 'tre')], classes=['tree', 'sea']), 'no background beside': lambda s: s.fit(P, np.where(M == 1, 1, 255))}
@pytest.mark.parametrize('said', REFUSED)
def test_refusals(said, fresh): assert said in line(REFUSED[said], fresh)

@pytest.fixture(scope='module')
def fresh(): return load('ssp', size=64)

@pytest.mark.parametrize('how,said', [(dict(recipe='lmc'), "did you mean 'lcm'"), (dict(recipe='ssp', ssp_refin=True), "did you mean 'ssp_refine'"), (dict(recipe='ssp', size=3), 'size=3: expected at least 32'), (dict(recipe='ssp', overlap=1.), 'overlap=1.0'), (dict(recipe='ssp', device='cuda:99'), 'device=cuda:99'),
                                      (dict(recipe='ssp', epochs=3), "unknown parameter 'epochs'"), (dict(recipe='ssp', backbone='resnet5'), "unknown backbone 'resnet5'"), (dict(recipe='ssp', checkpoint='none.pt'), 'none.pt: no such file'), (dict(recipe='ssp', checkpoint='x.pt', backbone='resnet18'), 'the checkpoint decides it')])
def test_refusals_of_load(how, said): assert said in line(load, **how)

def test_after_a_refusal_what_was_learned_stays(seg):
    before = seg.predict(ASKED[0]).scores
    line(seg.fit, P, M*0)
    assert np.array_equal(seg.predict(ASKED[0]).scores, before)

# ---- what comes out ---------------------------------------------------------------------------------------------------------
def test_png_holds_numbers_and_colours(seg, tmp_path):
    r = seg.predict(ASKED[0])
    path = r.save(tmp_path/'new'/'mask.png')
    with Image.open(path) as im:
        assert im.mode == 'P' and np.array_equal(np.asarray(im), r.mask) and np.array_equal(np.asarray(im.convert('RGB')), palette()[r.mask])
    assert np.array_equal(read_labels(path, (W, H)), r.mask)                 # and can be a mask again
    assert np.array_equal(np.asarray(Image.open(r.save(tmp_path/'mask.tif'))), r.mask) and 'saved as .png or .tif' in line(r.save, tmp_path/'mask.jpg')
    assert r.overlay().size == (W, H) and np.array_equal(np.asarray(r.overlay())[r.mask == 0], r.pixels[r.mask == 0]) and sum(r.shares.values()) == pytest.approx((r.mask > 0).mean())

@pytest.mark.parametrize('seed', range(6))
def test_run_lengths_are_coco(seed):
    from pycocotools import mask as coco
    rng = np.random.default_rng(seed)
    mask = rng.random((rng.integers(1, 9), rng.integers(1, 9))) < [.5, 0, 1, .2, .9, .5][seed]
    counts = run_lengths(mask)
    theirs = coco.frPyObjects(dict(size=list(mask.shape), counts=counts), *mask.shape)
    assert np.array_equal(coco.decode(theirs), mask) and theirs['counts'] == coco.encode(np.asfortranarray(mask.astype(np.uint8)))['counts'] and np.array_equal(from_run_lengths(counts, mask.shape), mask)

def test_coco_file_reads_back(seg, tmp_path, capsys):
    from pycocotools.coco import COCO
    results = seg.predict([ASKED[0], SHOWN[1][0]])
    api = COCO(str(cdfss.save_coco(results, tmp_path/'all.json')))
    assert [(c['id'], c['name']) for c in api.loadCats(api.getCatIds())] == [(1, 'class 1'), (2, 'class 2')] and len(api.anns) == len(set(api.anns)) == sum(len(annotations(r)) for r in results)
    for n, r in enumerate(results, 1):
        whole = np.zeros_like(r.mask)
        for a in api.loadAnns(api.getAnnIds(imgIds=[n])):
            one = api.annToMask(a) > 0
            (ys, xs), (x0, y0, w, h) = np.nonzero(one), a['bbox']
            assert one.sum() == a['area'] and (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x0 + w, y0 + h) and a['iscrowd'] == 0 and 0 <= a['score'] <= 1
            assert not whole[one].any()
            whole[one] = a['category_id']
        assert np.array_equal(whole, r.mask) and api.imgs[n]['height'] == H and api.imgs[n]['width'] == W
    assert len(json.loads(cdfss.save_coco(results, tmp_path/'large.json', min_area=10**6).read_text())['annotations']) == 0
    other = Result(results[0].mask, results[0].scores, {1: 'x', 2: 'y'}, results[0].pixels)
    assert 'classes' in line(save_coco, [*results, other], tmp_path/'x.json') and 'no results' in line(save_coco, [], tmp_path/'x.json')

def test_geotiff_keeps_its_place(tmp_path, seg):
    rasterio = pytest.importorskip('rasterio')
    transform = rasterio.transform.from_origin(500000, 5200000, 10, 10)
    for n, bands in ((4, np.dstack([ASKED[0], ASKED[0][..., :1]])), (3, ASKED[0]), (1, ASKED[0][..., :1]), (12, ASKED[0].repeat(4, 2)[..., [0, 4, 8, *range(9)]])):
        with rasterio.open(tmp_path/f'in{n}.tif', 'w', driver='GTiff', height=H, width=W, count=n, dtype='uint8', crs='EPSG:32632', transform=transform) as f: f.write(bands.transpose(2, 0, 1))
        r = seg.predict(tmp_path/f'in{n}.tif')
        if n > 1: assert np.array_equal(r.mask, seg.predict(ASKED[0]).mask)
        with rasterio.open(r.save(tmp_path/'out.tif')) as f:
            assert f.crs.to_epsg() == 32632 and f.transform == transform and f.count == 1 and f.dtypes == ('uint8',) and np.array_equal(f.read(1), r.mask) and f.colormap(1)[1][:3] == (128, 0, 0)
    Image.fromarray(ASKED[0]).save(tmp_path/'plain.tif')
    assert read_picture(tmp_path/'plain.tif').geo is None

# ---- the package ------------------------------------------------------------------------------------------------------------
def test_import_stays_quick_and_names_are_there():
    r = subprocess.run([sys.executable, '-c', "import sys, cdfss; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy') or m.startswith('cdfss.')])"], capture_output=True, text=True)
    assert r.stdout.strip() == '[]', r.stderr
    assert cdfss.load is load and cdfss.FewShot is FewShot and cdfss.save_coco is save_coco and not hasattr(cdfss, 'loud')

def test_a_run_folder_is_a_recipe_with_weights(tmp_path):
    from cdfss.basics import write_json
    from cdfss.engine.train import save_weights
    plain = load('lcm', size=64, lcm_beta=.5)
    with torch.no_grad(): plain.segmenter.backbone.stages['stem'].conv1[0].weight.mul_(1.5)                  # not the weights that a recipe starts from
    save_weights(plain.segmenter, tmp_path/'run'/'weights.safetensors')
    write_json(tmp_path/'run'/'weights.json', dict(recipe='ssp+lcm', epoch=1, size=64, options=plain.values, backbone={**plain.segmenter.backbone.options.dict(), 'weights': 'none'}))
    s = cdfss.load(tmp_path/'run')
    assert s.recipe == 'ssp+lcm' and s.options.size == 64 and s.values['lcm_beta'] == .5
    expected = plain.fit(P, M).predict(ASKED[0]).scores
    assert np.allclose(s.fit(P, M).predict(ASKED[0]).scores, expected, atol=1e-5) and not np.allclose(load('lcm', size=64, lcm_beta=.5).fit(P, M).predict(ASKED[0]).scores, expected, atol=1e-2)
    assert load('ssp+lem', checkpoint=tmp_path/'run').recipe == 'ssp+lem' and 'own weights' in line(cdfss.load, tmp_path/'run', checkpoint='x')

# ---- a folder, and the board ------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    for d in ('images', 'masks', 'queries'): (tmp_path/d).mkdir()
    for i, (picture, labels) in enumerate((*SHOWN, ASKED)):
        Image.fromarray(picture).save(tmp_path/'images'/f'{i}.png')
        if i < 2: Image.fromarray(labels.astype(np.uint8)).save(tmp_path/'masks'/f'{i}.png')
    Image.fromarray(ASKED[0]).save(tmp_path/'queries'/'q.png')
    return tmp_path

def options(folder, **more): return FolderOptions(**dict(images=str(folder/'images'), masks=str(folder/'masks'), recipe='ssp', size=64, out=str(folder/'out')) | more)

def test_a_folder(folder):
    results = segment_folder(options(folder, classes='red,green'))
    assert [r.name for r in results] == ['2.png', '3.png'] and results[0].classes == {1: 'red', 2: 'green'}
    expected = load('ssp', size=64).fit(*map(list, zip(*SHOWN[:2]))).predict(ASKED[0])
    assert np.array_equal(results[1].mask, expected.mask) and np.array_equal(np.asarray(Image.open(folder/'out'/'3.png')), expected.mask)
    coco = json.loads((folder/'out'/'annotations.json').read_text())
    assert [i['file_name'] for i in coco['images']] == ['2.png', '3.png'] and {c['name'] for c in coco['categories']} == {'red', 'green'}
    again = segment_folder(FolderOptions(fitted=str(folder/'out'/'fitted.safetensors'), queries=str(folder/'queries'), out=str(folder/'later')))
    assert np.array_equal(again[0].mask, expected.mask) and (folder/'later'/'q.png').exists()

def test_a_folder_with_boxes(folder):
    (folder/'boxes.json').write_text(json.dumps({'0.png': [[6, 16, 34, 44], [46, 16, 74, 44, 2]], '1.png': [[6, 16, 34, 44]]}))
    results = segment_folder(options(folder, masks=None, boxes=str(folder/'boxes.json'), queries=str(folder/'queries')))
    assert len(results) == 1 and set(results[0].classes) == {1, 2}

@pytest.mark.parametrize('more,said', [(dict(images='nowhere'), 'images=nowhere: no such folder'), (dict(masks=None), 'give masks= or boxes='), (dict(boxes='b.json'), 'not both'), (dict(masks=None, boxes='b.json'), 'b.json: cannot be read'), (dict(images=None), 'want the folder of their pictures'),
                                       (dict(fitted='x'), 'queries=None'), (dict(recipe='lmc'), "did you mean 'lcm'"), (dict(classes='red'), 'holds the number 2, which has no name')])
def test_a_folder_that_does_not_go_together(folder, more, said): assert said in line(segment_folder, options(folder, **more))

def test_the_notebook_offers_the_options(repo):
    from cdfss.engine.runs import parameters_cell
    [cell] = [c for c in json.loads((repo/'nbs'/'segment.ipynb').read_text())['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    assert ''.join(cell['source']) == parameters_cell(FolderOptions)

THEN = datetime.datetime(2026, 1, 1)
STROKE = lambda tool, cls, *points, width=5: dict(tool=tool, cls=cls, width=width, points=[list(p) for p in points])
@pytest.mark.parametrize('strokes,values', [([STROKE('line', 1, (20, 30), (22, 32))], {1, 255}), ([STROKE('line', 1, (20, 30)), STROKE('line', 0, (2, 2), (70, 2))], {0, 1, 255}), ([STROKE('area', 2, (10, 10), (40, 10), (40, 40)), STROKE('line', 1, (60, 50))], {0, 1, 2}), ([STROKE('box', 1, (1, 2), (9, 9))], None), ([], None)])
def test_strokes(strokes, values):
    from cdfss.annotate import strokes_to_boxes, strokes_to_mask
    mask = strokes_to_mask(strokes, (W, H))
    assert (mask is None) == (values is None) and (mask is None or set(np.unique(mask)) == values and mask.shape == (H, W))
    assert strokes_to_boxes(strokes) == ([(1, 2, 9, 9, 1)] if strokes and strokes[0]['tool'] == 'box' else None)

def test_the_board(folder):
    from cdfss.annotate import Board
    b = Board(options(folder))
    b.keep.click(); assert 'nothing is segmented yet' in b.note.value
    b.go.click(); assert 'nothing is drawn yet' in b.note.value
    b.upload.value = [dict(name='bad.png', type='image/png', size=4, content=memoryview(b'text'), last_modified=THEN)]
    assert 'bad.png: not a picture' in b.note.value and len(b.pictures) == 4
    b.upload.value = [dict(name='up.png', type='image/png', size=4, content=memoryview((folder/'queries'/'q.png').read_bytes()), last_modified=THEN)]
    assert list(b.pictures)[-1] == 'up.png' and b.which.value == '0.png'
    cx, cy = np.argwhere(SHOWN[0][1] == 1).mean(0)[::-1]
    b.sent.value = json.dumps([STROKE('line', 1, (cx - 5, cy), (cx + 5, cy)), STROKE('line', 0, (40, 4), (40, 56))])
    b.which.value = '1.png'
    assert b.sent.value == '' and 'data-strokes="[]"' in b.canvas.value
    b.sent.value = json.dumps([STROKE('box', 1, (6, 16), (34, 44))])
    b.go.click()
    assert 'on 2 drawn pictures' in b.note.value and [r.name for r in b.results] == ['0.png', '1.png', '2.png', '3.png', 'up.png'] and np.array_equal(b.results[3].mask, b.results[4].mask)
    b.keep.click()
    assert sorted(p.name for p in (folder/'out').iterdir()) == ['0.png', '1.png', '2.png', '3.png', 'annotations.json', 'fitted.safetensors', 'up.png']
    b.which.value = '0.png'; b.clear.click(); b.which.value = '1.png'; b.clear.click(); b.go.click()
    assert 'nothing is drawn yet' in b.note.value

# ---- the trial on real pictures ---------------------------------------------------------------------------------------------
def test_the_trial_counts_what_predict_says(folder):
    from cdfss.use.trial import Example, summary, trial
    for i, (picture, labels) in enumerate((*SHOWN, ASKED)): Image.fromarray((labels == 1)*np.uint8(255)).save(folder/'masks'/f'{i}.png')
    pool = [Example(f'{i}', folder/'images'/f'{i}.png', folder/'masks'/f'{i}.png', 0, f'{i}') for i in range(4)]
    segs = {r: load(r, size=64) for r in ('ssp', 'ssp+lcm')}
    rows = trial(segs, pool, shots=(2,), kinds=('mask', 'scribble'), draws=2, queries=1)
    assert len(rows) == 2*2*2 and sum(s.encoded for s in segs.values()) <= 4                              # each picture once, for both recipes
    row = rows[(rows.masks == 'mask') & (rows['shot'] == 2) & (rows.recipe == 'ssp')].iloc[0]
    shown, asked = [int(i) for i in row.supports.split(';')], int(row['query'])
    every = [*SHOWN, ASKED]
    r = load('ssp', size=64).fit([every[i][0] for i in shown], [(every[i][1] == 1)*1 for i in shown]).predict(every[asked][0])
    truth = every[asked][1] == 1
    assert [row.tp, row.fp, row.fn, row.tn] == [((r.mask > 0) & truth).sum(), ((r.mask > 0) & ~truth).sum(), (~(r.mask > 0) & truth).sum(), (~(r.mask > 0) & ~truth).sum()]
    table = summary(rows)
    assert len(table) == 2*2 and set(table.draws) == {2} and table[table.masks == 'scribble'].marked.max() < .5 < table[table.masks == 'mask'].marked.min()

@pytest.mark.real
def test_the_trial_reads_the_real_domains(real_data):
    from cdfss.use.trial import DOMAINS, examples
    sizes = {name: len(examples(d, real_data)[0]) for name, d in DOMAINS.items()}
    assert sizes == dict(lesions=600, lungs=120, polyps=5, cells=80, cracks=118, cars=40)
