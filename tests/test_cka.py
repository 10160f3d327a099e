"CKA against a slow float64 form of the printed formulas and against two published packages; its invariances; and the layers of a net."
import numpy as np
import pytest, torch
from cdfss.basics import InputError
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.diagnostics.activations import images_of, stages_of
from cdfss.diagnostics.cka import Similarity, centred_gram, channel_similarity, cka, cka_between, domain_cka, layer_features, similarity, study
from episodes import segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

def slow_hsic(k, l):
    "HSIC1 of two Gram matrices as Nguyen et al. 2021 print it, equation 3."
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
    return (np.trace(k @ l) + (one @ k @ one)*(one @ l @ one)/((n - 1)*(n - 2)) - 2/(n - 2)*(one @ k @ l @ one))/(n*(n - 3))

def slow_gram(x, kernel, bandwidth=1.):
    x = x.reshape(len(x), -1).astype(np.float64)
    if kernel == 'linear': return x @ x.T
    d = np.array([[((a - b)**2).sum() for b in x] for a in x])
    middle = sorted(d[i, j] for i in range(len(x)) for j in range(i))[(len(x)*(len(x) - 1)//2 - 1)//2]
    return np.exp(-d/(2*bandwidth**2*middle))

def slow_cka(xs, ys, kernel='linear', bandwidth=1., parts=None):
    parts = parts or [slice(None)]
    mean = lambda a, b: np.mean([slow_hsic(slow_gram(a[p], kernel, bandwidth), slow_gram(b[p], kernel, bandwidth)) for p in parts])
    return np.array([[mean(x, y)/np.sqrt(mean(x, x)*mean(y, y)) for y in ys] for x in xs])

def layers(n, widths=(3, 8, 40), seed=0, shift=2.):
    "Layers that share structure: noisy maps of the same hidden rows."
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((n, 5))
    return [hidden @ rng.standard_normal((5, w)) + .5*rng.standard_normal((n, w)) + shift for w in widths]

def t(xs, dtype=torch.float64): return [torch.tensor(x, dtype=dtype) for x in xs]

# ---- exact ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kernel', ['linear', 'rbf'])
@pytest.mark.parametrize('n', [4, 5, 17, 32])
def test_equals_the_printed_formula(kernel, n):
    xs, ys = layers(n, seed=n), layers(n, (6, 2), seed=n)
    np.testing.assert_allclose(similarity(t(xs), t(ys), kernel=kernel, bandwidth=.7), slow_cka(xs, ys, kernel, .7), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(similarity(t(xs), kernel=kernel), slow_cka(xs, xs, kernel), rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('kernel', ['linear', 'rbf'])
def test_minibatches_average_numerators_and_denominators_apart(kernel):
    xs, ys = layers(30), layers(30, (7,), seed=0)
    want = slow_cka(xs, ys, kernel, parts=[slice(0, 8), slice(8, 16), slice(16, 23), slice(23, 30)])       # 30 rows in four nearly equal parts
    np.testing.assert_allclose(similarity(t(xs), t(ys), kernel=kernel, batch=7), want, rtol=1e-9)
    assert np.abs(want - slow_cka(xs, ys, kernel)).max() > 1e-4                                         # and that is not the CKA of all rows at once

@pytest.mark.parametrize('shift', [0, 100])
def test_float32_keeps_five_digits_under_a_large_common_mean(shift):
    xs = layers(64, shift=shift)
    np.testing.assert_allclose(similarity(t(xs, torch.float32)), slow_cka(xs, xs), atol=2e-5)

def test_maps_are_flattened_and_layers_may_come_from_a_generator():
    x, y = torch.randn(9, 2, 3, 4), torch.randn(9, 5)
    s = Similarity()
    s.add(f for f in (x, y))
    assert torch.equal(s.value(), similarity([x.flatten(1), y]))

def test_equal_to_pytorch_cka():
    package = pytest.importorskip('cka')
    xs, ys = layers(40), layers(40, (9, 4), seed=0)
    got = package.cka_from_features(t(xs), t(ys))
    np.testing.assert_allclose(similarity(t(xs), t(ys)), np.asarray(got), atol=1e-9)

@pytest.mark.filterwarnings('ignore')
def test_equal_to_torch_cka():
    package = pytest.importorskip('torch_cka')
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 5))
    x = torch.randn(48, 6)
    theirs = package.CKA(net, net, 'a', 'b', model1_layers=['0', '1', '2'], model2_layers=['0', '1', '2'])
    theirs.compare(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=16))
    with torch.no_grad(): outs = [net[:i](x) for i in (1, 2, 3)]
    np.testing.assert_allclose(similarity(outs, batch=16), theirs.export()['CKA'], atol=1e-4)

# ---- what it must not see ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kernel', ['linear', 'rbf'])
def test_invariances(kernel):
    xs = t(layers(25))
    base = similarity(xs, kernel=kernel)
    for i, x in enumerate(xs):
        turn = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], dtype=x.dtype)).Q
        for y in (x @ turn, 1e-3*x, 1e3*x, x + torch.randn(x.shape[1], dtype=x.dtype), torch.cat([x, torch.ones(25, 3, dtype=x.dtype)], 1)):
            np.testing.assert_allclose(similarity([*xs[:i], y, *xs[i + 1:]], kernel=kernel), base, atol=1e-8)
    order = torch.randperm(25)
    np.testing.assert_allclose(similarity([x[order] for x in xs], kernel=kernel), base, atol=1e-10)
    assert (similarity([xs[2]], [xs[2]*torch.linspace(.1, 5, 40, dtype=torch.float64)], kernel=kernel) < .999).all()      # but it does see a stretch

