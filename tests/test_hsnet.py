"HSNet: the 4-D convolution against its full kernel, the fast paths against the plain ones, the vote, and the blocks it reads."
import dataclasses
import pytest, timm, torch
import torch.nn.functional as F
from cdfss.basics import InputError
from cdfss.methods.seams import build
from cdfss.models import hsnet
from cdfss.models.backbones import BackboneOptions, create_backbone
from cdfss.models.hsnet import HPN, CenterPivot, HSNet, Pair, box, first_layer, hypercorrelation, shot, vote
from episodes import backbone, enliven, episode, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

# ---- the convolution ----------------------------------------------------------------------------------------------------------
def full_kernel(conv:CenterPivot) -> torch.Tensor:
    "The 4-D kernel that is zero where neither position is the centre."
    o, i, k, _ = conv.conv1.weight.shape
    w = torch.zeros(o, i, k, k, k, k)
    w[:, :, :, :, k//2, k//2] += conv.conv1.weight
    w[:, :, k//2, k//2] += conv.conv2.weight
    return w

def slow(conv, x):
    "The 4-D convolution as a sum over all taps."
    w, k, p, s = full_kernel(conv), conv.conv1.kernel_size[0], conv.conv1.kernel_size[0]//2, conv.stride
    x = F.pad(x, (p,)*8)
    hq, wq, hs, ws = (d - 2*p for d in x.shape[2:])
    y = 0
    for a in range(k):
        for b in range(k):
            for c in range(k):
                for d in range(k):
                    y = y + torch.einsum('oi,nipqrs->nopqrs', w[:, :, a, b, c, d], x[:, :, a:a + hq, b:b + wq, c:c + hs:s, d:d + ws:s])
    return y + (conv.conv1.bias + conv.conv2.bias)[:, None, None, None, None]

@pytest.mark.parametrize('kernel,stride', [(3, 1), (3, 2), (5, 4), (5, 2)])
@pytest.mark.parametrize('grid', [(1, 1), (2, 2), (2, 3), (4, 4), (6, 7), (9, 5)])
@torch.no_grad()
def test_convolution_is_the_full_one(kernel, stride, grid):
    torch.manual_seed(0)
    conv, x = CenterPivot(2, 3, kernel, stride), torch.randn(2, 2, 4, 3, *grid)
    assert torch.allclose(conv(x), slow(conv, x), atol=1e-5)

@pytest.mark.parametrize('stride', [1, 2])
def test_small_grids_have_the_gradient_of_the_convolution(stride, monkeypatch):
    torch.manual_seed(0)
    conv, x = CenterPivot(2, 3, 3, stride), torch.randn(2, 2, 4, 3, 2, 2, requires_grad=True)
    grads = []
    for small in (16, 0):
        monkeypatch.setattr(hsnet, 'SMALL_GRID', small)
        grads.append(torch.autograd.grad(conv(x).square().sum(), [x, *conv.parameters()]))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads))

def test_one_support_position_is_one_convolution():
    torch.manual_seed(0)
    conv, x = CenterPivot(2, 3, 5, 2), torch.randn(2, 2, 4, 3, 1, 1, requires_grad=True)
    both = [torch.autograd.grad(y.square().sum(), [x, *conv.parameters()]) for y in (conv(x), conv.over_query(x) + conv.over_support(x))]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*both))

