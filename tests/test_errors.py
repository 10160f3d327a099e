"Precision, recall and agreement: against loops, on masks whose truth is known, and the affinity predictor's limits."
import numpy as np
import pandas as pd, pytest, torch
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.basics import InputError
from cdfss.diagnostics.errors import Affinity, agreement, balance, errors, judge, over_seeds, study
from cdfss.engine.evaluate import evaluate
from cdfss.engine.metrics import COUNTS, seed_interval
from cdfss.engine.train import excerpt
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

# ---- the balance of a hybrid -------------------------------------------------------------------------------------------------
def predictor(method, found, more, n=60, seed=0, target='t'):
    rng, size = np.random.default_rng(seed), np.random.default_rng(9).integers(400, 900, n)
    tp, fp = ((share*size + rng.normal(0, 15, n)).clip(0, size).astype(int) for share in (found, more))
    return pd.DataFrame(dict(target=target, shot=1, method=method, index=range(n), cls=np.arange(n) % 3, tp=tp, fp=fp, fn=size - tp, tn=8000))

THREE = dict(hybrid=(.8, .25), prototype=(.6, .1), affinity=(.9, .6))

def test_balance_against_the_leans_themselves():
    f = pd.concat([predictor(m, *how, seed=i) for i, (m, how) in enumerate(THREE.items())])
    table, alone = balance(f.sample(frac=1, random_state=0), 'hybrid', ['prototype', 'affinity'], draws=300).set_index('other'), errors(f, draws=50).set_index('method')
    for m in ('prototype', 'affinity'):
        row = table.loc[m]
        assert np.isclose(row.lean, alone.lean['hybrid']) and np.isclose(row.other_lean, alone.lean[m]) and np.isclose(row.closer, abs(alone.lean[m]) - abs(alone.lean['hybrid']))
        assert np.isclose(row.precision_gain, alone.precision['hybrid'] - alone.precision[m]) and np.isclose(row.recall_gain, alone.recall['hybrid'] - alone.recall[m])
        assert row.closer_low < row.closer < row.closer_high and row.reading == 'better balanced'
    assert set(balance(f, 'affinity', ['hybrid', 'prototype'], 300).reading) >= {'worse balanced'}
    with pytest.raises(InputError, match="unknown method 'hybrd': did you mean 'hybrid'"): balance(f, 'hybrid', ['hybrd'])

def test_balance_is_paired_and_invents_nothing():
    f = predictor('hybrid', .8, .25)
    both = pd.concat([f, f.assign(method='twin')])
    row = balance(both, 'hybrid', ['twin'], draws=200).iloc[0]
    assert (row.closer, row.closer_low, row.closer_high, row.reading) == (0, 0, 0, 'not clear')                    # the same answers: no interval at all

def test_balance_over_seeds():
    tables = [balance(pd.concat([predictor(m, *how, seed=10*s + i) for i, (m, how) in enumerate(THREE.items())]), 'hybrid', ['affinity'], draws=50) for s in range(3)]
    row = over_seeds(tables).iloc[0]
    assert row.seeds == 3 and (row.closer, row.closer_low, row.closer_high) == seed_interval(pd.concat(tables).closer) and row.reading == 'better balanced'
    with pytest.raises(InputError, match='needs at least 2'): over_seeds(tables[:1])

def test_three_predictors_of_a_guided_segmenter(isic):
    "PAHNet's prototype predictor is its own; no pair is made with a run beside it."
    seg = segmenter('pahnet')
    frames = study(seg, None, {'isic': isic}, episodes=4, draws=20)
    by = frames['errors'].set_index('method')
    own, _ = judge({'prototype': seg.predicts, 'segmenter': seg}, isic[0], excerpt(isic[1], 4))
    assert by.loc['prototype', ['precision', 'recall']].tolist() == errors(own, 20).set_index('method').loc['prototype', ['precision', 'recall']].tolist()
    assert frames['balance'].other.tolist() == ['prototype', 'affinity'] and set(frames['balance'].method) == {'segmenter'}
    scored, agreed = judge({'a': seg, 'b': seg.predicts, 'c': seg}, *isic, single=['c'])
    assert set(agreed.pair) == {'a, b'} and set(scored.method) == {'a', 'b', 'c', 'a & b', 'a | b'}

def test_study_carries_where_numbers_come_from(isic):
    frames = study(segmenter('ssp+lcm'), None, {'isic': isic}, episodes=6, seed=3, name='mine', draws=50)
    assert set(frames) == {'errors', 'agreement', 'balance'} and 'mine' in set(frames['errors'].method) and 'prototype & affinity' in set(frames['errors'].method)
    for f in frames.values(): assert (f.episodes == 6).all() and (f.seed == 3).all() and f.manifest.str.len().eq(8).all()
