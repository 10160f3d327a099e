import multiprocessing as mp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from cdfss.basics import InputError
from cdfss.data import images as images_module
from cdfss.data.images import ImageStore, collate, decode_image, decode_mask, fitted, to_input
from cdfss.data.layouts import open_dataset
from fakes import blob, label, picture, polyps, voc

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CDFSS_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

def plain_image(path, s): return torch.from_numpy(np.array(Image.open(path).convert('RGB').resize((s, s), Image.BILINEAR))).permute(2, 0, 1)
def plain_mask(path, s, index=False):
    "As HSNet: threshold at native size, then F.interpolate of floats."
    m = torch.from_numpy(np.array(Image.open(path) if index else Image.open(path).convert('L')))
    if not index: m = (m >= 128)
    return F.interpolate(m[None, None].float(), s, mode='nearest')[0, 0]

# ---- the same pixels as the plain way ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('size', [16, 33, 64])
def test_store_equals_plain_reading(tmp_path, size):
    d = open_dataset('kvasir', polyps(tmp_path, 4, size=(57, 41)))
    store = ImageStore(d, size)
    for again in range(2):                                                # decoded, then read from the cache
        for i, it in enumerate(d.items):
            assert torch.equal(store.image(i), plain_image(it.image, size))
            fg, ignore = store.mask(i)
            assert torch.equal(fg, plain_mask(it.mask, size) == 1) and not ignore.any()
        store = ImageStore(d, size)

def test_index_masks_keep_void(tmp_path):
    d = open_dataset('voc', voc(tmp_path, {'a': [1, 7], 'b': [7]}))
    store = ImageStore(d, 24)
    assert store.ensure() == [] and len(store.decoded) == 4               # two pictures, two maps, three pairs
    for i, it in enumerate(d.items):
        values = plain_mask(it.mask, 24, index=True)
        fg, ignore = store.mask(i)
        assert torch.equal(fg, values == it.cls + 1) and torch.equal(ignore, values == 255) and ignore.any() and fg.any()
    assert store.key(0) == store.key(1) != store.key(2)

@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), s=st.integers(1, 90), seed=st.integers(0, 9))
def test_nearest_is_the_floor_rule_of_torch(tmp_path_factory, h, w, s, seed):
    path = tmp_path_factory.getbasetemp()/'m.png'
    values = np.random.default_rng(seed).integers(0, 256, (h, w), dtype=np.uint8)
    Image.fromarray(values).save(path)
    for index in (False, True):
        got = torch.from_numpy(decode_mask(path, s, index)[1]).float()
        assert torch.equal(got, plain_mask(path, s, index))

# ---- images with their aspect, and masks at their own size -------------------------------------------------------------------
@pytest.mark.parametrize('h,w,size,want', [(375, 500, 473, (352, 472)), (500, 333, 473, (472, 312)), (500, 500, 473, (472, 472)), (96, 96, 96, (96, 96)), (10, 400, 64, (8, 64))])
def test_sides_of_a_padded_image(tmp_path, h, w, size, want):
    assert fitted(h, w, size, True) == want and fitted(h, w, size, False) == (size, size)
    Image.fromarray(np.full((h, w, 3), 200, np.uint8)).save(tmp_path/'i.png')
    image = decode_image(tmp_path/'i.png', size, pad=True)[1]
    assert (image[:, :want[0], :want[1]] == 200).all() and image.sum() == 3*200*want[0]*want[1]           # the rest is black

@pytest.mark.parametrize('index', [False, True])
def test_padded_masks_and_native_masks(tmp_path, index):
    d = open_dataset('voc', voc(tmp_path, {'a': [1, 2], 'b': [1]}, val=[])) if index else open_dataset('kvasir', polyps(tmp_path, 2))
    store, plain = ImageStore(d, 24, pad=True), ImageStore(d, 24)
    assert store.ensure() == [] and store.key(0) != plain.key(0)
    for i, it in enumerate(d.items):
        inside = np.s_[:16, :24]                                                                          # 30 x 40, so 18 rows, rounded down
        (fg, void), values = store.mask(i), plain_mask(it.mask, (16, 24), index)
        assert torch.equal(fg[inside], values == (it.cls + 1 if index else 1)) and torch.equal(void[inside], values == 255)
        assert void[16:].all() and not fg[16:].any()
        native = np.asarray(Image.open(it.mask))
        fg, void = store.native(i)
        assert np.array_equal(fg, native == it.cls + 1 if index else native >= 128) and np.array_equal(void, native == 255) == index
        assert all(torch.equal(a, b) for a, b in zip(plain.native(i), (fg, void)))                        # one record for all sizes
    record = store._record(f'native {store._mask_kind}', d.items[0].mask)
    record.write_bytes(record.read_bytes()[:-1])
    assert torch.equal(store.native(0)[0], ImageStore(d, 8).native(0)[0])                                 # a torn record is made again

