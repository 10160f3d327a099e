"What makes training fast leaves its numbers alone: folded batch norms, batches read ahead, stored stages, fused optimizers, bf16, compiled stages."
import copy
import numpy as np
import pytest, torch
from torch import nn
from cdfss.basics import InputError
from cdfss.data.images import ImageStore, collate, read_batch
from cdfss.data.layouts import open_dataset
from cdfss.engine import fit as fit_module
from cdfss.engine.evaluate import lasting_features
from cdfss.engine.fit import FitOptions, ahead, fit, optimizer_of
from cdfss.models.backbones import FoldedConv, FoldedNorm, fold_norms
from episodes import episode, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def store(miniature, tmp_path_factory): return ImageStore(open_dataset('voc', miniature, 'trn'), 32, cache=tmp_path_factory.mktemp('decoded'))

def near(a, b, bound=1e-5): return (a - b).abs().max() <= bound * b.abs().max()

def gradients(seg, e):
    seg.zero_grad()
    loss = sum(seg.train().loss(e).values())
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in seg.named_parameters() if p.grad is not None}

# ---- folded batch norms -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('bn', ['frozen', 'eval'])
def test_a_folded_net_computes_and_learns_the_same(bn):
    seg, e = segmenter('ssp', bn=bn), episode(size=33)
    fold_norms(seg.backbone, False)
    names, (loss, plain), n = list(seg.state_dict()), gradients(seg, e), fold_norms(seg.backbone)
    assert n == sum(isinstance(m, nn.BatchNorm2d) for m in seg.backbone.modules()) and list(seg.state_dict()) == names
    folded, found = gradients(seg, e)
    assert near(folded, loss) and found.keys() == plain.keys() and all(near(found[k], plain[k], 1e-3) for k in plain)
    assert any('bn' in k for k in found) == (bn == 'eval')
    fold_norms(seg.backbone, False)
    again, found = gradients(seg, e)
    assert torch.equal(again, loss) and all(torch.equal(found[k], plain[k]) for k in plain)      # the plain way, to the bit

def test_norms_that_learn_their_statistics_are_not_folded():
    seg, e = segmenter('ssp', bn='train'), episode(size=33)
    fold_norms(seg.backbone)
    norm = next(m for m in seg.backbone.modules() if isinstance(m, FoldedNorm))
    before = norm.running_mean.clone()
    gradients(seg, e)
    assert not norm.folds and not torch.equal(norm.running_mean, before)
    assert norm.eval().folds                                                                      # but when it is evaluated

def test_a_copy_folds_its_own_norms():
    a = segmenter('ssp').backbone.quicken()
    b = copy.deepcopy(a)
    for m in b.modules():
        if isinstance(m, FoldedConv): assert any(m.norm[0] is n for n in b.modules()) and not any(m.norm[0] is n for n in a.modules())
    x = torch.randn(1, 3, 32, 32)
    before = a(x)['stage3']
    for m in b.modules():
        if isinstance(m, FoldedNorm): m.running_mean.add_(1.)
    assert torch.equal(a(x)['stage3'], before) and not near(b(x)['stage3'], before, .01)          # a statistic that changes is seen at once

def test_frozen_stages_keep_no_graph():
    seg = segmenter('ssp', freeze='stem+stage1').train()
    out = seg.backbone(torch.randn(1, 3, 32, 32))
    assert out['stem'].grad_fn is None and out['stage1'].grad_fn is None and out['stage2'].grad_fn is not None

# ---- batches ahead ------------------------------------------------------------------------------------------------------------
def trained(store, recipe='ssp+lem', **how):
    options = {k: how.pop(k) for k in ('freeze', 'bn') if k in how}
    seg = segmenter(recipe, **options)
    features = lasting_features(seg.train(), store, seg.needed, prefix=True) if how.pop('stored', False) else None
    rows = list(fit(seg, store, FitOptions(epochs=2, fit_episodes=10, batch=4, lr=.01, **{k: how.pop(k) for k in ('precision', 'optimizer') if k in how}), seed=3, features=features, **how))
    return seg.state_dict(), [r['loss'] for r in rows], features

def test_read_ahead_or_not_the_bytes_are_the_same(store):
    (a, la, _), (b, lb, _) = (trained(store, prefetch=n) for n in (0, 3))
    assert la == lb and all(torch.equal(v, b[n]) for n, v in a.items())

def test_a_fault_is_raised_when_its_batch_is_due():
    def make(x):
        if x == 2: raise InputError('no')
        return x
    batches = ahead(make, range(6), 3)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(InputError, match='no'): next(batches)

