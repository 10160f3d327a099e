"Sharpness: each kind of disturbance against the plain way, its strength, what it must leave alone, and its intervals."
import copy, sys
import numpy as np
import pytest, torch
import torch.nn.functional as F
from cdfss.basics import InputError, mix_seed
from cdfss.data.images import ImageStore, collate
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.diagnostics import sharpness as module
from cdfss.diagnostics.sharpness import ASCENTS, KINDS, answers, blocks, carried, disturbed, hessian, sharpness, study
from cdfss.engine.evaluate import evaluate
from cdfss.engine.metrics import COUNTS, class_miou, confusion
from cdfss.methods.seams import build
from cdfss.models.backbones import Backbone
from cdfss.models.segmenter import cross_entropy
from episodes import segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def isic(miniature):
    data = open_dataset('isic', miniature)
    return ImageStore(data, 64), draw('balanced', data, 1, episodes=6)

@pytest.fixture(scope='module')
def setting(): return dict(strengths=(.3,), draws=2)

def setting_of(seg, **kw): return module._Setting(**dict(stages=seg.backbone.names, strengths=(.3,), seed=0, unit='rms', chunk=8, batch=4) | kw)

@torch.no_grad()
def plain(seg, store, manifest, disturb=None):
    "Loss and counts, one episode at a time through the whole net; `disturb(stage, output, keys)` may change a stage."
    rows = []
    for e in manifest.episodes:
        b = collate(store, [e], seg.backbone.mean, seg.backbone.std)
        keys = [store.key(p) for p in (e[0], *e[1])]
        images, k = torch.cat([b.query, b.support[0]]), b.shots
        made = seg.backbone(images, after=(lambda name, x: disturb(name, x, keys)) if disturb else None)
        match = module.Match({n: made[n][:1] for n in seg.needed}, {n: made[n][1:][None] for n in seg.needed}, *module.Match.masks(b.support_masks, b.support_ignore))
        p = seg.decide(match, images.shape[-2:])
        loss = cross_entropy(p.scores, b.query_mask.long().masked_fill(b.ignore, 255)).item()
        rows.append((loss, *confusion(p.mask, b.query_mask, b.ignore)[0].tolist()))
    return np.array(rows)

def table(frame, stage, r, draw=0):
    return frame[(frame.stage == stage) & (frame.strength == r) & (frame.draw == draw)].sort_values('index')[['loss', *COUNTS]].to_numpy(float)

# ---- exact ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', KINDS)
def test_strength_zero_is_the_ordinary_evaluation(isic, kind):
    seg = segmenter('ssp+lcm')
    frame = disturbed(seg, *isic, kind, strengths=(0.,), draws=2)
    want = evaluate({'m': seg}, *isic, epoch=0)[list(COUNTS)].to_numpy()
    losses = plain(seg, *isic)[:, 0]
    for (_, draw), f in frame.groupby(['stage', 'draw']):
        np.testing.assert_array_equal(f[list(COUNTS)], want)
        np.testing.assert_allclose(f.loss, losses, atol=1e-4)
    assert set(frame.stage) == {'', *seg.backbone.names}

@pytest.mark.parametrize('recipe', ['ssp', 'prototype+lcm'])
def test_feature_noise_equals_a_hook_in_the_whole_net(isic, recipe):
    seg = segmenter(recipe)
    frame = disturbed(seg, *isic, 'feature', strengths=(.3,), draws=2)
    for stage in seg.backbone.names:
        def disturb(name, x, keys):
            if name != stage: return x
            z = torch.stack([torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(mix_seed(stage, 0, k, 1))) for k in keys])
            return x + .3*x.square().mean((2, 3), keepdim=True).sqrt()*z
        got, want = table(frame, stage, .3, draw=1), plain(seg, *isic, disturb)
        np.testing.assert_allclose(got[:, 0], want[:, 0], atol=1e-3)
        assert np.abs(got[:, 1:] - want[:, 1:]).max() <= 2                       # a pixel at the boundary may turn with the order of sums

