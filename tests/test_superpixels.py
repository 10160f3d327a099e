"Superpixels: what a map is, what two maps of an image have in common, and what the cache does when it is interrupted or damaged."
import numpy as np
import pytest, torch
from cdfss.basics import InputError
from cdfss.data.images import MAPS, ImageMap, ImageStore, collate
from cdfss.data.layouts import open_dataset
from cdfss.data.superpixels import SCALES, Grid, Slic, compact, make_superpixels
from fakes import polyps

def picture(size=64, seed=0):
    "A noisy picture of four flat quarters."
    g = np.random.default_rng(seed)
    flat = np.zeros((3, size, size))
    for y in (0, 1):
        for x in (0, 1): flat[:, y*size//2:(y + 1)*size//2, x*size//2:(x + 1)*size//2] = g.integers(0, 256, (3, 1, 1))
    return (flat + g.normal(0, 5, flat.shape)).clip(0, 255).astype(np.uint8)

@pytest.mark.parametrize('n', [1, 5, 20])
@pytest.mark.parametrize('kind', [Slic, Grid])
@pytest.mark.parametrize('image', [picture(), np.zeros((3, 64, 64), np.uint8), picture(9)], ids=['picture', 'black', 'tiny'])
def test_labels_are_compact_and_repeatable(kind, n, image):
    labels = kind.make(image, n)
    assert labels.ndim == 2 and set(labels.ravel().tolist()) == set(range(labels.max() + 1)) and labels.max() < max(2*n*n, 4)
    assert np.array_equal(labels, kind.make(image, n))
    if n == 1: assert labels.max() == 0

def test_slic_follows_edges():
    labels = Slic.make(picture(), 4)
    crossing = [len(set(labels[y:y + 32, x:x + 32].ravel().tolist()) & set(np.delete(labels, np.s_[y:y + 32], 0).ravel().tolist())) for y in (0, 32) for x in (0, 32)]
    assert sum(crossing) <= 2                                              # hardly a region lies on both sides

def test_compact(): assert compact(np.array([[7, 3], [9, 3]])).tolist() == [[1, 0], [2, 0]]

@pytest.fixture
def store(tmp_path):
    polyps(tmp_path/'data', 4)
    return lambda: ImageStore(open_dataset('kvasir', tmp_path/'data'), 32, cache=tmp_path/'cache')

def test_maps_are_made_once(store, monkeypatch):
    made = []
    make = Slic.make
    monkeypatch.setattr(Slic, 'make', staticmethod(lambda image, n: made.append(n) or make(image, n)))
    first = store()
    first.ensure(maps=SCALES)
    assert sorted(made) == sorted([5, 10, 15, 20]*4)
    again = store()
    again.ensure(maps=SCALES)
    for name in SCALES:
        for i in range(4): assert torch.equal(first.map(name, i), again.map(name, i)) and again.regions(name, i) == int(again.map(name, i).max()) + 1
    assert len(made) == 16 and first.map('slic-20', 0).dtype == torch.int16

@pytest.mark.parametrize('damage', [lambda b: b[:-4], lambda b: b[:20], lambda b: b'', lambda b: b[:-3] + bytes([b[-3] ^ 255]) + b[-2:]], ids=['cut', 'header', 'empty', 'flipped'])
def test_damaged_map_is_made_again(store, damage):
    s = store()
    want = s.map('slic-5', 1)
    record = s._record('slic-5', s.dataset.items[1].image)
    record.write_bytes(damage(record.read_bytes()))
    assert torch.equal(store().map('slic-5', 1), want)
    assert torch.equal(store().map('slic-5', 1), want) and not store().decoded

def test_interrupted_making_goes_on(store, monkeypatch):
    make, left = Slic.make, [2]
    def stop(image, n):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return make(image, n)
    monkeypatch.setattr(Slic, 'make', staticmethod(stop))
    with pytest.raises(KeyboardInterrupt): store().ensure(maps=['slic-5'])
    left[0] = 4
    store().ensure(maps=['slic-5'])
    assert left[0] >= 2                                                    # what was made before was not made again

def test_settings_are_part_of_the_place(store, monkeypatch):
    s = store()
    old = s._record('slic-5', s.dataset.items[0].image)
    monkeypatch.setattr(Slic, 'settings', 'm1-i1')
    assert s._record('slic-5', s.dataset.items[0].image) != old

def test_a_kind_of_ones_own(store, monkeypatch):
    class Halves(ImageMap):
        "Left and right."
        @staticmethod
        def make(image, n): return (np.arange(8)*n//8)[None].repeat(8, 0)
    monkeypatch.setitem(MAPS, 'halves', Halves)
    s = store()
    batch = collate(s, [(0, (1, 2), 0), (3, (1, 0), 0)], (0,)*3, (1,)*3, extras=('halves-2', 'slic-5'))
    assert batch.extras['halves-2'].shape == (2, 3, 8, 8) and int(batch.extras['halves-2'].max()) == 1
    for i, ids in enumerate(((0, 1, 2), (3, 1, 0))):
        for j, p in enumerate(ids): assert torch.equal(batch.extras['slic-5'][i, j], s.map('slic-5', p))

@pytest.mark.parametrize('name', ['slick-5', 'slic', 'slic-0', 'slic--5', 'slic-x', ''])
def test_unknown_maps_are_refused_before_work(store, name):
    with pytest.raises(InputError, match='image map'): store().ensure(maps=[name])

def test_ahead_of_time(tmp_path):
    polyps(tmp_path/'data', 3)
    assert make_superpixels(tmp_path/'data', 32, ['slic-5'], cache=tmp_path/'cache') == {'kvasir test': 3}
    with pytest.raises(InputError, match='none of the known data sets'): make_superpixels(tmp_path, 32)
