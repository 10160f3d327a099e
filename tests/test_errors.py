"Precision, recall and agreement: against loops, on masks whose truth is known, and the affinity predictor's limits."
import numpy as np
import pandas as pd, pytest, torch
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.diagnostics.errors import Affinity, agreement, errors, judge, study
from cdfss.engine.evaluate import evaluate
from cdfss.engine.metrics import COUNTS
from cdfss.models.prototype import Prototype
from cdfss.models.segmenter import Match
from episodes import backbone, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def isic(miniature):
    data = open_dataset('isic', miniature)
    return ImageStore(data, 64), draw('balanced', data, 1, episodes=9)

def test_rates_against_a_loop():
    rng = np.random.default_rng(0)
    f = pd.DataFrame(dict(target='isic', shot=1, method='m', cls=np.arange(30) % 3, tp=rng.integers(100, 500, 30), fp=rng.integers(0, 400, 30), fn=rng.integers(0, 400, 30), tn=9000))
    row, by = errors(f).iloc[0], f.groupby('cls')[list(COUNTS)].sum()
    assert np.isclose(row.precision, 100*(by.tp/(by.tp + by.fp)).mean()) and np.isclose(row.recall, 100*(by.tp/(by.tp + by.fn)).mean())
    assert np.isclose(row.area, ((by.tp + by.fp)/(by.tp + by.fn)).mean()) and np.isclose(row.lean, row.recall - row.precision)
    for name in ('precision', 'recall', 'lean', 'area'): assert row[f'{name}_low'] < row[name] < row[f'{name}_high']

@pytest.mark.parametrize('fp,fn,said', [(400, 40, 'aggressive'), (40, 400, 'conservative'), (200, 200, 'not clear')])
def test_reading(fp, fn, said):
    rng = np.random.default_rng(1)
    f = pd.DataFrame(dict(target='t', shot=1, method='m', cls=0, tp=500, fp=fp + rng.integers(-30, 30, 40), fn=fn + rng.integers(-30, 30, 40), tn=9000))
    assert errors(f).reading[0] == said

def test_a_predictor_that_finds_nothing():
    f = pd.DataFrame(dict(target='t', shot=1, method='m', cls=0, tp=0, fp=0, fn=500, tn=9000), index=range(4))
    row = errors(f).iloc[0]
    assert (row.precision, row.recall, row.area) == (0, 0, 0) and np.isfinite(row.drop(['target', 'method', 'reading']).astype(float)).all()

def test_judge_is_evaluate_and_the_pairs_are_sets(isic):
    net = backbone()
    two = {'prototype': Prototype(net), 'affinity': Affinity(net)}
    scored, agreed = judge(two, *isic, batch=4)
    plain = evaluate({'prototype': Prototype(net)}, *isic, epoch=0)
    at = {m: f[list(COUNTS)].to_numpy() for m, f in scored.groupby('method', sort=False)}
    assert (at['prototype'] == plain[list(COUNTS)].to_numpy()).all()
    both, either = at['prototype & affinity'], at['prototype | affinity']
    assert (both[:, :2] <= np.minimum(at['prototype'], at['affinity'])[:, :2]).all()
    assert (both + either == at['prototype'] + at['affinity']).all()                        # of two sets, intersection and union hold as much as the two
    assert np.allclose(agreed.iou, both[:, :2].sum(1)/np.maximum(either[:, :2].sum(1), 1))
    assert np.allclose(agreed.same, 1 - (either - both)[:, :2].sum(1)/at['prototype'].sum(1))

def test_segmenters_of_different_backbones(isic):
    a, b = segmenter('ssp', seed=0), segmenter('ssp', seed=1)
    scored, agreed = judge({'a': a, 'b': b, 'again': a}, *isic)
    same = agreed[agreed.pair == 'a, again']
    assert (same.iou == 1).all() and (same.same == 1).all() and set(agreed.pair) == {'a, b', 'a, again', 'b, again'}
    table = agreement(agreed, draws=50)
    assert list(table.iou[table.pair == 'a, again']) == [100]

def test_affinity_sees_every_shot_and_no_masked_pixel():
    g = torch.Generator().manual_seed(0)
    q, s = torch.randn(2, 8, 5, 5, generator=g), torch.randn(2, 3, 8, 5, 5, generator=g)
    fg = torch.zeros(2, 3, 5, 5); fg[:, :, :2] = 1
    a = Affinity(backbone())
    match = lambda s, fg: Match({'stage3': q}, {'stage3': s}, fg, 1 - fg)
    out = a.compare(match(s, fg))['scores']
    assert torch.allclose(a.compare(match(s[:, [2, 0, 1]], fg))['scores'], out, atol=1e-5)
    poked = s.clone(); poked[:, 1, :, 4] = 7                                                # a background row changes
    assert torch.equal(a.compare(match(poked, fg))['scores'][:, 1], out[:, 1]) and not torch.equal(a.compare(match(poked, fg))['scores'][:, 0], out[:, 0])
    assert a.compare(match(s, 0*fg))['scores'].isfinite().all()                             # a support that shows nothing

def test_study_carries_where_numbers_come_from(isic):
    frames = study(segmenter('ssp+lcm'), None, {'isic': isic}, episodes=6, seed=3, name='mine', draws=50)
    assert set(frames) == {'errors', 'agreement'} and 'mine' in set(frames['errors'].method) and 'prototype & affinity' in set(frames['errors'].method)
    for f in frames.values(): assert (f.episodes == 6).all() and (f.seed == 3).all() and f.manifest.str.len().eq(8).all()