def test_weight_noise_equals_changed_weights(isic):
    seg = segmenter('ssp')
    frame, o = disturbed(seg, *isic, 'weight', strengths=(.3,), draws=2), setting_of(seg)
    for stage in seg.backbone.names:
        other = copy.deepcopy(seg)
        weights = module._weights(other.backbone.stages[stage])
        for n, z in module._filter_noise(o, weights, stage, 1).items():
            size = lambda t: t.flatten(1).norm(dim=1)
            torch.testing.assert_close(size(z), size(weights[n]))                # filter-normalised
            weights[n] += .3*z
        np.testing.assert_allclose(table(frame, stage, .3, draw=1)[:, 0], plain(other, *isic)[:, 0], atol=1e-3)

@pytest.mark.parametrize('kind', ['sam', 'asam'])
def test_ascent_has_its_radius_and_goes_up(isic, kind):
    seg = segmenter('ssp')
    block = next(blocks(seg, *isic, 6))
    for stage in seg.backbone.names:
        net = seg.backbone.stages[stage]
        x = module._into(seg, block, stage)
        params = {n: p for n, p in net.named_parameters() if p.ndim > 1}
        loss = lambda: answers(seg, block, {s: f[None] for s, f in seg.backbone(net(x), start=stage).items()})[0].mean()
        for p in params.values(): p.requires_grad_()
        g = dict(zip(params, torch.autograd.grad(loss(), params.values())))
        r, norm = .02, lambda d: torch.cat([v.flatten() for v in d.values()]).norm()
        w = {n: p.detach().clone() for n, p in params.items()}
        eps = {n: r*norm(w)*g[n]/norm(g) if kind == 'sam' else r*w[n]**2*g[n]/norm({k: w[k]*g[k] for k in w}) for n in w}
        size = norm(eps)/norm(w) if kind == 'sam' else norm({n: eps[n]/w[n].abs() for n in w})
        assert size.item() == pytest.approx(r, rel=1e-4)
        with torch.no_grad():
            before = loss().item()
            for n, p in params.items(): p += eps[n]
            want = loss().item()
            for n, p in params.items(): p.copy_(w[n])
        got = table(disturbed(seg, *isic, kind, stages=(stage,), strengths=(r,)), stage, r)[:, 0].mean()
        assert got == pytest.approx(want, abs=1e-3) and want > before

def test_image_direction_is_the_trace_of_pixel_noise(isic):
    seg = segmenter('ssp')
    block, o = next(blocks(seg, *isic, 6)), setting_of(seg)
    with torch.no_grad(): made = {s: x[s] for s, r, x in module._image(seg, block, o, range(2))}
    z = torch.stack([torch.randn(block.images.shape[1:], generator=torch.Generator().manual_seed(mix_seed('image', 0, k, 1))) for k in block.keys])
    with torch.no_grad(): noisy = seg.backbone(block.images + .1*block.images.std((2, 3), keepdim=True)*z)
    for s, x in made.items():
        a, b = (x[1] - block.clean[s]).flatten(1), (noisy[s] - block.clean[s]).flatten(1)
        assert F.cosine_similarity(a, b).min() > .999
    arrives = carried(seg, *isic, draws=2)
    assert list(arrives.stage) == list(seg.backbone.names) and (arrives.carried > 0).all()

@pytest.mark.parametrize('kind', ['feature', 'image'])
def test_equal_relative_strength_at_every_stage(isic, kind):
    seg = segmenter('ssp')
    block, o = next(blocks(seg, *isic, 6)), setting_of(seg)
    with torch.no_grad():
        for s, r, x in KINDS[kind](seg, block, o, range(3)):
            size = (x[s] - block.clean[s]).flatten(2).norm(dim=2)/block.clean[s].flatten(1).norm(dim=1)
            assert torch.allclose(size, torch.full_like(size, r), rtol=.15 if kind == 'feature' else 1e-3)

# ---- what must not matter, and what must not change --------------------------------------------------------------------------
@pytest.mark.parametrize('kind', ['feature', 'image', 'weight'])
def test_blocks_chunks_and_groups_change_nothing(isic, setting, kind):
    seg = segmenter('ssp')
    whole = disturbed(seg, *isic, kind, **setting)
    cut = disturbed(seg, *isic, kind, **setting, block=4, chunk=3, batch=5, memory=1)
    key = ['stage', 'draw', 'index']
    a, b = (f.sort_values(key).reset_index(drop=True) for f in (whole, cut))
    assert a[key].equals(b[key]) and np.allclose(a.loss, b.loss, atol=1e-4) and np.abs(a[list(COUNTS)] - b[list(COUNTS)]).to_numpy().max() <= 2
    fewer = disturbed(seg, *isic, kind, strengths=(.3,), draws=1)
    np.testing.assert_allclose(fewer.loss, whole[whole.draw == 0].loss, atol=1e-4)                              # more draws leave the first as it was

