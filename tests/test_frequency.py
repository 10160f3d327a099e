"Frequency: the filter against the full complex transform, channel statistics against slow forms, relations whose truth is known."
import numpy as np
import pandas as pd, pytest, torch
from scipy.stats import spearmanr
from cdfss.basics import InputError
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.diagnostics.frequency import (BANDS, COMBINATIONS, BandPass, band_filter, channel_pairs, channel_study, combinations, correlations, distinct, filtered_episodes,
                                         filters, mutual_information, phase_differences, relation, spearman, study)
from cdfss.engine.adapt import AdaptOptions, Tuner
from cdfss.engine.evaluate import evaluate
from cdfss.methods.seams import Module
from episodes import segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def isic(miniature):
    data = open_dataset('isic', miniature)
    return ImageStore(data, 64), draw('balanced', data, 1, episodes=8)

def slow_filter(x, amplitude, phase, cutoff):
    "lfm.md's reconstruction, letter by letter: centred complex transform, masks, polar, real part of the inverse; in float64."
    h, w = x.shape[-2:]
    z = torch.fft.fftshift(torch.fft.fft2(x.double()), dim=(-2, -1))
    fy, fx = (torch.fft.fftshift(torch.fft.fftfreq(n)).double() for n in (h, w))
    r = 2*torch.hypot(fy[:, None], fx[None])
    mask = dict(all=torch.ones_like(r), low=(r <= cutoff).double(), high=(r > cutoff).double())
    out = z.abs()*mask[amplitude]*torch.exp(1j*z.angle()*mask[phase])
    return torch.fft.ifft2(torch.fft.ifftshift(out, dim=(-2, -1))).real

@pytest.mark.parametrize('h,w', [(8, 8), (7, 9), (12, 5), (1, 6)])
@pytest.mark.parametrize('combination', COMBINATIONS)
def test_half_spectrum_equals_the_whole(h, w, combination):
    x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(h + w))
    for cutoff in (0., .25, .5, 1.): assert torch.allclose(band_filter(x, *combination, cutoff).double(), slow_filter(x, *combination, cutoff), atol=1e-5), cutoff

def test_seven_of_nine_differ():
    x = torch.randn(1, 9, 9, generator=torch.Generator().manual_seed(0))
    made = {c: band_filter(x, *c, .4) for c in COMBINATIONS}
    for c in COMBINATIONS: assert torch.allclose(made[c], made[distinct(*c)], atol=1e-5)
    different = [made[c] for c in {distinct(*c) for c in COMBINATIONS}]
    assert len(different) == 7 and all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(different) for b in different[:i])
    with pytest.raises(InputError, match="did you mean 'low'"): band_filter(x, 'lw', 'all', .4)
    with pytest.raises(InputError, match='level'): BandPass(segmenter('ssp'), 'pixels', 'low', 'all', .4)

@pytest.mark.parametrize('level', ['image', 'feature'])
def test_neutral_filter_is_the_base(isic, level):
    s = segmenter('ssp')
    plain = evaluate({'segmenter': s}, *isic, epoch=0)
    own = list(s.extras)
    s.extras.append(BandPass(s, level, 'all', 'all', .3))
    assert s.shares_encoding == (level == 'feature')
    filtered = evaluate({'segmenter': s}, *isic, epoch=0)
    assert (filtered[['tp', 'fp', 'fn']] == plain[['tp', 'fp', 'fn']]).all(axis=None) and not own

def test_image_filter_acts_before_normalisation():
    s = segmenter('ssp')
    from episodes import episode
    e = episode()
    pixels = lambda x: x*s.backbone_std + s.backbone_mean
    s.backbone_mean, s.backbone_std = (torch.tensor(v).view(3, 1, 1) for v in (s.backbone.mean, s.backbone.std))
    out = BandPass(s, 'image', 'low', 'all', .2).images(e)
    assert torch.allclose(pixels(out.query), band_filter(pixels(e.query), 'low', 'all', .2), atol=1e-5) and torch.allclose(pixels(out.support), band_filter(pixels(e.support), 'low', 'all', .2), atol=1e-5)