@pytest.mark.parametrize('value,kept', [(127, 0), (128, 1)])
def test_threshold_at_128(tmp_path, value, kept):
    blob(tmp_path/'m.png', on=value)
    meta, small = decode_mask(tmp_path/'m.png', 16, False)
    assert small.max() == kept and meta['top'] == value

# ---- unusual kinds of files -------------------------------------------------------------------------------------------------
RAMP = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1))

@pytest.mark.parametrize('name,im', [
    ('grey.png', Image.fromarray(RAMP)), ('la.png', Image.merge('LA', [Image.fromarray(RAMP)]*2)),
    ('rgba.png', Image.merge('RGBA', [Image.fromarray(RAMP)]*4)), ('palette.png', Image.merge('RGB', [Image.fromarray(RAMP)]*3).quantize(64)),
    ('deep.png', Image.fromarray(RAMP.astype(np.uint16)*257)), ('deep.tif', Image.fromarray(RAMP.astype(np.int32)*257)),
    ('shallow.tif', Image.fromarray(RAMP.astype(np.int32))), ('cmyk.tif', Image.merge('RGB', [Image.fromarray(RAMP)]*3).convert('CMYK'))])
def test_kinds_become_rgb(tmp_path, name, im):
    im.save(tmp_path/name)
    got = decode_image(tmp_path/name, 50)[1]
    assert got.shape == (3, 50, 50) and np.abs(got.astype(int) - RAMP).max() <= 1

def test_one_bit_and_deep_masks(tmp_path):
    fg = np.zeros((20, 20), bool); fg[5:9] = True
    for name, im in {'bit.png': Image.fromarray(fg), 'deep.png': Image.fromarray(fg.astype(np.uint16)*65535),
                     'rgb.png': Image.fromarray(np.stack([fg*255]*3, -1).astype(np.uint8))}.items():
        im.save(tmp_path/name)
        assert (decode_mask(tmp_path/name, 20, False)[1] == fg).all(), name

def test_rotation_tag_is_honoured(tmp_path):
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = im.getexif(); exif[0x0112] = 6
    im.save(tmp_path/'r.png', exif=exif)
    meta, got = decode_image(tmp_path/'r.png', 20)
    want = np.asarray(im.transpose(Image.Transpose.ROTATE_270).resize((20, 20), Image.BILINEAR)).transpose(2, 0, 1)
    assert meta['native'] == [30, 20] and (got == want).all()

def test_float_image_is_refused(tmp_path):
    Image.fromarray(np.zeros((5, 5), np.float32)).save(tmp_path/'f.tif')
    with pytest.raises(InputError, match='f.tif: floating-point'): decode_image(tmp_path/'f.tif', 4)

# ---- faults -----------------------------------------------------------------------------------------------------------------
def spoil_truncated(im, mask): im.write_bytes(im.read_bytes()[:-200])
def spoil_text(im, mask): im.write_text('<html>')
def spoil_void(im, mask): im.write_bytes(b'')
def spoil_mask_size(im, mask): blob(mask, size=(30, 40))
def spoil_lost_mask(im, mask): mask.unlink()
def spoil_lost_image(im, mask): im.unlink()
def spoil_folder(im, mask): im.unlink(); im.mkdir()
def spoil_empty(im, mask): blob(mask, on=0)
def spoil_zero_one(im, mask): blob(mask, on=1)
def spoil_mask_text(im, mask): mask.write_text('x')

FAULTS = {spoil_truncated: '2.jpg: damaged image', spoil_text: '2.jpg: not an image', spoil_void: '2.jpg: not an image',
          spoil_mask_size: '2.png: mask of 30x40 for an image of 40x30', spoil_lost_mask: '2.png: cannot be read', spoil_lost_image: '2.jpg: cannot be read',
          spoil_folder: '2.jpg: cannot be read', spoil_empty: '2.png: empty mask: the largest value is 0',
          spoil_zero_one: '2.png: empty mask: the largest value is 1', spoil_mask_text: '2.png: not an image'}