@pytest.mark.parametrize('kind', KINDS)
def test_the_net_is_left_as_it_was(isic, setting, kind):
    seg = segmenter('ssp', freeze='stem')
    state, flags = copy.deepcopy(seg.state_dict()), [p.requires_grad for p in seg.parameters()]
    frame = disturbed(seg, *isic, kind, **setting)
    assert all(torch.equal(v, state[k]) for k, v in seg.state_dict().items()) and flags == [p.requires_grad for p in seg.parameters()]
    assert all(p.grad is None for p in seg.parameters()) and np.isfinite(frame.loss).all()
    assert frame[frame.stage == 'stem'].loss.mean() != frame[frame.stage == ''].loss.mean()                 # a frozen stage can be disturbed too

def test_seeds_draw_and_same_seeds_repeat(isic, setting):
    seg = segmenter('ssp')
    a, b, c = (disturbed(seg, *isic, **setting, seed=s) for s in (0, 0, 1))
    assert a.equals(b) and not np.allclose(a[a.stage == 'stem'].loss, c[c.stage == 'stem'].loss)
    assert not np.allclose(*(a[(a.stage == 'stem') & (a.draw == d)].loss for d in (0, 1)))

def test_silent_channels_stay_silent(isic):
    seg = segmenter('ssp')
    block = next(blocks(seg, *isic, 6))
    block.clean['stem'][:, :3] = 0
    with torch.no_grad(): _, _, x = next(KINDS['feature'](seg, block, setting_of(seg), range(2)))
    x = x['stem']
    assert (x[:, :, :3] == 0).all() and (x[:, :, 3:] != block.clean['stem'][:, 3:]).any()

# ---- intervals --------------------------------------------------------------------------------------------------------------
def test_values_and_intervals(isic):
    seg = segmenter('ssp')
    raw = disturbed(seg, *isic, strengths=(.2, .8), draws=3)
    rows = sharpness(seg, *isic, strengths=(.2, .8), draws=3)
    clean = raw[raw.stage == '']
    for _, row in rows.iterrows():
        f = raw[(raw.stage == row.stage) & (raw.strength == row.strength)]
        miou = np.mean([class_miou(g) for _, g in f.groupby('draw')])
        assert row.miou == pytest.approx(miou) and row['drop'] == pytest.approx(class_miou(clean) - miou)
        assert row.rise == pytest.approx(f.loss.mean() - clean.loss.mean(), abs=1e-6)
        assert row.drop_low <= row['drop'] <= row.drop_high and row.rise_low <= row.rise <= row.rise_high
    assert set(rows.manifest) == {isic[1].hash[:8]} and (rows.draws == 3).all() and (rows.episodes == 6).all()

def test_interval_covers_both_draws_and_episodes():
    "Made-up losses: spread over draws alone, over episodes alone, and none."
    import pandas as pd
    def fall(by_draw, by_episode):
        base = dict(tp=5, fp=5, fn=0, tn=10, cls=0)
        clean = pd.DataFrame([dict(base, index=i, draw=0, loss=1.) for i in range(20)])
        frame = pd.DataFrame([dict(base, index=i, draw=d, loss=2 + by_draw*d + by_episode*i) for d in range(4) for i in range(20)])
        return module._fall(frame, clean)
    still, draws, episodes = fall(0, 0), fall(.1, 0), fall(0, .1)
    assert still['rise_low'] == pytest.approx(1) and still['rise_high'] == pytest.approx(1)
    assert draws['rise_high'] - draws['rise_low'] == pytest.approx(2*1.96*.1*np.sqrt(1.25/4), rel=.25)
    assert episodes['rise_high'] - episodes['rise_low'] == pytest.approx(2*1.96*.1*np.sqrt(33.25/20), rel=.15)