def test_combinations_are_paired_and_complete(isic):
    s = segmenter('ssp+lcm')
    own = list(s.extras)
    frame = filtered_episodes(s, *isic, cutoffs=(.5,))
    assert list(s.extras) == own
    table = combinations(frame, draws=50)
    assert len(table) == 2*9 and (table[(table.amplitude == 'all') & (table.phase == 'all')].gain == 0).all()
    base = table[(table.amplitude == 'all') & (table.phase == 'all')].miou.iloc[0]
    assert np.allclose(table.miou - base, table.gain)
    row = table[(table.level == 'feature') & (table.cutoff == .5) & (table.amplitude == 'low') & (table.phase == 'all')].iloc[0]
    s.extras.insert(0, BandPass(s, 'feature', 'low', 'all', .5))
    from cdfss.engine.metrics import class_miou
    assert np.isclose(row.miou, class_miou(evaluate({'m': s}, *isic, epoch=0)))

def test_correlations_against_numpy():
    x = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    x[1, 3] = 2.5                                                                          # no variation, no correlation
    i, j = np.triu_indices(6, 1)
    with np.errstate(invalid='ignore'): want = np.stack([np.abs(np.corrcoef(im.flatten(1).double().numpy()))[i, j] for im in x])
    found = correlations(x).numpy()
    assert np.allclose(found, want, equal_nan=True) and (np.isnan(found[1]) == ((i == 3) | (j == 3))).all() and not np.isnan(found[0]).any()

def test_mutual_information_of_known_pairs():
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 4, (1, 1, 64, 64), generator=g).float()
    b = torch.randint(0, 4, (1, 1, 64, 64), generator=g).float()
    x = torch.cat([a, -a, b], 1)
    same, _ = mutual_information(x, np.array([[0, 1]]), bins=4)
    apart, null = mutual_information(x, np.array([[0, 2]]), bins=4)
    assert abs(same[0] - np.log(4)) < .01 and apart[0] < .01 and null[0] < .01              # as much as a channel holds; nothing

def test_pairs_are_seeded_and_differ():
    p = channel_pairs(20, 50, 1)
    assert (p == channel_pairs(20, 50, 1)).all() and (p != channel_pairs(20, 50, 2)).any() and len({tuple(r) for r in p}) == 50 and (p[:, 0] < p[:, 1]).all()
    assert len(channel_pairs(3, 50, 0)) == 3
    with pytest.raises(InputError, match='at least 2'): channel_pairs(1, 5, 0)

@pytest.mark.parametrize('h,w', [(6, 6), (5, 7), (6, 5)])
def test_phase_differences_against_a_loop(h, w):
    x = torch.randn(1, 2, h, w, generator=torch.Generator().manual_seed(3))
    f = np.fft.fft2(x[0].double().numpy())
    want = []
    for k in range(h):
        for l in range(w):
            if ((-k) % h, (-l) % w) == (k, l): continue                                    # its own mirror image: real
            d = abs(np.angle(f[0, k, l]) - np.angle(f[1, k, l]))
            want.append(min(d, 2*np.pi - d))
    assert np.allclose(phase_differences(x, np.array([[0, 1]]))[0, 0], want)

class Flat(Module):
    "At the features seam: every channel becomes the first one plus little, so that channels correlate."
    seams, phases = ('features',), ('test',)
    def features(self, match):
        from dataclasses import replace
        alike = lambda f: {n: v.select(-3, 0).unsqueeze(-3) + .01*v for n, v in f.items()}
        return replace(match, query=alike(match.query), support=alike(match.support))

def test_channel_study_sees_what_a_module_does(isic):
    s = segmenter('ssp')
    s.extras.append(Flat())
    table = combinations(filtered_episodes(s, *isic, levels=('feature',), cutoffs=(.3,)), draws=20)
    conditions = filters(s, table, 'feature')
    assert list(conditions)[0] == 'plain' and conditions['plain'] == [] and list(conditions)[-1] == 'recipe' and len(conditions) == 4
    frames = channel_study(s, *isic, conditions, pairs=6, draws=20)
    mean = frames['episodes'].groupby('condition').correlation.mean()
    assert mean['recipe'] > .95 > mean['plain'] + .2
    cdf = frames['cdf'][frames['cdf'].condition == 'recipe']
    assert cdf.value.is_monotonic_increasing and cdf.value.iloc[-1] == 1 and cdf.value.iloc[40] < .1
    assert np.allclose(frames['phases'].groupby('condition').value.sum(), 1)
    assert frames['magnitude'][frames['magnitude'].condition == 'plain'].value.is_monotonic_decreasing
    plain = evaluate({'m': segmenter('ssp')}, *isic, epoch=0)
    assert np.allclose(frames['episodes'][frames['episodes'].condition == 'plain'].iou, 100*plain.tp/(plain.tp + plain.fp + plain.fn))