@pytest.mark.parametrize('spoil', FAULTS, ids=lambda f: f.__name__)
def test_each_fault_is_named_and_skipped(tmp_path, spoil):
    d = open_dataset('kvasir', polyps(tmp_path))
    spoil(d.items[2].image, d.items[2].mask)
    with pytest.raises(InputError, match=FAULTS[spoil]) as e: ImageStore(d, 16).ensure()
    assert '\n' not in str(e.value) and "on_error='skip'" in str(e.value)
    for attempt in range(2):                                              # a fault stays a fault when all else is cached
        store = ImageStore(d, 16, on_error='skip')
        problems = store.ensure()
        assert len(problems) == 1 and FAULTS[spoil] in problems[0] and store.bad == {2}
    assert ImageStore(d.without(store.bad), 16).ensure() == []
    assert ImageStore(d, 16).ensure([0, 1, 3]) == []                      # other positions are not touched by it

def test_first_fault_and_count(tmp_path):
    d = open_dataset('kvasir', polyps(tmp_path))
    for i in (1, 4): d.items[i].image.write_text('x')
    with pytest.raises(InputError, match=r'1.jpg: not an image.*2 such faults'): ImageStore(d, 16).ensure()

def test_index_faults(tmp_path):
    d = open_dataset('voc', voc(tmp_path, {'a': [1, 7], 'b': [7]}))
    label(d.items[2].mask, [3])
    assert 'no pixel of class' in ImageStore(d, 16, on_error='skip').ensure()[0]
    d.hashes.clear(); label(d.items[2].mask, [7, 99])
    assert 'value 99 is no class' in ImageStore(d, 16, on_error='skip').ensure()[0]
    d.hashes.clear(); Image.new('RGB', (40, 30)).save(d.items[2].mask)
    assert 'mode RGB' in ImageStore(d, 16, on_error='skip').ensure()[0]

def test_bad_arguments(tmp_path):
    d = open_dataset('kvasir', polyps(tmp_path))
    for kw, match in ((dict(size=0), 'size=0'), (dict(size=8, workers=-1), 'workers=-1'), (dict(size=8, on_error='halt'), 'on_error')):
        with pytest.raises(InputError, match=match): ImageStore(d, **kw)

# ---- the cache --------------------------------------------------------------------------------------------------------------
def test_decoded_once_ever(tmp_path, cache, monkeypatch):
    d = open_dataset('kvasir', polyps(tmp_path/'a'))
    seen = []
    store = ImageStore(d, 16)
    store.ensure(progress=lambda n, total: seen.append((n, total)))
    assert sorted(store.decoded) == sorted(p for it in d.items for p in (it.image, it.mask)) and seen[-1] == (12, 12)
    def never(*a): raise AssertionError('decoded again')
    monkeypatch.setattr(images_module, '_open', never)
    (tmp_path/'a').rename(tmp_path/'b')                                   # moving the data does not matter
    moved = ImageStore(open_dataset('kvasir', tmp_path/'b'), 16)
    moved.ensure(); moved.image(0); moved.mask(0)
    assert moved.decoded == [] and moved.key(3) == store.key(3)
    assert not list(cache.rglob('*.part'))
    with pytest.raises(AssertionError): ImageStore(d.without([]), 17).ensure()            # another size is another decode

def test_changed_file_is_decoded_anew(tmp_path):
    d = open_dataset('kvasir', polyps(tmp_path))
    ImageStore(d, 16).ensure()
    picture(d.items[0].image, 77)
    fresh = open_dataset('kvasir', tmp_path)
    store = ImageStore(fresh, 16)
    store.ensure()
    assert store.decoded == [fresh.items[0].image] and torch.equal(store.image(0), plain_image(fresh.items[0].image, 16))

def flip(b): b[-7] ^= 255; return b
@pytest.mark.parametrize('harm', [flip, lambda b: b[:-3], lambda b: b[:5], lambda b: b'', lambda b: b + b'x', lambda b: bytes(len(b))],
                         ids=['flipped', 'short', 'stub', 'empty', 'long', 'zeros'])