# ---- curvature --------------------------------------------------------------------------------------------------------------
def test_hessian_equals_the_full_matrix(isic):
    pytest.importorskip('curvlinops')
    torch.manual_seed(0)
    conv = lambda i, o, s: torch.nn.Sequential(torch.nn.Conv2d(i, o, s, s, bias=False), torch.nn.Softplus())
    seg = build('prototype', Backbone({'stem': conv(3, 4, 8), 'stage1': conv(4, 5, 1)}, (.5,)*3, (.25,)*3, bn='eval')).eval()
    found = hessian(seg, *isic, stages=('stage1',), episodes=3, probes=400, top=2).set_index('stage')
    block = next(blocks(seg, *isic, 3))
    target = block.fg[block.query].long().masked_fill(block.void[block.query], 255)
    def loss(w):
        stages = {'stage1': F.softplus(F.conv2d(block.clean['stem'], w.view(5, 4, 1, 1)))}
        match = module.Match({n: f[block.query] for n, f in stages.items()}, {n: f[block.support] for n, f in stages.items()},
                             *module.Match.masks(block.fg[block.support], block.void[block.support]))
        return F.cross_entropy(seg.decide(match, (64, 64)).scores, target, ignore_index=255)
    full = torch.autograd.functional.hessian(loss, seg.backbone.stages['stage1'][0].weight.detach().flatten())
    row, top = found.loc['stage1'], torch.linalg.eigvalsh(full.double()).flip(0)
    assert row.weights == 20 and row.trace == pytest.approx(full.trace().item(), abs=4*row.trace_error + 1e-6) and row.trace_error < .2*abs(row.trace)
    assert row.eigenvalue_1 == pytest.approx(top[0].item(), rel=.03) and row.eigenvalue_2 == pytest.approx(top[1].item(), rel=.05)

def test_hessian_of_ssp_is_finite(isic):
    pytest.importorskip('curvlinops')
    torch.manual_seed(0)
    conv = lambda i, o, s: torch.nn.Sequential(torch.nn.Conv2d(i, o, s, s, bias=False), torch.nn.BatchNorm2d(o), torch.nn.ReLU())
    seg = build('ssp', Backbone({'stem': conv(3, 8, 4), 'stage1': conv(8, 8, 2)}, (.5,)*3, (.25,)*3)).eval()
    frame = hessian(seg, *isic, episodes=2, probes=2, top=1, steps=6)
    assert np.isfinite(frame[['trace', 'trace_error', 'eigenvalue_1']].to_numpy()).all() and (frame.eigenvalue_1 > 0).all()

def test_hessian_without_the_package_is_one_line(isic, monkeypatch):
    monkeypatch.setitem(sys.modules, 'curvlinops', None)
    with pytest.raises(InputError, match=r"not installed; pip install 'cdfss\[hessian\]'"): hessian(segmenter('ssp'), *isic)

# ---- bad input --------------------------------------------------------------------------------------------------------------
def test_errors(isic):
    seg = segmenter('ssp')
    for kw, match in ((dict(kind='featur'), "did you mean 'feature'"), (dict(stages=('stage8',)), 'unknown stage'), (dict(unit='max'), 'unknown unit'), (dict(draws=0), 'draws=0')):
        with pytest.raises(InputError, match=match): disturbed(seg, *isic, **kw)
    class Changes(torch.nn.Module):
        seams, phases, reads = ('stage',), ('test',), ()
    seg.extras.append(Changes())
    with pytest.raises(InputError, match='at test time'): next(blocks(seg, *isic, 4))

def test_study(isic, miniature):
    voc = open_dataset('voc', miniature, 'trn')
    frames = study(segmenter('ssp'), (ImageStore(voc, 64), draw('balanced', voc, 1, episodes=4)), {'isic': isic}, episodes=4, before=segmenter('ssp', seed=1),
                   kinds=('feature', 'sam'), strengths=(.1,), draws=2, stages=('stem', 'stage3'))
    f = frames['sharpness']
    assert set(f.kind) == {'feature', 'sam'} and set(f.target) == {'voc', 'isic'} and set(f.model) == {'trained', 'pretrained'} and len(f) == 2*2*2*2
    assert set(frames['carried'].model) == {'trained', 'pretrained'} and (f[f.kind == 'sam'].draws == 1).all() and ASCENTS == ('sam', 'asam')