def test_maps_without_variation_have_no_distribution(isic):
    s = segmenter('ssp')
    frames = channel_study(s, *isic, {'constant': [BandPass(s, 'feature', 'low', 'low', 0.)]}, pairs=6, draws=20)
    assert frames['cdf'][['value', 'low', 'high']].isna().all(axis=None) and frames['episodes'].correlation.isna().all() and frames['episodes'].iou.notna().all()

def test_spearman_against_scipy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=80).round(1)                                                       # with ties
    y = .5*x + rng.normal(size=80)
    rho, low, high = spearman(x, y)
    assert np.isclose(rho, spearmanr(x, y).statistic) and low < rho < high and low > 0

def test_relation_reads_a_planted_one_and_none():
    rng = np.random.default_rng(0)
    def table(strength):
        fall = rng.normal(.1, .05, 60)
        rise = 100*strength*fall + rng.normal(0, 3, 60)
        both = pd.DataFrame(dict(target='t', index=np.arange(60), condition='plain', correlation=.5, iou=40.))
        return pd.concat([both, both.assign(condition='filter', correlation=.5 - fall, iou=40 + rise)])
    assert relation(table(1.)).reading[0] == 'rises where correlation falls' and relation(table(-1.)).reading[0] == 'falls where correlation falls'
    said = [relation(table(0.), draws=200).reading[0] for _ in range(20)]
    assert said.count('cannot tell') >= 16

def test_a_condition_without_any_correlation_cannot_tell():
    "A filter that leaves a constant in every channel: nothing correlates, and nothing falls over."
    both = pd.DataFrame(dict(target='t', index=np.arange(9), condition='plain', correlation=.5, iou=40.))
    row = relation(pd.concat([both, both.assign(condition='constant', correlation=np.nan, iou=30.)]), draws=20).iloc[0]
    assert row.reading == 'cannot tell' and row.episodes == 0 and np.isnan(row.rise)

def test_study_of_both_levels(isic):
    frames = study(segmenter('ssp'), isic, {'chest': isic}, episodes=4, cutoffs=(.3,), pairs=4, draws=20, seed=2)
    assert set(frames) == {'combinations', 'cdf', 'information', 'magnitude', 'phases', 'episodes', 'relation'}
    assert set(frames['relation'].level) == {'image', 'feature'} and all((f.seed == 2).all() and 'manifest' in f for f in frames.values())

def test_a_recipe_that_adapts_is_measured_after_tuning(isic):
    s = segmenter('ssp+apm_m')
    tuner = Tuner(AdaptOptions(adapt_steps=3, adapt_lr=.1))
    t = combinations(filtered_episodes(s, *isic, levels=('feature',), cutoffs=(.3,)), draws=20)
    assert t.miou.iloc[0] == combinations(filtered_episodes(segmenter('ssp'), *isic, levels=('feature',), cutoffs=(.3,)), draws=20).miou.iloc[0]     # filters are tried without it
    frames = channel_study(s, *isic, {'plain': [], 'recipe': list(s.extras)}, pairs=4, draws=20, tuner=tuner)
    tuned = evaluate({'m': s}, *isic, epoch=0, tuner=tuner)
    at = frames['episodes'].set_index('condition')
    assert np.allclose(at.iou['recipe'], 100*tuned.tp/(tuned.tp + tuned.fp + tuned.fn)) and (at.correlation['recipe'].to_numpy() != at.correlation['plain'].to_numpy()).all()
    assert (s.extras[0].amplitude == 0).all()                                              # the segmenter itself stays as it was
