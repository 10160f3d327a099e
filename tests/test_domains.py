"What the diagnostics share: the walk over episodes, modules for a while, and rates with one resampling for many numbers."
import numpy as np
import pandas as pd, pytest, torch
from cdfss.basics import InputError
from cdfss.data.images import ImageStore, collate
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.diagnostics.domains import class_rate, domains, halves, matches, mean_interval, plugged, resamples, stamp
from cdfss.engine.metrics import bootstrap, fb_iou
from cdfss.methods.seams import Module
from episodes import segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def isic(miniature):
    data = open_dataset('isic', miniature)
    return ImageStore(data, 64), draw('balanced', data, 5, episodes=7)

class Doubled(Module):
    "Changes the images, so that nothing may be shared."
    seams, phases = ('images',), ('test',)
    def images(self, episode):
        episode.query, episode.support = 2*episode.query, 2*episode.support
        return episode

@pytest.mark.parametrize('modules', [[], [Doubled()]])
def test_walk_is_the_plain_way(isic, modules):
    "From stored features or, where a module changes the images, encoded by episode: the match and masks that the whole batch gives."
    s, (store, manifest) = segmenter('ssp'), isic
    with plugged(s, modules), torch.inference_mode():
        found = list(matches(s, store, manifest, batch=3))
        assert [list(at) for at, *_ in found] == [[0, 1, 2], [3, 4, 5], [6]]
        for at, match, target, void in found:
            batch = collate(store, manifest.episodes[at.start:at.stop], s.backbone.mean, s.backbone.std)
            plain = s.match(batch)
            assert torch.equal(target, batch.query_mask) and torch.equal(void, batch.ignore) and torch.equal(match.fg, plain.fg)
            for n in s.needed: assert torch.allclose(match.support[n], plain.support[n], atol=1e-4) and torch.allclose(match.query[n], plain.query[n], atol=1e-4)

def test_plugged_puts_back_what_was_there_also_after_a_fault():
    s = segmenter('ssp+lcm')
    own = s.extras
    with pytest.raises(ZeroDivisionError), plugged(s, []):
        assert not s.acting('scores')
        1/0
    assert s.extras is own and s.acting('scores')

def test_domains_in_order_with_few_episodes(isic):
    store, manifest = isic
    found = domains((store, manifest), {'b': (store, manifest)}, 3)
    assert list(found) == ['isic', 'b'] and all(len(m) == 3 for _, m in found.values())
    with pytest.raises(InputError, match='targets is empty'): domains(None, {}, 3)
    row = stamp(pd.DataFrame({'x': [1.]}), found['b'][1], seed=4).iloc[0]
    assert (row.episodes, row.manifest, row.seed) == (3, found['b'][1].hash[:8], 4) and '3 of 7' in row['rule']

def a_table(n=60, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    truth, cls = rng.integers(50, 900, n), np.arange(n) % classes
    tp, fp = (truth*rng.random(n)).astype(int), rng.integers(0, 400, n)
    return pd.DataFrame(dict(cls=cls, tp=tp, fp=fp, fn=truth - tp, tn=2000 - truth - fp))

def test_class_rate_against_a_loop():
    f, w = a_table(), resamples(np.arange(60) % 4, 5, seed=1)
    found = class_rate(f[['tp', 'fp']].to_numpy(float), f[['fn', 'tn']].to_numpy(float), f.cls.to_numpy(), w)
    for d in range(5):
        for k, (top, bottom) in enumerate((('tp', 'fn'), ('fp', 'tn'))):
            parts = [100*(w[d]*f[top])[f.cls == c].sum()/(w[d]*f[bottom])[f.cls == c].sum() for c in range(4)]
            assert np.isclose(found[d, k], np.mean(parts))

def test_a_class_without_a_bottom_is_left_out():
    top, bottom, cls = np.array([[1.], [5.]]), np.array([[2.], [0.]]), np.array([0, 1])
    assert class_rate(top, bottom, cls, np.ones((1, 2)))[0, 0] == 50
    assert class_rate(top, 0*bottom, cls, np.ones((1, 2)))[0, 0] == 0

def test_resampling_is_the_engines():
    f = a_table()
    cls, tp, union = f.cls.to_numpy(), f[['tp']].to_numpy(float), (f.tp + f.fp + f.fn).to_numpy(float)[:, None]
    drawn = class_rate(tp, union, cls, resamples(cls, 400, seed=3))[:, 0]
    assert np.allclose(np.quantile(drawn, [.025, .975]), bootstrap(f, draws=400, seed=3)[1:])
    assert (resamples(cls, 20) @ (cls == 2) == (cls == 2).sum()).all() and fb_iou(f) > 0

def test_halves_split_every_class_and_differ():
    cls = np.array([0]*7 + [1]*4 + [2])
    h = halves(cls, 200, seed=0)
    for c, sizes in ((0, {3, 4}), (1, {2}), (2, {0, 1})): assert set(h[:, cls == c].sum(1)) == sizes
    assert .4 < h[:, :7].mean() < .6 and len(np.unique(h, axis=0)) > 100 and (halves(cls, 200, seed=0) == h).all()

def test_mean_interval_covers():
    "95 % intervals of 300 made-up samples hold the true mean about 95 times in 100."
    rng = np.random.default_rng(0)
    inside = [low <= 0 <= high for _, low, high in (mean_interval(rng.normal(size=40), 300, seed=k) for k in range(300))]
    assert .9 < np.mean(inside) < .98
    assert all(np.isnan(v) for values in (np.full(3, np.nan), np.zeros(0)) for v in mean_interval(values))
    assert all(v.shape == (2,) and np.isnan(v).all() for v in mean_interval(np.full((3, 2), np.nan)))
