"What is PAHNet's, SCCAN's and HDMNet's own beside the contract: neutral settings, bad input, the diagnosis of its three predictors, and memory at full size."
import dataclasses, math
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from cdfss.basics import InputError
from cdfss.data.images import ImageStore
from cdfss.engine.evaluate import lasting_features
from cdfss.episode import Episode
from cdfss.methods.pahnet import Enhancement, pool
from cdfss.methods.seams import build
from cdfss.models.affinity import Attention
from cdfss.models.backbones import BackboneOptions, create_backbone
from cdfss.models.importers import from_official
from cdfss.models.sccan import WindowAttention
from episodes import backbone, episode, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')
GUIDED = ['sccan+pfe', 'sccan+asc', 'sccan+pfe+asc', 'hdmnet+pfe', 'hdmnet+asc', 'pahnet']

# ---- neutral -------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize('base', ['sccan', 'hdmnet'])
def test_both_at_zero_are_the_base(base):
    e = episode(2)
    assert torch.equal(segmenter(base)(e).scores, segmenter(f'{base}+pfe+asc', dict(pfe_strength=0., asc_strength=0.))(e).scores)

@torch.no_grad()
@pytest.mark.parametrize('side', ['query', 'support'])
def test_an_empty_prediction_tells_nothing(side):
    torch.manual_seed(0)
    net, a = Enhancement(16), Attention(0, torch.randn(2, 12, 16), torch.randn(2, 12, 16), torch.rand(2, 12).round(), (3, 4), torch.zeros(2, 12))
    read = []
    getattr(net, f'mix_{side}').second.register_forward_hook(lambda m, i, o: read.append(i[0][:, 0, 16:]))
    own = pool(net.q(net.norm1(a.support)), a.fg)
    net(a)
    net(dataclasses.replace(a, guide=torch.rand(2, 12)))
    assert torch.allclose(read[0], own/2, atol=1e-6) and not torch.allclose(read[1], own/2, atol=1e-2)      # half the support's prototype and nothing else

@torch.no_grad()
@pytest.mark.parametrize('share', [0., .5, 1.])
@pytest.mark.parametrize('recipe', GUIDED)
def test_any_prediction_of_the_guide_is_fine(recipe, share):
    seg, e = segmenter(recipe), episode(2)
    match = dataclasses.replace(seg.match(e), guide=torch.full((2, 64, 64), share))
    assert seg.compare(match)['scores'].isfinite().all()

@torch.no_grad()
def test_fused_attention_is_the_plain_form():
    torch.manual_seed(0)
    attention = WindowAttention(32, 4)
    q, s = torch.randn(2, 2, 5, 16, 32)
    assert torch.allclose(attention.cross(q, s), attention.cross(q, s, torch.ones(2, 5, 4, 16, 16)), atol=1e-6)
    same = torch.rand(2, 5, 16, 16) > .3
    same |= torch.eye(16, dtype=torch.bool)
    a, (k, v) = attention.split(attention.q(q)), map(attention.split, attention.kv(q).chunk(2, -1))
    plain = ((a @ k.mT)/math.sqrt(8)).masked_fill(~same[:, :, None], -math.inf).softmax(-1) @ v
    assert torch.allclose(attention(q, same), attention.merge(plain), atol=1e-6)

# ---- stored features -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('recipe', ['sccan', 'hdmnet', 'pahnet'])
def test_stored_features_change_no_loss(recipe):
    seg, e = segmenter(recipe).train(), episode(2, 2)
    stored = seg.encode(torch.cat([e.query, e.support.flatten(0, 1)]), queries=2)
    def terms(stages):
        torch.manual_seed(0)                                                                       # of the dropout
        return seg.loss(e, stages)
    a, b = terms(None), terms(stored)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    kept = lasting_features(seg, object.__new__(ImageStore), ()) if recipe == 'hdmnet' else ...
    assert (kept is None) == (recipe == 'hdmnet') == (not seg.shares_encoding)                     # HDMNet encodes its supports under their masks

# ---- bad input -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('recipe,values,reason', [
    ('sccan', dict(sccan_grid=20), 'sccan_grid=20: expected a multiple of sccan_window=8'), ('sccan', dict(sccan_blocks=0), 'sccan_blocks=0: expected at least 1'),
    ('pahnet', dict(pfe_strength=2.), 'pfe_strength=2.0: expected at most 1'), ('pahnet', dict(asc_strength=-1.), 'asc_strength=-1.0: expected at least 0'),
    ('pahnet', dict(hdmnet_predictor='nowhere.pth'), 'nowhere.pth'), ('ssp+pfe', {}, "'pfe' acts in attention blocks, and 'ssp' has none; bases that do: hdmnet, sccan")])
def test_impossible_settings(recipe, values, reason):
    with pytest.raises(InputError) as e: build(recipe, backbone(last_stage='last'), values)
    assert reason in str(e.value) and '\n' not in str(e.value)

def test_a_backbone_that_is_cut_short():
    with pytest.raises(InputError, match='sccan: it reads the last three stages.*set last_stage=last'): build('sccan', backbone(last_stage='stage2'))

@pytest.mark.parametrize('name', ['sccan', 'hdmnet', 'sccan+pfe+asc', 'hdmnet+pfe+asc'])
def test_a_checkpoint_of_something_else(name):
    with pytest.raises(InputError, match='official checkpoint: layer3 has 0 blocks'): from_official(name, {'head.weight': torch.zeros(2)})

# ---- three predictors ----------------------------------------------------------------------------------------------------------
def test_its_own_predictor_is_diagnosed():
    assert segmenter('hdmnet').predicts is None and segmenter('pahnet').predicts.options.refine is False

# ---- memory --------------------------------------------------------------------------------------------------------------------
def peak(recipe, size, batch):
    "GiB of a training step at ResNet-50: weights, optimizer state, the inputs, and every tensor kept for the backward pass, without computing anything."
    kept, seen = 0, set()
    def pack(t):
        nonlocal kept
        storage = t.untyped_storage()
        if id(storage) not in seen:
            seen.add(id(storage)); held.append(storage); kept += storage.nbytes()
        return t
    held = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        seg = build(recipe, create_backbone(BackboneOptions(backbone='resnet50', weights='none', last_stage='last', output_stride=8, freeze='all', last_relu=True)))
        for p in seg.parameters(): seen.add(id(p.untyped_storage())); held.append(p.untyped_storage())
        m = torch.zeros(batch, size, size, dtype=torch.bool)
        e = Episode(query=torch.zeros(batch, 3, size, size), support=torch.zeros(batch, 1, 3, size, size), support_masks=m[:, None], query_mask=m)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): sum(seg.train().loss(e).values())
        trained = sum(p.numel() for p in seg.parameters() if p.requires_grad)
        weights = 4*(sum(p.numel() for p in seg.parameters()) + 3*trained)
        return (weights + kept)/2**30

@pytest.mark.parametrize('recipe', ['sccan', 'hdmnet', 'sccan+pfe+asc', 'pahnet'])
def test_a_step_at_473_px_fits(recipe, capsys):
    found = peak(recipe, 473, 4)
    with capsys.disabled(): print(f'\n{recipe}: {found:.1f} GiB kept in a step of 4 episodes at 473 px')
    assert .1 < found < 24
