"Granularity: region prototypes and measures against slow loops, limits that are known."
import numpy as np
import pytest, torch
import torch.nn.functional as F
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.diagnostics.granularity import MEASURES, granularity, labels_of, measures, pooled, study
from episodes import segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def isic(miniature):
    data = open_dataset('isic', miniature)
    return ImageStore(data, 64), draw('balanced', data, 5, episodes=4)

def scene(seed=0, c=6, cells=4, size=16, regions=5, void=True):
    g = torch.Generator().manual_seed(seed)
    labels, mask = torch.randint(0, regions, (size, size), generator=g), torch.zeros(size, size, dtype=torch.bool)
    mask[4:13, 2:11] = True
    ignore = torch.zeros_like(mask)
    if void: ignore[:3] = True
    return torch.randn(c, cells, cells, generator=g), labels, mask, ignore

def slow_pooled(features, labels, mask, void):
    size, cells = labels.shape[-1], features.shape[-1]
    big = features.repeat_interleave(size//cells, 1).repeat_interleave(size//cells, 2)
    out = []
    for r in range(int(labels.max()) + 1):
        at = (labels == r) & ~void
        if at.any(): out.append((F.normalize(big[:, at].mean(1), dim=0), int(at.sum()), float((at & mask).sum()/at.sum())))
    return out

def test_pooled_against_a_loop():
    found, want = pooled(*scene()), slow_pooled(*scene())
    assert torch.allclose(found[0], torch.stack([p for p, *_ in want]), atol=1e-6)
    assert found[1].tolist() == [a for _, a, _ in want] and np.allclose(found[2], [s for *_, s in want])

def test_a_region_that_is_all_void_falls_out():
    f, labels, mask, void = scene()
    labels[:2], void[:3] = 9, True
    assert len(pooled(f, labels, mask, void)[0]) == 5

def test_measures_against_pairs_of_regions():
    q, s1, s2 = (pooled(*scene(k, regions=12)) for k in (0, 1, 2))
    def split(one): return [[(p, float(a)) for p, a, share in zip(*one) if (share >= .5) == fg] for fg in (True, False)]
    def mean_cosine(a, b): return sum(float(p @ r)*x*y for p, x in a for r, y in b)/sum(x*y for _, x in a for _, y in b)
    (qf, qb), shots = split(q), [split(s) for s in (s1, s2)]
    m = measures(q, [s1, s2])
    assert np.isclose(m['consistency'], np.mean([mean_cosine(qf, f) for f, _ in shots]), atol=1e-6)
    assert np.isclose(m['distinction'], 1 - np.mean([.5*mean_cosine(qf, b) + .5*mean_cosine(qb, f) for f, b in shots]), atol=1e-6)
    assert np.isclose(m['margin'], m['consistency'] + m['distinction'] - 1)

def test_ceiling_is_the_iou_of_the_majority_mask():
    f, labels, mask, void = scene(regions=12)
    share = torch.tensor([float((mask & (labels == r) & ~void).sum())/max(int(((labels == r) & ~void).sum()), 1) for r in range(12)])
    guess = (share >= .5)[labels] & ~void
    truth = mask & ~void
    want = 100*float((guess & truth).sum()/(guess | truth).sum())
    one = pooled(f, labels, mask, void)
    assert np.isclose(measures(one, [one])['ceiling'], want, atol=1e-4)

def test_a_class_without_a_region_has_no_measure():
    f, labels, mask, void = scene(void=False)
    one = pooled(f, torch.zeros_like(labels), mask, void)                                   # a single region, mostly background
    m = measures(one, [one])
    assert np.isnan(m['consistency']) and np.isnan(m['distinction']) and m['ceiling'] == 0

def test_labels_at_the_stores_size(isic):
    store, _ = isic
    grid, native = labels_of(store, 'grid-8', 0), store.map('slic-10', 0)
    assert grid.shape == (64, 64) and (grid[::8, ::8] == torch.arange(64).view(8, 8)).all()
    assert set(labels_of(store, 'slic-10', 0).unique().tolist()) <= set(native.long().unique().tolist())

def test_scales_kinds_and_shots(isic):
    s = segmenter('ssp')
    t = granularity(s, *isic, scales=(2, 8), draws=50)
    assert list(zip(t.kind, t.scale)) == [('slic', 2), ('slic', 8), ('grid', 2), ('grid', 8), ('cell', 8)]
    cell, grid = (t[(t.kind == k) & (t.scale == 8)][list(MEASURES)].to_numpy() for k in ('cell', 'grid'))
    assert np.allclose(cell, grid, atol=1e-6)                                               # 8 x 8 blocks of 64 px are the cells of an 8 x 8 map
    at = t.set_index(['kind', 'scale'])
    assert at.regions['grid', 8] == 64 and at.ceiling['grid', 8] > at.ceiling['grid', 2] and (t.ceiling_low <= t.ceiling).all()
    assert set(granularity(s, *isic, scales=(4,), kinds=('grid',), stage='stage1', draws=20).stage) == {'stage1'}

def test_study(isic):
    frames = study(segmenter('ssp'), isic, {'b': isic}, episodes=3, scales=(4,), kinds=('grid',), draws=20, seed=1)
    assert len(frames['granularity']) == 4 and (frames['granularity'].episodes == 3).all() and (frames['granularity'].seed == 1).all()