@pytest.mark.parametrize('kind', ['image', 'binary'])
@pytest.mark.parametrize('ensure', [True, False])
def test_damaged_record_is_made_again(tmp_path, cache, harm, kind, ensure):
    d = open_dataset('kvasir', polyps(tmp_path, 2))
    ImageStore(d, 16).ensure()
    for record in [p for p in (cache/'decoded'/'16'/kind).rglob('*') if p.is_file()]: record.write_bytes(harm(bytearray(record.read_bytes())))
    store = ImageStore(d, 16)
    if ensure: store.ensure()
    for i, it in enumerate(d.items):
        assert torch.equal(store.image(i), plain_image(it.image, 16)) and torch.equal(store.mask(i)[0], plain_mask(it.mask, 16) == 1)
    assert len(store.decoded) == 2
    again = ImageStore(d, 16)
    again.ensure(), again.image(0), again.mask(0)
    assert again.decoded == []

def test_cache_that_cannot_be_written(tmp_path, cache):
    d = open_dataset('kvasir', polyps(tmp_path))
    cache.write_text('a file in the way')
    with pytest.raises(InputError, match='CDFSS_CACHE'): ImageStore(d, 16, on_error='skip').ensure()

def _fill(root): ImageStore(open_dataset('kvasir', root), 32).ensure()
def test_two_processes_at_once(tmp_path):
    root = str(polyps(tmp_path, 12))
    ctx = mp.get_context('fork')
    jobs = [ctx.Process(target=_fill, args=(root,)) for _ in range(3)]
    for j in jobs: j.start()
    for j in jobs: j.join(60); assert j.exitcode == 0
    d = open_dataset('kvasir', root)
    store = ImageStore(d, 32)
    store.ensure()
    assert store.decoded == [] and all(torch.equal(store.image(i), plain_image(it.image, 32)) for i, it in enumerate(d.items))

# ---- batches ----------------------------------------------------------------------------------------------------------------
def test_to_input(tmp_path):
    u8 = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    want = (u8.double()/255 - torch.tensor(MEAN).double().view(3, 1, 1))/torch.tensor(STD).double().view(3, 1, 1)
    assert torch.allclose(to_input(u8, MEAN, STD).double(), want, atol=1e-6) and u8.dtype == torch.uint8

def test_collate(tmp_path):
    d = open_dataset('voc', voc(tmp_path, {'a': [1, 7], 'b': [7], 'c': [7, 1]}))
    store = ImageStore(d, 16)
    e = collate(store, [(1, (2, 4), 6), (4, (2, 1), 6)], MEAN, STD)
    assert e.query.shape == (2, 3, 16, 16) and e.support.shape == (2, 2, 3, 16, 16) and e.shots == 2 and e.cls.tolist() == [6, 6]
    assert e.ids[0] == tuple(f'VOC2012/JPEGImages/{i}.jpg' for i in 'abc')
    assert torch.equal(e.query[1], to_input(store.image(4)[None], MEAN, STD)[0]) and torch.equal(e.support_masks[0, 1], store.mask(4)[0])
    assert torch.equal(e.ignore[0], store.mask(1)[1]) and torch.equal(e.support_ignore[1, 0], store.mask(2)[1]) and e.ignore.any()
    flat = collate(store, [(1, (2, 4), 6)], MEAN, STD, border='background')
    assert flat.ignore is None and flat.support_ignore is None and torch.equal(flat.query_mask, e.query_mask[:1]) and not (flat.query_mask & e.ignore[:1]).any()

def test_collate_refuses(tmp_path):
    d = open_dataset('voc', voc(tmp_path, {'a': [1, 7], 'b': [7], 'c': [7, 1]}))
    store = ImageStore(d, 16)
    for eps, match in (([], '0 given'), ([(1, (2,), 6), (2, (1, 4), 6)], 'equal shots'), ([(1, (1,), 6)], 'its own supports'), ([(1, (3,), 6)], 'mixes classes')):
        with pytest.raises(InputError, match=match): collate(store, eps, MEAN, STD)
    with pytest.raises(InputError, match="border"): collate(store, [(1, (2,), 6)], MEAN, STD, border='void')

# ---- real images ------------------------------------------------------------------------------------------------------------
@pytest.mark.real
@pytest.mark.parametrize('name', ['chest', 'davis', 'nuclei', 'cracks', 'kvasir', 'voc', 'isic'])
def test_real_images_equal_plain_reading(real_data, name):
    d = open_dataset(name, real_data)
    some = list(range(0, len(d), max(1, len(d)//8)))
    store = ImageStore(d, 48, on_error='skip')
    assert store.ensure(some) == []
    for i in some:
        it = d.items[i]
        assert torch.equal(store.image(i), plain_image(it.image, 48))
        want = plain_mask(it.mask, 48, d.index_masks)
        assert torch.equal(store.mask(i)[0], want == (it.cls + 1 if d.index_masks else 1))