def test_batches_of_a_gpu_are_pinned(store, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda t: (pinned.append(t.shape), t.clone())[1])
    plan = [(0, (p,), store.dataset.items[0].cls) for p in store.dataset.by_class[store.dataset.items[0].cls] if p][:1]
    mean, std = (0.,) * 3, (1.,) * 3
    a, b = read_batch(store, plan).pinned().episode(mean, std), collate(store, plan, mean, std)
    assert len(pinned) == 6 and torch.equal(a.query, b.query) and torch.equal(a.support_masks, b.support_masks)

# ---- stored stages ------------------------------------------------------------------------------------------------------------
def test_frozen_first_stages_are_computed_once(store, monkeypatch):
    how = dict(recipe='ssp+lcm', freeze='stem+stage1')
    (a, la, features), (b, lb, _) = (trained(store, stored=stored, **how) for stored in (True, False))
    assert features.stages == ('stage1',) and 0 < features.encoded <= len(store.dataset)
    assert np.allclose(la, lb, atol=1e-4) and all(near(v, b[n], 1e-3) for n, v in a.items() if v.is_floating_point() and v.numel() > 1)

def test_images_are_not_read_where_their_stages_are_stored(store, monkeypatch):
    seg = segmenter('ssp', freeze='stem')
    features = lasting_features(seg.train(), store, seg.needed, prefix=True)
    features.get(list(range(len(store.dataset))))
    monkeypatch.setattr(store, 'image', lambda p: pytest.fail('an image was read'))
    assert len(list(fit(seg, store, FitOptions(epochs=1, fit_episodes=4, batch=4), seed=0, features=features))) == 1

@pytest.mark.parametrize('recipe,options,kept', [('ssp', dict(freeze='stem'), ('stem',)), ('ssp+lcm', dict(freeze='stem+stage1+stage2'), ('stage2',)), ('hsnet', {}, None), ('ssp', {}, ()),
                                                 ('ssp+lem', dict(freeze='stem+stage1'), ()), ('ssp', dict(freeze='stem', bn='train'), ()), ('ssp', dict(freeze='stage1'), ())])
def test_what_is_stored(store, recipe, options, kept):
    seg = segmenter(recipe, **options).train()
    found = lasting_features(seg, store, seg.needed, prefix=True)
    assert (found.stages if found else ()) == (seg.needed if kept is None else kept)

# ---- optimizers, bf16, compiling -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name,plain', [('sgd', torch.optim.SGD), ('adam', torch.optim.Adam), ('adamw', torch.optim.AdamW)])
def test_fused_optimizers_step_as_plain_ones(name, plain):
    o, start = FitOptions(lr=.01), torch.linspace(-1, 1, 50)
    a, b = (nn.Parameter(start.clone()) for _ in range(2))
    more = dict(momentum=o.momentum) if name == 'sgd' else {}
    for p, optimizer in ((a, optimizer_of(name, [a], o)), (b, plain([b], lr=o.lr, weight_decay=o.weight_decay, fused=False, **more))):
        for _ in range(5): p.grad = p.detach().sin(); optimizer.step()
    assert torch.allclose(a, b, atol=1e-6) and not torch.allclose(a, start, atol=1e-3)

def test_bf16_trains_as_float32_does(store):
    (_, a, _), (_, b, _), (_, other, _) = trained(store), trained(store, precision='bf16'), trained(store, optimizer='adam')
    assert a != b and np.allclose(a, b, rtol=.02) and not np.allclose(a, other, rtol=.02)

@pytest.mark.slow
def test_compiled_stages_compute_the_same_and_are_still_read(monkeypatch):
    net, x, real, asked = segmenter('hsnet').backbone.quicken(), torch.randn(1, 3, 32, 32), nn.Module.compile, []
    def compile(m):
        asked.append(m)
        if m is net.stages['stage3']: real(m, backend='eager')                                     # the tracing of one stage, without minutes of a compiler
    monkeypatch.setattr(nn.Module, 'compile', compile)
    with torch.no_grad():
        plain = net(x, blocks=net.outputs)
        net.quicken(compile=True).quicken(compile=True)
        assert net.compiled and asked == list(net.stages.values()) and near(net(x)['stage3'], plain['stage3'])
        read = net(x, blocks=net.outputs)                                                          # compiled code would not know the hooks
    assert read.keys() == plain.keys() and all(near(v, plain[n]) for n, v in read.items())
