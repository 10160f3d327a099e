"Metrics against the authors' meters, against slow references that work on masks, and the intervals against known truths."
import time
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from cdfss.basics import InputError
from cdfss.engine.metrics import (COUNTS, METRICS, bootstrap, bootstrap_mean, class_miou, confusion, fb_iou, ifa_compat, mean_episode_iou, over_seeds,
                                  paired_bootstrap, paired_bootstrap_mean, seed_interval, to_frame)

CASES = ['patnet_deepglobe', 'patnet_isic', 'patnet_isic_class1_never_drawn', 'patnet_lung', 'patnet_fss',
         'hsnet_pascal_fold1_ignore', 'hsnet_pascal_fold1_noignore']
OF_INTEREST = {'patnet_deepglobe': range(6), 'patnet_isic': range(3), 'patnet_isic_class1_never_drawn': range(3), 'patnet_lung': range(1),
               'patnet_fss': range(760, 1000), 'hsnet_pascal_fold1_ignore': range(5, 10), 'hsnet_pascal_fold1_noignore': range(5, 10)}
FLOAT32 = dict(rtol=0, atol=1e-5)                                         # the stored percentages are float32

@pytest.fixture(scope='module')
def case(parity): return dict(np.load(parity/'metrics.npz'))

def counted(case, ignore=False, batch=8):
    "Counts of all stored episodes, computed batch by batch."
    mask, target, void = (torch.from_numpy(case[k].astype(bool)) for k in ('pred', 'gt', 'ignore'))
    return torch.cat([confusion(m, t, v if ignore else None) for m, t, v in zip(*(x.split(batch) for x in (mask, target, void)))])

# ---- the authors' meters
@pytest.mark.parametrize('name', CASES)
def test_patnet_and_hsnet_meters(case, name):
    counts = counted(case, ignore='_ignore' in name)
    tp, fp, fn, tn = counts.numpy().T
    np.testing.assert_array_equal(case[f'{name}.inter'], [tn, tp])
    np.testing.assert_array_equal(case[f'{name}.union'], [tn + fp + fn, tp + fp + fn])
    frame = to_frame(counts, torch.from_numpy(case[f'{name}.class_id']))
    got = class_miou(frame, classes=OF_INTEREST[name]), fb_iou(frame)
    np.testing.assert_allclose(got, case[f'{name}.result'], **FLOAT32)

@pytest.mark.parametrize('data, classes', [('deepglobe', 6), ('isic', 3), ('lung', 1)])
@pytest.mark.parametrize('batch', [1, 4, 12])
def test_ifa_script(case, data, classes, batch):
    frame = to_frame(counted(case), torch.arange(48) % classes)
    np.testing.assert_allclose(ifa_compat(frame, classes, batch), case[f'ifa_{data}_batch{batch}'][0], **FLOAT32)

def test_ssp_script(case):
    "SSP averages over the labels that were drawn, so it equals class mIoU with ignored pixels left out."
    frame = to_frame(counted(case, ignore=True), 5 + torch.arange(48) % 5)
    np.testing.assert_allclose(class_miou(frame), case['ssp_pascal'][0], **FLOAT32)

# ---- slow references on masks, pixel sets and Python numbers only
def masks(seed, n=24, size=9, classes=3, void=True):
    rng = np.random.default_rng(seed)
    pred, gt, ign = (rng.random((n, size, size)) < p for p in (.4, .3, .1))
    pred[1] = gt[1] = False                                              # nothing to find, nothing found
    pred[2] = False; gt[3] = False; pred[4] = ~gt[4]; ign[5] = True      # nothing found; nothing there; complement; all ignored
    return pred, gt, ign if void else np.zeros_like(ign), rng.permutation(np.arange(n) % classes)

def pixels(m, ign, i): return {(y, x) for y, x in np.argwhere(m[i])} - {(y, x) for y, x in np.argwhere(ign[i])}