def test_unrelated_layers_are_at_zero_however_few_the_images():
    g = torch.Generator().manual_seed(0)
    found = [similarity([torch.randn(6, 30, generator=g)], [torch.randn(6, 30, generator=g)]).item() for _ in range(400)]
    assert abs(np.mean(found)) < 3*np.std(found)/20 and np.max(np.abs(found)) <= 1

@pytest.mark.parametrize('n', [4, 5, 6])
def test_finite_for_few_and_for_constant(n):
    flat, vary = torch.full((n, 3), .1), torch.randn(n, 3)
    for kernel in ('linear', 'rbf'):
        m = similarity([flat, vary, torch.zeros(n, 2), torch.randn(n, 500)], kernel=kernel)
        assert m.isfinite().all() and m.abs().max() <= 1 + 1e-6 and (m[0] == 0).all() and m[1, 1] == pytest.approx(1, abs=1e-6)

def test_errors_name_what_is_wrong():
    with pytest.raises(InputError, match='at least 4'): centred_gram(torch.randn(3, 5))
    with pytest.raises(InputError, match='rows'): similarity([torch.randn(8, 2)], [torch.randn(9, 2)])
    with pytest.raises(InputError, match="did you mean 'linear'"): centred_gram(torch.randn(5, 5), 'liner')

def test_interval_is_the_jackknife_over_minibatches():
    xs, ys, s = t(layers(40)), t(layers(40, (4,), seed=0)), Similarity()
    for i in range(0, 40, 8): s.add([x[i:i + 8] for x in xs], [y[i:i + 8] for y in ys])
    left = []
    for b in range(5):
        some = Similarity()
        some.terms = s.terms[:b] + s.terms[b + 1:]
        left.append(some.value().numpy())
    half = 2.7764451051977987*np.sqrt(4/5*((left - np.mean(left, 0))**2).sum(0))
    low, high = s.interval()
    np.testing.assert_allclose(low, s.value() - half, rtol=1e-9)
    np.testing.assert_allclose(high, s.value() + half, rtol=1e-9)
    one = Similarity()
    one.add(xs)
    assert one.interval()[0].isnan().all()

