"What is PAHNet's, SCCAN's and HDMNet's own beside the contract: neutral settings, bad input, the diagnosis of its three predictors, and memory at full size."
import dataclasses, math
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from cdfss.basics import InputError
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.engine import fit as fit_module
from cdfss.engine.evaluate import lasting_features
from cdfss.engine.fit import FitOptions, fit, optimizers_of
from cdfss.engine.train import TrainSettings, resolve
from cdfss.episode import Episode
from cdfss.methods.pahnet import Enhancement, Gate, Mixer, pool
from cdfss.methods.seams import build
from cdfss.models.affinity import Attention
from cdfss.models.backbones import BackboneOptions, create_backbone
from cdfss.models.importers import from_official
from cdfss.models.sccan import WindowAttention
from cdfss.models.segmenter import BASES
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
    getattr(net, f'mix_{side}').register_forward_hook(lambda m, i, o: read.append(i[1][1]))              # the prototype that the prediction made
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
def test_mixing_is_the_three_layers_one_after_the_other():
    torch.manual_seed(0)
    mix, x, p = Mixer(16), torch.randn(2, 12, 16), torch.randn(2, 2, 16)
    joined = [net(torch.cat([x, q[:, None].expand_as(x)], -1)) for net, q in zip((mix.first, mix.second), p)]
    assert torch.allclose(mix(x, list(p)), mix.final(torch.cat(joined, -1)), atol=1e-6)

@torch.no_grad()
@pytest.mark.parametrize('heads,bias', [(4, True), (1, False)])
def test_the_factor_is_the_product_of_two_linear_maps(heads, bias):
    torch.manual_seed(0)
    gate, guide, fg = Gate(32, heads, bias), torch.rand(2, 5, 16), torch.rand(2, 5, 16).round()
    split = lambda z: z.unflatten(-1, (heads, -1)).transpose(-2, -3)
    assert torch.allclose(gate.cross(guide, fg)[0], split(gate.query(guide[..., None])) @ split(gate.support(fg[..., None])).mT, atol=1e-6)

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

# ---- how the papers train them ------------------------------------------------------------------------------------------------
def rates(seg, **o):
    "Parameter name -> optimizer, learning rate, schedule and weight decay at the peak, as `fit` sets them."
    names = {id(p): n for n, p in seg.named_parameters()}
    o = FitOptions(optimizer='own', **o)
    return {names[id(p)]: (type(opt).__name__, round(o.lr*w.factor, 8), w.schedule or o.schedule, group['weight_decay'])
            for opt, ways in optimizers_of(seg, o) for group, w in zip(opt.param_groups, ways) for p in group['params']}

@pytest.mark.parametrize('recipe', ['sccan', 'sccan+pfe+asc', 'hdmnet', 'pahnet'])
def test_the_papers_optimizers(recipe):
    base = recipe.split('+')[0].replace('pahnet', 'hdmnet')
    seg = segmenter(recipe, {f'{base}_base': 4, f'{base}_shots': 5})
    o = {k: v for k, v in BASES[base].defaults('real').items() if k in ('lr', 'weight_decay', 'schedule')}
    found = rates(seg, **o)
    assert found.keys() == {n for n, p in seg.named_parameters() if p.requires_grad}
    attention, conv = ('blocks', 'norm', 'extras'), ('SGD', 5e-3, 'poly', 1e-4)
    for name, how in found.items():
        if base == 'sccan': want = ('AdamW', 6e-5, 'constant', 1e-2) if name.split('.')[0] in attention else conv
        elif name.startswith('merge.weigh.') and recipe == 'hdmnet': want = ('AdamW', 0., 'poly', 1e-2)
        else: want = ('AdamW', 1e-4 if name.split('.')[0] in ('hierarchy', 'extras') else 1e-3, 'poly', 1e-2)
        assert how == want, name
    assert len(set(found.values())) == 3 - (base == 'sccan') - (recipe == 'pahnet')

def test_own_groups_where_there_are_none():
    with pytest.raises(InputError, match='optimizer=own: this base'): optimizers_of(segmenter('ssp'), FitOptions(optimizer='own'))

@pytest.mark.parametrize('recipe', ['sccan', 'pahnet'])
def test_own_groups_train_and_resume(recipe, miniature, tmp_path, monkeypatch):
    "Stopped inside the second epoch and continued from the file, the weights are those of an uninterrupted run to the bit; the attention's rate follows its own schedule."
    store, o = ImageStore(open_dataset('voc', miniature, 'trn'), 48), FitOptions(epochs=2, fit_episodes=8, batch=4, optimizer='own', lr=5e-3, schedule='poly', weight_decay=1e-4)
    straight, broken = (segmenter(recipe) for _ in range(2))
    before = {n: p.clone() for n, p in straight.named_parameters()}
    list(fit(straight, store, o, seed=0))
    assert all(not torch.equal(p, before[n]) for n, p in straight.named_parameters() if p.requires_grad and p.grad is not None and p.grad.abs().sum() > 0)
    calls, real = [], fit_module.read_batch
    def read(*a, **kw):
        if len(calls) == 3: raise KeyboardInterrupt
        calls.append(1)
        return real(*a, **kw)
    monkeypatch.setattr(fit_module, 'read_batch', read)
    with pytest.raises(KeyboardInterrupt): list(fit(broken, store, o, seed=0, state_file=tmp_path/'s', save_every=0.))
    monkeypatch.undo()
    again = segmenter(recipe)
    rows = list(fit(again, store, o, seed=0, state_file=tmp_path/'s'))
    assert len(rows) == 2 and all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), again.state_dict().values()))

def test_real_data_follows_the_papers(tmp_path):
    real = dict(data_root=str(tmp_path), backbone='miniature')
    s, h, m, e = (resolve(TrainSettings(**kw)) for kw in (dict(method='sccan', **real), dict(method='pahnet', **real), dict(method='sccan'), dict(method='sccan', epochs=0, **real)))
    assert (s.method, s.augment_rule, s.optimizer, s.lr, s.weight_decay, s.batch, s.schedule) == ('sccan+augment', 'sccan', 'own', 5e-3, 1e-4, 8, 'poly') and resolve(s) == s
    assert (h.method, h.optimizer, h.lr, h.weight_decay, h.batch) == ('hdmnet+pfe+asc+augment', 'own', 1e-4, 1e-2, 4)
    assert (m.method, m.optimizer, m.augment) == ('sccan', 'adamw', 'none') and e.method == 'sccan'              # the miniature's own; nothing trains
    assert resolve(TrainSettings(method='sccan', augment='none', **real)).method == 'sccan' and resolve(TrainSettings(method='ssp+augment')).augment_rule == 'hsl'

# ---- the papers' other backbones -----------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize('name,stride', [('vgg16', 32), ('resnet101', 8)])
def test_other_backbones(name, stride):
    net = create_backbone(BackboneOptions(backbone=name, weights='none', last_stage='last', output_stride=stride, freeze='all', last_relu=True))
    e = episode(1, 1, 65)
    for recipe in ('sccan', 'hdmnet', 'pahnet'):
        seg = build(recipe, net, dict(sccan_blocks=2)).eval()
        scores = seg(e).scores
        assert seg.dim == 256 and scores.shape == (1, 2, 65, 65) and scores.isfinite().all()

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