def slow_class_miou(pred, gt, ign, cls):
    out = []
    for c in sorted(set(cls)):
        inter = union = 0
        for i in np.flatnonzero(cls == c):
            p, g = pixels(pred, ign, i), pixels(gt, ign, i)
            inter += len(p & g); union += len(p | g)
        out.append(inter/max(union, 1))
    return 100*sum(out)/len(out)

def slow_fb_iou(pred, gt, ign, cls):
    out = []
    for a, b in ((pred, gt), (~pred, ~gt)):
        pairs = [(pixels(a, ign, i), pixels(b, ign, i)) for i in range(len(a))]
        out.append(sum(len(p & g) for p, g in pairs)/max(sum(len(p | g) for p, g in pairs), 1))
    return 100*sum(out)/2

def slow_mean_episode_iou(pred, gt, ign, cls):
    pairs = [(pixels(pred, ign, i), pixels(gt, ign, i)) for i in range(len(pred))]
    return 100*sum(len(p & g)/len(p | g) if p | g else 1 for p, g in pairs)/len(pairs)

def slow_ifa(pred, gt, ign, cls, classes, batch):
    "The script itself: label maps and a bincount of true*classes + predicted, where the truth is below `classes`."
    hist = np.zeros(classes*classes)
    for s in range(0, len(cls), batch):
        for i in range(s, min(s + batch, len(cls))):
            label = cls[s] + 1
            t, p = gt[i][~ign[i]]*label, pred[i][~ign[i]]*label
            keep = t < classes
            hist += np.bincount(classes*t[keep] + p[keep], minlength=classes*classes)
    hist = hist.reshape(classes, classes)
    union = hist.sum(0) + hist.sum(1) - np.diag(hist)
    with np.errstate(invalid='ignore'): return 100*np.nanmean(np.diag(hist)/union)

def frame_of(pred, gt, ign, cls, batch=5):
    p, g, v = (torch.from_numpy(a).split(batch) for a in (pred, gt, ign))
    return to_frame(torch.cat([confusion(*b) for b in zip(p, g, v)]), torch.from_numpy(cls))

@pytest.mark.parametrize('seed', range(4))
def test_against_slow_references(seed):
    m = masks(seed)
    f = frame_of(*m)
    for metric, slow in ((class_miou, slow_class_miou), (fb_iou, slow_fb_iou), (mean_episode_iou, slow_mean_episode_iou)):
        np.testing.assert_allclose(metric(f), slow(*m), rtol=0, atol=1e-10, err_msg=metric.__name__)
    for batch in (1, 2, 5, 24): np.testing.assert_allclose(ifa_compat(f, 3, batch), slow_ifa(*m, 3, batch), atol=1e-10)

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), *[st.integers(0, 30)]*4), min_size=1, max_size=12))
def test_bounds_and_order(rows):
    "Every metric lies in [0, 100]; all but the IFA one ignore the order of episodes; the counts of a perfect answer give 100."
    f = pd.DataFrame(rows, columns=['cls', *COUNTS])
    for name, metric in METRICS.items():
        assert 0 <= metric(f) <= 100
        if name != 'ifa_compat': np.testing.assert_allclose(metric(f), metric(f.iloc[::-1]), atol=1e-9)
    perfect = f.assign(tp=f.tp + 1, tn=f.tn + 1, fp=0, fn=0)
    for name in ('class_miou', 'fb_iou', 'mean_episode_iou'): assert METRICS[name](perfect) == pytest.approx(100)

# ---- the batch size of the evaluation
def test_batch_size_changes_only_ifa(case):
    target = torch.arange(48) % 3
    for b in (1, 7, 48):
        f = to_frame(counted(case, batch=b), target)
        assert [METRICS[m](f) for m in ('class_miou', 'fb_iou', 'mean_episode_iou')] == \
               [METRICS[m](to_frame(counted(case), target)) for m in ('class_miou', 'fb_iou', 'mean_episode_iou')]
    f = to_frame(counted(case), target)
    for b in (3, 6, 12, 24, 96): assert abs(ifa_compat(f, 3, b) - fb_iou(f)) < 1e-6
    assert abs(ifa_compat(f, 3, 1) - fb_iou(f)) > 5 and abs(ifa_compat(f, 3, 4) - ifa_compat(f, 3, 1)) > .1