# ---- domains ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('form', ['gram', 'covariance'])
def test_domain_form_is_cka_of_channel_gram_matrices(form):
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((4, 12))
    x, y = rng.standard_normal((30, 4)) @ mix + 1, rng.standard_normal((21, 4)) @ mix + rng.standard_normal(12)
    centre = (lambda a: a - a.mean(0)) if form == 'covariance' else (lambda a: a)
    k, l = (centre(a).T @ centre(a)/len(a) for a in (x, y))
    want = slow_hsic(k, l)/np.sqrt(slow_hsic(k, k)*slow_hsic(l, l))
    found = channel_similarity(*t([x, y]), form, shuffles=40)
    assert found['cka'] == pytest.approx(want, abs=1e-10) and found['low'] < found['cka'] < found['high']
    assert abs(found['null']) < .2 and found['null'] < found['null_high']
    again = channel_similarity(*t([x[::-1].copy(), 5*y]), form, shuffles=1)
    assert again['cka'] == pytest.approx(want, abs=1e-10)                                  # neither order nor scale of the images counts
    assert channel_similarity(*t([x, np.concatenate([y, y])]), form, shuffles=1)['cka'] == pytest.approx(want, abs=1e-10)     # nor their number
    assert channel_similarity(*t([x, x]), form, shuffles=1)['cka'] == pytest.approx(1)
    wrong = channel_similarity(*t([x, y[:, rng.permutation(12)]]), form, shuffles=1)['cka']
    assert wrong < found['null_high'] + .2 and wrong < found['cka']

# ---- the layers of a net ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def sets(miniature):
    def opened(name, split=None):
        data = open_dataset(name, miniature, split)
        return ImageStore(data, 64), draw('balanced', data, 1, episodes=12)
    return {'voc': opened('voc', 'trn'), 'isic': opened('isic')}

def test_features_are_the_stages(sets):
    seg, (store, manifest) = segmenter('ssp'), sets['isic']
    at = images_of(manifest, 9)
    want = [torch.cat(f) for f in zip(*(s.values() for s in stages_of(seg, store, at)))]
    for pool, take in (('mean', lambda f: f.mean((2, 3))), ('flat', lambda f: f.flatten(1))):
        found = layer_features(seg, store, at, pool=pool, chunk=4)
        assert tuple(found) == seg.backbone.names
        for f, w in zip(found.values(), want): assert torch.allclose(f, take(w), atol=1e-5)
    inner = layer_features(seg, store, at, ('stage3.1', 'stage2'))
    assert torch.allclose(inner['stage3.1'], layer_features(seg, store, at)['stage3'], atol=1e-5) and list(inner) == ['stage2', 'stage3.1']     # no last ReLU here

def test_wrong_layers_are_refused(sets):
    seg, (store, manifest) = segmenter('ssp'), sets['isic']
    for kw in (dict(layers=('stage7',)), dict(pool='max')):
        with pytest.raises(InputError, match='unknown (layer|pool)'): layer_features(seg, store, [0], **kw)

def test_tables(sets):
    a, b, (store, manifest) = segmenter('ssp'), segmenter('ssp', seed=1), sets['isic']
    own = cka(a, store, manifest, images=16, batch=8)
    assert np.allclose(own[own.a == own.b].cka, 1) and np.allclose(own.pivot(index='a', columns='b', values='cka'), own.pivot(index='b', columns='a', values='cka'))
    across = cka_between(a, b, store, manifest, images=16, batch=8, kernel='rbf')
    at = images_of(manifest, 16)
    x, y = (list(layer_features(s, store, at).values()) for s in (a, b))
    s = Similarity('rbf')
    for p in (slice(0, 8), slice(8, 16)): s.add([f[p] for f in x], [f[p] for f in y])
    np.testing.assert_allclose(across.cka.to_numpy().reshape(4, 4), s.value(), atol=1e-4)
    assert set(across.manifest) == {manifest.hash[:8]} and set(across.batches) == {2} and (across.low <= across.cka).all()

def test_domains_and_study(sets):
    seg, frames = segmenter('ssp'), study(segmenter('ssp'), sets['voc'], {'isic': sets['isic']}, episodes=12, images=16, batch=8, before=segmenter('ssp', seed=1))
    direct = domain_cka(seg, sets['voc'], {'isic': sets['isic']}, images=16)
    same = frames['domain_cka'].query("model == 'trained'").drop(columns='model').reset_index(drop=True)
    np.testing.assert_allclose(same.cka, direct.cka)
    assert set(frames['cka'].target) == set(frames['between'].target) == {'voc', 'isic'} and set(frames['domain_cka'].model) == {'trained', 'pretrained'}
    assert 'between' not in study(seg, sets['voc'], {}, episodes=4, images=8, batch=4)