# ---- the hypercorrelation -----------------------------------------------------------------------------------------------------
def features(n=2, l=2, c=6, query=(5, 4), support=(9, 7), mask=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, s = torch.randn(n, l, c, *query, generator=g), torch.randn(n, l, c, *support, generator=g)
    return q, s if mask is None else s*mask

def test_hypercorrelation():
    q, s = features()
    s[:, :, :, 2, 3] = 0
    c = hypercorrelation(q, s)
    want = F.cosine_similarity(q.flatten(3)[..., None], s.flatten(3)[..., None, :], dim=2).clamp(min=0)
    assert torch.allclose(c.flatten(4).flatten(2, 3), want, atol=1e-4) and c[..., 2, 3].abs().max() == 0 and c.min() == 0

def masks():
    for y, x in (((0, 9), (0, 7)), ((0, 1), (0, 1)), ((8, 9), (6, 7)), ((3, 5), (2, 6)), ((4, 5), (3, 4)), ((0, 0), (0, 0))):
        m = torch.zeros(9, 7)
        m[slice(*y), slice(*x)] = 1
        yield m

@pytest.mark.parametrize('kernel,stride', [(3, 2), (5, 4), (3, 1)])
@pytest.mark.parametrize('block', [1, 2**21])
@torch.no_grad()
def test_first_layer_in_blocks_and_box(kernel, stride, block, monkeypatch):
    monkeypatch.setattr(hsnet, 'BLOCK', block)
    torch.manual_seed(0)
    conv = CenterPivot(2, 3, kernel, stride)
    for m in masks():
        q, s = features(mask=m)
        assert torch.allclose(first_layer(conv, Pair.of(q, s)), conv(hypercorrelation(q, s)), atol=1e-5)
    two = torch.stack(list(masks())[1:3])[:, None, None]                               # each episode its own object
    q, s = features(mask=two)
    assert torch.allclose(first_layer(conv, Pair.of(q, s)), conv(hypercorrelation(q, s)), atol=1e-5)

def test_nothing_outside_the_box_is_computed(monkeypatch):
    conv, seen = CenterPivot(2, 3, 5, 4), []
    m = torch.zeros(40, 40)
    m[8:12, 20:24] = 1
    q, s = features(support=(40, 40), mask=m)
    was = conv.over_support
    monkeypatch.setattr(conv, 'over_support', lambda x: seen.append(x.shape) or was(x))
    with torch.no_grad(): first_layer(conv, Pair.of(q, s))
    assert {tuple(x[-2:]) for x in seen} == {(8, 8)}                                   # the object, and what the kernel reaches
    assert box(m.any(1), 4, 2) == (8, 16) and box(m.any(0), 4, 2) == (20, 28)

@torch.no_grad()
def test_learner_with_and_without_gradient():
    torch.manual_seed(0)
    net, levels = HPN((1, 2, 1)), [features(1, l, 4, (h, h), (h, h), seed=h) for l, h in ((1, 3), (2, 6), (1, 12))]
    with torch.enable_grad(): plain = net(levels).detach()
    assert torch.allclose(net(iter(levels)), plain, atol=1e-5) and plain.shape == (1, 2, 24, 24)

def test_levels_that_do_not_halve_are_refused():
    seg = segmenter('hsnet', output_stride=8)
    with torch.no_grad(), pytest.raises(InputError, match='output_stride=32') as e: seg(episode(1, size=97))
    assert '\n' not in str(e.value)
    with pytest.raises(InputError, match='last three stages, the backbone has stem, stage1'): segmenter('hsnet', last_stage='stage1')

# ---- shots --------------------------------------------------------------------------------------------------------------------
def test_vote():
    g = torch.Generator().manual_seed(0)
    m = torch.rand(50, 5, 4, 4, generator=g) < torch.rand(50, 1, 1, 1, generator=g)
    for got, each in zip(vote(m), m):
        most = max(1, each.sum(0).max().item())
        assert torch.equal(got, each.sum(0)/most >= .5)
    assert not vote(torch.zeros(1, 5, 2, 2, dtype=torch.bool)).any()
    few = torch.zeros(1, 5, 1, 3, dtype=torch.bool)
    few[0, 0, 0, :2], few[0, 1, 0, 0] = True, True
    assert vote(few).tolist() == [[[True, True, False]]]                               # one vote of five counts where the most is two

@pytest.mark.parametrize('recipe', ['hsnet', 'hsnet+lcm'])
@torch.no_grad()
def test_each_shot_answers_alone_then_votes(recipe):
    seg, e = segmenter(recipe), episode(2, 3)
    match, size = seg.match(e), e.query.shape[-2:]
    alone = [seg.decide(shot(match, i), size) for i in range(3)]
    whole = seg.decide(match, size)
    assert torch.equal(whole.mask, vote(torch.stack([p.mask for p in alone], 1)))
    assert torch.allclose(whole.scores, torch.stack([p.scores for p in alone]).mean(0), atol=1e-6)
    assert not torch.allclose(alone[0].scores, alone[1].scores)

def test_loss_of_several_shots_is_their_mean():
    seg, e = segmenter('hsnet').train(), episode(2, 3)
    one = lambda i: dataclasses.replace(e, support=e.support[:, [i]], support_masks=e.support_masks[:, [i]], support_ignore=e.support_ignore[:, [i]], extras={})
    assert torch.allclose(seg.loss(e)['query'], torch.stack([seg.loss(one(i))['query'] for i in range(3)]).mean(), atol=1e-6)

# ---- the blocks it reads --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name,counts,shape', [('miniature', (1, 2, 1), (12, 12)), ('resnet18', (2, 2, 2), (12, 12)), ('vgg16', (3, 3, 1), (12, 12)),
                                               ('mobilenetv2_100', (1, 1, 1), (12, 12))])
