"LCM's sensitivity: every setting of the sweep is the module, scores against loops, and luck is not counted as gain."
import numpy as np
import pytest, torch
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.diagnostics.calibration import chosen, corrections, effects, sensitivity, settings, study, sweep
from cdfss.engine.evaluate import evaluate
from cdfss.methods.loec import LCM, LCMOptions
from cdfss.methods.seams import build
from cdfss.models.segmenter import Match
from episodes import backbone, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def isic(miniature):
    data = open_dataset('isic', miniature)
    return ImageStore(data, 64), draw('balanced', data, 1, episodes=8)

@pytest.mark.parametrize('patch', [1, 2, 3])
@pytest.mark.parametrize('rule', ['fixed', 'mean'])
def test_the_decision_is_the_modules(patch, rule):
    "In float64: score differences after LCM and upsampling, by the module and by running sums."
    g = torch.Generator().manual_seed(patch)
    coarse, low = torch.randn(2, 2, 7, 8, generator=g).double(), torch.rand(2, 5, 14, 16, generator=g).double()
    s, size = segmenter('ssp'), (56, 64)
    nothing = torch.zeros(2, 1, *size)
    sums, means = corrections(s, coarse, low, 5, patch, size)
    margin = s.upsample(coarse, size); margin = margin[:, 1] - margin[:, 0]
    for k in (1, 3, 5):
        o = LCMOptions(k=k, w=.6, beta=.7, patch=patch, beta_rule=rule)
        out = s.upsample(LCM(o).scores(coarse, Match({'stem': low}, {}, nothing, nothing)), size)
        limit = .6*k*.7 if rule == 'fixed' else .6*means[:, k - 1][:, None, None]
        assert torch.allclose(out[:, 1] - out[:, 0], margin + .6*sums[:, k - 1] - limit, atol=1e-10)

def test_sweep_is_evaluate(isic):
    table = settings((1, 4, 500), (.3, 1.5), (.6, .95), (1, 3))                            # 500: more anchors than patches
    s = segmenter('ssp+lcm')                                                               # its own LCM is left out
    tp, union, cls = sweep(s, *isic, table, batch=3)
    plain = evaluate({'m': segmenter('ssp')}, *isic, epoch=0)
    assert (plain.tp == tp[0]).all() and (plain.tp + plain.fp + plain.fn == union[0]).all() and (cls == plain.cls).all() and len(s.extras) == 1
    for i in range(0, len(table), 5):
        o = table.iloc[i]
        options = dict(lcm_k=int(o.k), lcm_w=float(o.w), lcm_patch=int(o.patch), lcm_beta_rule=o.beta_rule) | ({} if o.beta_rule == 'mean' else dict(lcm_beta=float(o.beta)))
        real = evaluate({'m': build('ssp+lcm', s.backbone, options)}, *isic, epoch=0)
        assert abs(real.tp - tp[1 + i]).max() <= 1 and abs(real.tp + real.fp + real.fn - union[1 + i]).max() <= 1, o.to_dict()      # a pixel at the threshold

def test_grid():
    t = settings((1, 3), (.6,), (.5, .7), (1, 2))
    assert len(t) == 2*1*3*2 and t[t.beta_rule == 'mean'].beta.isna().all() and len(settings((1,), (.6,), (.7,), (1,), mean=False)) == 1

def test_sensitivity_against_evaluation(isic):
    from cdfss.engine.metrics import class_miou, paired_bootstrap
    table = settings((3,), (.6,), (.7,), (1,), mean=False)
    s = segmenter('ssp')
    row = sensitivity(*sweep(s, *isic, table), table, draws=400, seed=0).iloc[0]
    plain, real = (evaluate({'m': m}, *isic, epoch=0) for m in (s, build('ssp+lcm', s.backbone)))
    gain, low, high = paired_bootstrap(plain, real, draws=400)
    assert abs(row.miou - class_miou(real)) < .02 and np.allclose([row.gain, row.gain_low, row.gain_high], [gain, low, high], atol=.05)

def made_up(n=80, settings_=200, better=None, seed=0):
    "Counts of settings that are all equally good, but for chance; one may be better."
    rng = np.random.default_rng(seed)
    union = np.full((1 + settings_, n), 1000.)
    tp = (400 + rng.normal(0, 100, n) + rng.normal(0, 100, (1 + settings_, n))).clip(0, 1000)
    tp[0] = 400
    if better is not None: tp[1 + better] += 150
    return tp, union, np.arange(n) % 2

def test_luck_is_not_gain():
    table = settings(range(1, 11), np.linspace(.1, 1, 5), (.5, .6, .7), (1,))
    fair, best = [], []
    for seed in range(8):
        at = chosen(*made_up(settings_=len(table), seed=seed), table, draws=40, seed=seed).set_index('choice').gain
        fair.append(at['chosen on the other half']); best.append(at['best on all'])
    assert np.mean(best) > 2 and abs(np.mean(fair)) < 1
    row = chosen(*made_up(settings_=len(table), better=17), table, draws=100).set_index('choice').loc['chosen on the other half']
    assert row.share > .9 and row.gain_low > 5 and (row.k, row.w) == tuple(table.iloc[17][['k', 'w']])

def test_effects_are_means_over_the_others():
    table = settings((1, 3), (.3, .6), (.5, .7), (1,))
    frame = table.assign(target='t', gain=np.arange(len(table), dtype=float))
    e = effects(frame).set_index(['number', 'value'])
    assert e.gain['k', '3'] == frame[frame.k == 3].gain.mean() and e.gain['beta', 'mean'] == frame[frame.beta_rule == 'mean'].gain.mean()
    assert e.span['k', '1'] == frame[frame.k == 3].gain.mean() - frame[frame.k == 1].gain.mean() and e.span['patch', '1'] == 0

def test_study(isic):
    frames = study(segmenter('ssp'), None, {'isic': isic}, episodes=5, ks=(1, 3), ws=(.6,), betas=(.7,), patches=(1, 2), draws=20, seed=4)
    assert len(frames['calibration']) == 8 and set(frames['effects'].number) == {'k', 'w', 'beta', 'patch'} and "the paper's" in set(frames['chosen'].choice)
    assert (frames['calibration'].seed == 4).all() and (frames['chosen'].episodes == 5).all() and set(frames['calibration'].beta_rule) == {'fixed', 'mean'}
