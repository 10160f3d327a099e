"PATNet: the map onto the anchors, formed and not formed; tuning on the supports; what the base asks of the settings."
import dataclasses
import pytest, torch
from cdfss.engine.adapt import AdaptOptions, adapting, pick, tune, with_parameters
from cdfss.engine.train import TrainSettings, resolve, standing
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone
from cdfss.models.hsnet import HSNet, hypercorrelation
from cdfss.models.patnet import PATNet, divergence, dual, plane, pooled, project, rows
from cdfss.models.segmenter import Tuning
from episodes import episode, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

def formed(f, prototypes, anchors):
    "The transformation with its c x c matrix (patnet.md, step 3), one block at a time."
    out = torch.empty_like(f)
    for i in range(f.shape[0]):
        for j in range(f.shape[1]):
            w = torch.linalg.pinv(rows(prototypes[i, j]).double()) @ rows(anchors[j]).double()
            out[i, j] = (w.T @ f[i, j].double().flatten(1)).unflatten(1, f.shape[-2:]).float()
    return out

def test_two_coordinates_give_the_correlation_of_the_formed_map():
    g = torch.Generator().manual_seed(0)
    q, s, c, r = (torch.randn(*shape, generator=g) for shape in ((2, 3, 32, 4, 5), (2, 3, 32, 6, 3), (2, 3, 2, 32), (3, 2, 32)))
    basis = plane(r) @ dual(c)
    assert torch.allclose(hypercorrelation(project(q, basis), project(s, basis)), hypercorrelation(formed(q, c, r), formed(s, c, r)), atol=2e-4)

def test_prototypes_reach_the_anchors():
    g = torch.Generator().manual_seed(0)
    c, r = torch.randn(1, 1, 2, 16, generator=g), torch.randn(1, 2, 16, generator=g)
    there = formed(rows(c)[0].mT[None, ..., None].reshape(1, 1, 16, 2, 1), c, r)[0, 0, ..., 0].T
    assert torch.allclose(there, rows(r)[0], atol=1e-5)

def test_pooled_is_a_weighted_mean():
    f, w = torch.randn(2, 3, 4, 5, 6), torch.rand(2, 5, 6)
    want = torch.stack([(f[i]*w[i]).sum((-2, -1))/w[i].sum() for i in range(2)])
    assert torch.allclose(pooled(f, w), want, atol=1e-5) and pooled(f, torch.zeros(2, 5, 6)).abs().max() == 0

def test_anchors_of_each_backbone():
    def made(name): return build('patnet', create_backbone(BackboneOptions(backbone=name, weights='none', last_stage='last', output_stride=32, freeze='all')))
    r50, vgg = made('resnet50'), made('vgg16')
    assert [tuple(a.shape) for a in r50.anchors] == [(2, 512), (2, 1024), (2, 2048)] and sum(a.numel() for a in r50.anchors) == 7168
    assert [list(r50.pairs.values()).count(i) for i in range(3)] == [4, 6, 3]
    assert [tuple(a.shape) for a in vgg.anchors] == [(2, 512)]*2 and list(vgg.pairs.values()) == [0]*4 + [1]*3

@torch.no_grad()
def test_the_map_changes_the_answer_and_follows_its_anchors():
    a, e = segmenter('patnet'), episode(2)
    plain = segmenter('hsnet')
    plain.load_state_dict({k: v for k, v in a.state_dict().items() if not k.startswith('anchors')})
    before = a(e).scores
    assert not torch.allclose(before, plain(e).scores, atol=1e-3)
    for p in a.anchors: p.mul_(3)
    assert torch.allclose(a(e).scores, before, atol=1e-5), 'the length of an anchor does not matter'
    for p in a.anchors: p.copy_(p.flip(1))
    assert torch.allclose(a(e).scores, before, atol=1e-4), 'turning the plane does not matter'
    for p in a.anchors: p[0] += p[1]
    assert not torch.allclose(a(e).scores, before, atol=1e-4), 'the angle between anchors does'

# ---- tuning -------------------------------------------------------------------------------------------------------------------
def test_divergence():
    p, q = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    a, b = p.double().softmax(-1), q.double().softmax(-1)
    assert torch.allclose(divergence(p, q).double(), (a*(a.log() - b.log())).sum((1, 2)), atol=1e-5)