@torch.no_grad()
def test_backbones(name, counts, shape):
    torch.manual_seed(0)
    seg = build('hsnet', enliven(create_backbone(BackboneOptions(backbone=name, weights='none', last_stage='last', output_stride=32, freeze='all')))).eval()
    assert tuple(map(len, reversed(seg.levels))) == counts
    p = seg(episode(1, 2, 96))
    assert p.coarse.shape[-2:] == (2*shape[0], 2*shape[1]) and p.scores.isfinite().all()
    assert not any(p.requires_grad for p in seg.backbone.parameters()) and all(p.requires_grad for p in seg.learner.parameters())

@torch.no_grad()
def test_blocks_of_a_resnet_are_read_before_the_last_relu():
    net, x = enliven(create_backbone(BackboneOptions(backbone='resnet50', weights='none', last_stage='last', output_stride=32))).eval(), torch.randn(1, 3, 64, 64)
    assert [len(net.blocks[f'stage{i}']) for i in (1, 2, 3, 4)] == [3, 4, 6, 3] and net.blocks['stem'] == ('stem',)
    wanted = [n for s in ('stage2', 'stage3', 'stage4') for n in net.blocks[s]]
    out, plain = net(x, blocks=wanted), net(x)
    assert set(plain) == set(net.names) and all(torch.equal(out[n], plain[n]) for n in net.names)
    x = plain['stage1']
    for s, layer in (('stage2', 'layer2'), ('stage3', 'layer3'), ('stage4', 'layer4')):
        for n, block in zip(net.blocks[s], net.stages[s].get_submodule(layer)):
            y = block.bn3(block.conv3(block.act2(block.bn2(block.conv2(block.act1(block.bn1(block.conv1(x)))))))) + (x if block.downsample is None else block.downsample(x))
            assert torch.allclose(out[n], y, atol=1e-5) and y.min() < 0
            x = y.relu()
    assert not any(h for m in net.ends.values() for h in m._forward_pre_hooks.values())

@torch.no_grad()
def test_blocks_of_a_vgg_are_its_convolutions():
    net = create_backbone(BackboneOptions(backbone='vgg16', weights='none', last_stage='last', output_stride=32)).eval()
    plain = timm.create_model('vgg16')
    plain.features.load_state_dict({k.split('features_')[1]: v for k, v in net.state_dict().items()})
    x, kept = torch.randn(1, 3, 64, 64), {}
    y = x
    for i, m in enumerate(plain.features):
        y = m(y)
        kept[i] = y.clone()
    out = net(x, blocks=net.outputs)
    for n, i in zip([*net.blocks['stage3'], *net.blocks['stage4'], *net.blocks['stage5']], (17, 19, 21, 24, 26, 28, 30)): assert torch.equal(out[n], kept[i]), n
    with pytest.raises(InputError, match='output_stride=8; a VGG has 32 only'): create_backbone(BackboneOptions(backbone='vgg16', weights='none'))

def test_stage_seam_acts_before_the_blocks():
    net, x = backbone(last_stage='last'), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        a = net(x, blocks=['stage2.0'])
        b = net(x, blocks=['stage2.0'], after=lambda n, t: t + 1 if n == 'stem' else t)
        c = net(a['stage1'], start='stage1', blocks=['stage2.0', 'stage1.0'])
    assert not torch.equal(a['stage2.0'], b['stage2.0']) and torch.equal(a['stage2.0'], c['stage2.0']) and 'stage1.0' not in c

def test_the_learner_is_as_wide_as_the_papers_but_behind_the_miniatures_net():
    width = lambda name: HSNet(create_backbone(BackboneOptions(backbone=name, weights='none', last_stage='last', output_stride=32, freeze='all'))).learner.decoder1[0].weight.shape[:2]
    assert width('resnet18') == (128, 128) and width('miniature') == (64, 64)