# ---- edge cases, stated
def test_empty_unions():
    nothing, hit = [0, 0, 0, 9], [1, 0, 0, 8]
    f = to_frame(torch.tensor([nothing, hit]), torch.tensor([0, 1]))
    assert class_miou(f) == 50                                           # as the reference: max(union, 1)
    assert mean_episode_iou(f) == 100                                    # nothing to find, nothing found
    assert fb_iou(to_frame(torch.tensor([nothing]), torch.tensor([0]))) == 50

def test_confusion_refuses_wrong_input():
    m = torch.zeros(2, 4, 4, dtype=torch.bool)
    raw = getattr(confusion, '__wrapped__', confusion)                   # without the test run's own type check
    with pytest.raises(InputError, match='mask is torch.float32'): raw(m.float(), m)
    with pytest.raises(InputError, match='target has shape'): raw(m, m[:, :2])
    with pytest.raises(InputError, match='ignore is torch.uint8'): raw(m, m, m.byte())

def a_frame(n=60, seed=0, classes=3, **columns):
    "A table of episodes whose per-episode IoU varies."
    rng = np.random.default_rng(seed)
    fg, hit, extra = rng.integers(100, 3000, n), rng.beta(4, 3, n), rng.random(n)*.6
    tp = (fg*hit).astype(int)
    f = pd.DataFrame({'index': np.arange(n), 'cls': np.arange(n) % classes, 'tp': tp, 'fp': (fg*extra).astype(int), 'fn': fg - tp, 'tn': 4000,
                      'target': 'isic', 'shot': 1, 'query': [f'q{i}' for i in range(n)], 'supports': [[f's{i}', 't'] for i in range(n)]})
    return f.assign(**columns)

def test_table_is_checked():
    f = a_frame()
    with pytest.raises(InputError, match='lacks fn, tn'): class_miou(f.drop(columns=['fn', 'tn']))
    with pytest.raises(InputError, match='empty'): fb_iou(f[:0])
    with pytest.raises(InputError, match="mixes target isic, fss"): class_miou(pd.concat([f, f.assign(target='fss')]))
    with pytest.raises(InputError, match="mixes epoch"): bootstrap(pd.concat([f.assign(epoch=1), f.assign(epoch=2)]))
    with pytest.raises(InputError, match=r'classes lacks \[2\]'): class_miou(f, classes=[0, 1])
    with pytest.raises(InputError, match='class id 2 was drawn'): ifa_compat(f, classes=2)
    with pytest.raises(InputError, match='batch=0'): ifa_compat(f, batch=0)
    with pytest.raises(InputError, match='did you mean'): bootstrap(f, 'clas_miou')
    with pytest.raises(InputError, match='no interval'): bootstrap(f, 'ifa_compat')
    with pytest.raises(InputError, match='level=95'): bootstrap(f, level=95)
    with pytest.raises(InputError, match='draws=0'): bootstrap(f, draws=0)

# ---- intervals
@pytest.mark.parametrize('metric', ['class_miou', 'fb_iou', 'mean_episode_iou'])
def test_bootstrap_against_a_loop(metric):
    "The plain bootstrap, one resampled table at a time with another generator, gives the same interval within its own noise."
    f, rng = a_frame(90), np.random.default_rng(123)
    groups = [g for _, g in f.groupby('cls')]
    slow = [METRICS[metric](pd.concat([g.iloc[rng.integers(0, len(g), len(g))] for g in groups])) for _ in range(400)]
    value, low, high = bootstrap(f, metric, draws=4000)
    assert value == METRICS[metric](f)
    np.testing.assert_allclose((low, high), np.quantile(slow, [.025, .975]), atol=.25*np.std(slow)*2)