@pytest.mark.parametrize('recipe,k', [('patnet', 1), ('patnet', 3), ('patnet+acpa', 1)])
@pytest.mark.parametrize('seed', [0, 1])
def test_a_small_step_takes_from_the_loss_what_the_gradient_says(recipe, k, seed, monkeypatch):
    "While the pseudo mask of the query stays; as it follows the answer, the loss of whole tunings need not fall."
    seg, episodes, seen, lr = segmenter(recipe, seed=seed), episode(2, k, seed=seed), [], 1e-3
    was = PATNet.alignment
    monkeypatch.setattr(PATNet, 'alignment', lambda self, match, foreground: was(self, match, seen[-1] if seen else foreground))
    for i in range(2):
        e, start = pick(episodes, i), dict(seg.named_parameters())
        seen.clear()
        with monkeypatch.context() as m, adapting(seg), torch.no_grad():
            m.setattr(PATNet, 'alignment', lambda self, match, foreground: seen.append(foreground) or was(self, match, foreground))
            seg.adapt_loss(e)
        values, losses = tune(seg, e, Tuning('sgd', 1, lr, momentum=0))
        with adapting(seg): after = sum(with_parameters(seg, {n: v[0] for n, v in values.items()}, 'adapt_loss', e).values()).detach()
        expected = sum(((v[0] - start[n].detach())**2).sum() for n, v in values.items()) / lr         # lr |gradient|^2
        assert expected > 1e-5 and torch.allclose(losses[0, 0] - after, expected, rtol=.2, atol=2e-6), (losses[0, 0] - after, expected)

@pytest.mark.parametrize('recipe,names', [('patnet', ['anchors.0']), ('patnet+acpa', ['extras.0.down', 'extras.0.up', 'anchors.0'])])
@pytest.mark.parametrize('k', [1, 3])
def test_the_anchors_of_the_lowest_level_are_tuned_on_the_supports(recipe, names, k):
    seg, e = segmenter(recipe), episode(3, k)
    assert sorted(seg.adaptable()) == sorted(names)
    plan = dataclasses.replace(AdaptOptions(adapt_steps=5).plan(seg.tuning, ''), lr=1e-2)
    before = {n: v.clone() for n, v in seg.state_dict().items()}
    values, losses = tune(seg, e, plan)
    assert losses.shape == (5, 3) and all((values['anchors.0'][i] - before['anchors.0']).abs().max() > 1e-3 for i in range(3))
    assert all(torch.equal(v, before[n]) for n, v in seg.state_dict().items()), 'the segmenter itself stays'
    other = dataclasses.replace(e, query=torch.randn_like(e.query), query_mask=None)
    again, _ = tune(seg, other, plan)
    assert all(torch.equal(values[n], again[n]) for n in values), 'the query is not looked at'
    with adapting(seg): terms = seg.adapt_loss(e)
    assert list(terms) == ['alignment'] + ['query']*(recipe != 'patnet')

@pytest.mark.parametrize('recipe', ['patnet', 'patnet+hsm'])
def test_training_in_half_precision(recipe):
    seg, e = segmenter(recipe).train(), episode(2, size=96)
    with torch.autocast('cpu', dtype=torch.bfloat16): half = sum(seg.loss(e).values())
    half.backward()
    whole = sum(seg.loss(e).values())
    assert torch.allclose(half.float(), whole, rtol=.05) and seg.anchors[0].grad.isfinite().all() and seg.anchors[0].grad.abs().max() > 0

# ---- settings -----------------------------------------------------------------------------------------------------------------
def test_what_the_base_asks_of_the_settings():
    for method in ('hsnet', 'patnet', 'hsnet+lcm'):
        s = resolve(TrainSettings(method=method, weights='none'))
        assert (s.optimizer, s.lr, s.weight_decay, s.schedule, s.border, s.freeze, s.last_stage, s.output_stride) == ('adam', 1e-3, 0, 'poly', 'background', 'all', 'last', 32)
    s = resolve(TrainSettings(method='ssp', weights='none'))
    assert (s.optimizer, s.weight_decay, s.schedule, s.border, s.freeze, s.last_stage, s.output_stride) == ('sgd', 5e-4, 'step', 'ignore', 'none', 'stage3', 8)
    given = resolve(TrainSettings(method='hsnet', weights='none', optimizer='sgd', freeze='none', batch=3))
    assert (given.optimizer, given.freeze, given.batch) == ('sgd', 'none', 3)
    assert (standing('real', 'hsnet')['batch'], standing('real', 'hsnet')['schedule']) == (20, 'constant') and HSNet.defaults('miniature').keys() <= standing('miniature').keys()