def test_bootstrap_covers_the_truth():
    "Of 300 samples of 300 episodes each, about 95 % of the intervals hold the value of the whole population."
    population = a_frame(30_000, seed=1)
    truth = class_miou(population)
    hits = [low <= truth <= high for s in range(300) for _, low, high in [bootstrap(population[s*99:s*99 + 300], draws=300, seed=s)]]
    assert .90 < np.mean(hits) < .99

def test_bootstrap_is_fast_and_repeatable():
    f = a_frame(2400, classes=240)
    start = time.perf_counter()
    first = bootstrap(f)
    assert time.perf_counter() - start < 3                               # about 0.4 s; room for a busy machine
    assert first == bootstrap(f)
    assert bootstrap(f, level=.5)[1] > first[1] and bootstrap(f, level=.5)[2] < first[2]

def test_paired_interval_is_narrower_and_signed():
    a = a_frame(300)
    b = a.assign(tp=a.tp + a.fn//20, fn=a.fn - a.fn//20)
    d, low, high = paired_bootstrap(a, b)
    assert d == pytest.approx(class_miou(b) - class_miou(a)) and 0 < low < d < high
    assert high - low < .2*(bootstrap(a)[2] - bootstrap(a)[1])
    np.testing.assert_allclose(paired_bootstrap(b, a), (-d, -high, -low), atol=1e-9)
    assert paired_bootstrap(a, a.iloc[::-1]) == (0, 0, 0)

@pytest.mark.parametrize('change, words', [
    (lambda f: f.assign(target='fss'), 'target isic and fss'), (lambda f: f.assign(shot=5), 'shot 1 and 5'),
    (lambda f: f.assign(query=f['query'] + 'x'), 'query q0 and q0x'), (lambda f: f.assign(supports=[['a', 't']]*len(f)), 'supports'),
    (lambda f: f[:-1], '60 and 59 episodes'), (lambda f: f.drop(columns='query'), 'second table of episodes lacks query')])
def test_paired_refuses_different_episodes(change, words):
    with pytest.raises(InputError, match=words): paired_bootstrap(a_frame(), change(a_frame()))

def test_paired_reads_what_parquet_returns(tmp_path):
    a = a_frame()
    a.to_parquet(tmp_path/'e.parquet')
    assert paired_bootstrap(a, pd.read_parquet(tmp_path/'e.parquet')) == (0, 0, 0)

def test_mean_over_targets():
    frames = [a_frame(n, seed=s) for n, s in ((60, 0), (300, 1), (2000, 2))]
    value, low, high = bootstrap_mean(frames)
    each = [bootstrap(f) for f in frames]
    assert value == pytest.approx(np.mean([v for v, _, _ in each]))
    half = np.sqrt(sum(((h - l)/2)**2 for _, l, h in each))/3               # independent targets: variances add
    assert (high - low)/2 == pytest.approx(half, rel=.08)
    other = [f.assign(tp=f.tp + f.fn//20, fn=f.fn - f.fn//20) for f in frames]
    d, low, high = paired_bootstrap_mean(zip(frames, other))
    assert d == pytest.approx(bootstrap_mean(other)[0] - value) and 0 < low < d < high
    with pytest.raises(InputError, match='no table'): bootstrap_mean([])

def test_seed_interval():
    mean, low, high = seed_interval([41., 43., 45., 44., 42.])
    assert mean == 43 and high - mean == pytest.approx(2.776445*np.std([41, 43, 45, 44, 42], ddof=1)/5**.5, rel=1e-6) and mean - low == pytest.approx(high - mean)
    with pytest.raises(InputError, match='at least 2'): seed_interval([43.])
    frames = [a_frame(seed=s) for s in range(3)]
    assert over_seeds(frames, 'fb_iou') == seed_interval([fb_iou(f) for f in frames])
    rng = np.random.default_rng(0)                                       # the interval holds the true mean in 95 % of cases
    hits = [low <= 0 <= high for _, low, high in (seed_interval(v) for v in rng.standard_normal((600, 3)))]
    assert .92 < np.mean(hits) < .98
