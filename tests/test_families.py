"Every family of backbones behind one interface: stages and blocks are timm's own, restarts are exact, files load or are refused, every recipe and diagnostic works."
from dataclasses import replace
from importlib import import_module
import numpy as np
import pytest, timm, torch
from cdfss.basics import InputError
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.diagnostics import activations, cka, frequency, sharpness
from cdfss.engine.adapt import tune
from cdfss.engine.evaluate import evaluate
from cdfss.engine.metrics import class_miou
from cdfss.methods.seams import build
from cdfss.models.backbones import Backbone, BackboneOptions, Row, Upsampler, backbone_of, create_backbone, image_size, is_vit, split_stages, usual_depth
from episodes import episode
from families import FAMILIES, PLAIN, tiny, tiny_net

pytestmark = pytest.mark.usefixtures('one_thread')
VITS = [n for n in FAMILIES if is_vit(n)]
ROWS = [n for n in FAMILIES if n not in VITS]

# ---- stages -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_stages_are_maps_and_restarts_are_exact(name):
    net, x = tiny(name), torch.randn(2, 3, 64, 96)
    whole = net(x, blocks=net.outputs)
    assert [n for n in whole if n in net.names] == list(net.names) and {*whole} == {*net.outputs}
    assert {n: whole[n].shape[1] for n in net.names} == net.channels()
    assert all(f.ndim == 4 and f.shape[0] == 2 and f.shape[-1] > f.shape[-2] and f.isfinite().all() for f in whole.values())
    assert round(96/whole[net.names[-1]].shape[-1]) in (7, 8)                                        # output_stride 8, by dilation or by the up-sampler
    for i, start in enumerate(net.names):
        rest = net(whole[start], start=start, blocks=net.outputs)
        assert all(torch.equal(rest[n], whole[n]) for n in rest) and {*net.names[i:]} <= {*rest}
    changed = net(x, after=lambda n, t: t + torch.randn_like(t) if n == 'stem' else t)
    assert not torch.allclose(changed[net.names[-1]], whole[net.names[-1]], atol=1e-3)

@pytest.mark.parametrize('name', VITS)
@torch.no_grad()
def test_a_vit_s_maps_are_timm_s_own(name):
    net, x = tiny_net(name), torch.randn(2, 3, *[FAMILIES[name]['img_size']]*2)
    want = net.forward_intermediates(x, intermediates_only=True)
    last = net.forward_features(x)[:, net.num_prefix_tokens:]
    ours = backbone_of(net, BackboneOptions(backbone=f"{name}:3", weights='none', output_stride=16)).eval()
    got = ours(x, blocks=ours.outputs)
    assert ours.names == ('stem', 'stage1') and ours.blocks['stage1'] == ('stage1.0', 'stage1.1', 'stage1.2')
    for i, w in enumerate(want): torch.testing.assert_close(got[f'stage1.{i}'], w, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got['stage1'].flatten(2).mT, last, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('name', VITS)
@torch.no_grad()
def test_positions_matter_at_every_size_and_prefix_tokens_stay_inside(name):
    net = tiny(name, output_stride=16)
    x = torch.randn(1, 3, 56, 90)                                                                     # no multiple of 14 or 16
    out = net(x)['stage1']
    patch = net.stages['stem'].patch_embed.proj.stride[0]
    assert out.shape[-2:] == (-(-56 // patch), -(-90 // patch))
    assert not torch.allclose(net(x.flip(-1))['stage1'].flip(-1), out, atol=1e-2)
    tokens = [n for n, p in net.stages['stage1'].named_parameters() if n.endswith('_token')]
    for n in tokens:                                                                                  # they act, though no map shows them
        p = net.stages['stage1'].get_parameter(n)
        was = p.detach().clone()
        p += torch.randn_like(p)
        assert not torch.allclose(net(x)['stage1'], out, atol=1e-3), n
        p.copy_(was)
    assert ('dist_token' in tokens) == ('distilled' in name) and ('reg_token' in tokens) == ('reg4' in name or 'dinov3' in name)

@pytest.mark.parametrize('name', ROWS)
@torch.no_grad()
def test_a_row_s_maps_are_timm_s_own(name):
    net, x = tiny_net(name), torch.randn(2, 3, 64, 96)
    want = net.forward_intermediates(x, intermediates_only=True)
    ours = backbone_of(net, BackboneOptions(backbone=name, weights='none', output_stride=32, last_stage='last')).eval()
    got = ours(x, blocks=ours.outputs)
    assert ours.names == ('stem', 'stage1', 'stage2', 'stage3', 'stage4')
    for s, w in zip(ours.names[::-1], want[::-1]): torch.testing.assert_close(got[s], w, atol=1e-5, rtol=1e-4)
    if name.startswith('regnet'): return                                                              # its blocks have names of their own
    assert [len(ours.blocks[s]) for s in ours.names] == [1, 1, 1, 2, 1]
    for s in ours.names[1:]: assert torch.equal(got[ours.blocks[s][-1]], got[s])                      # the last block's output is the stage's
    assert ours(torch.randn(1, 3, 50, 70))['stage4'].isfinite().all()                                 # sizes that do not divide

def test_a_net_that_is_no_row_is_refused():
    class More(timm.models.convnext.ConvNeXt):
        "Does more than its stages in a row."
        def forward_intermediates(self, x, **kw): return [2*f for f in super().forward_intermediates(x, **kw)]
    with pytest.raises(InputError, match='More has no stages'): split_stages(More(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4)))
    before = torch.random.get_rng_state()
    net = timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 8, 8, 8))
    drawn = torch.random.get_rng_state()
    split_stages(net.train())
    assert torch.equal(drawn, torch.random.get_rng_state()) and net.training and not torch.equal(before, drawn)   # the trial draws nothing and leaves the mode

@pytest.mark.parametrize('stride,last,want', [(8, 'stage3', ('stage3', 'up', 8)), (16, 'stage3', ('stage2', 'stage3', 16)), (8, 'stage2', ('stage1', 'stage2', 8)), (32, 'last', ('stage3', 'stage4', 32)), (16, 'last', ('stage4', 'up', 16))])
@torch.no_grad()
def test_a_swin_is_up_sampled_where_it_is_too_coarse(stride, last, want):
    net = tiny('swin_tiny_patch4_window7_224', output_stride=stride, last_stage=last)
    assert net.names[-2:] == want[:2] and net(torch.randn(1, 3, 64, 64))[want[1]].shape[-1] == 64//want[2]
    assert isinstance(net.stages[want[1]], Upsampler) == (want[1] == 'up')

def test_depth_and_size_follow_the_family():
    assert [usual_depth(n, 12) for n in ('vit_base_patch16_384', 'deit_base_patch16_224', 'vit_small_patch14_dinov2.lvd142m', 'vit_small_patch16_dinov3.lvd1689m')] == [10, 11, 12, 12]
    sizes = {n: image_size(n, 400) for n in ('vit_base_patch16_384', 'vit_base_patch16_384:12@480', 'deit_base_patch16_224', 'vit_small_patch14_dinov2.lvd142m', 'swin_tiny_patch4_window7_224', 'convnext_tiny', 'miniature', 'nothing')}
    assert list(sizes.values()) == [400, 480, 400, 518, 400, 400, 400, 400]
    assert [image_size(n, 96, own=False) for n in ('vit_small_patch14_dinov2.lvd142m', 'vit_base_patch16_384', 'resnet50')] == [98, 96, 96]

def test_pixels_are_the_family_s():
    norms = {n: tiny(n).mean for n in ('vit_base_patch16_384', 'deit_base_patch16_224', 'vit_small_patch16_dinov3.lvd1689m', 'swin_tiny_patch4_window7_224')}
    assert [round(m[0], 3) for m in norms.values()] == [.5, .485, .485, .485]
    assert all(tiny(n).mean == timm.get_pretrained_cfg(n).mean and tiny(n).std == timm.get_pretrained_cfg(n).std for n in FAMILIES)

@pytest.mark.parametrize('o,reason', [
    (dict(backbone='vit_small_patch14_dinov2:13'), 'has 12 blocks'), (dict(backbone='vit_small_patch14_dinov2@400'), 'no multiple of the patch of 14'),
    (dict(backbone='swin_tiny_patch4_window7_224', last_stage='last'), 'its cells are 32 px, so output_stride is 32, or 16 by the up-sampler'),
    (dict(backbone='vit_small_patch16_dinov3', output_stride=32), 'output_stride is 16, or 8'), (dict(backbone='convnext_tiny', last_stage='stage9'), "unknown last_stage 'stage9'"),
    (dict(backbone='vit_small_patch14_dinov2.lvd142mm', weights='hub'), 'could not fetch'), (dict(backbone='vit_base_patch16_dinov4'), 'did you mean')])
def test_impossible_families(o, reason, monkeypatch):
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=False, **kw: (_ for _ in ()).throw(RuntimeError('no net')) if pretrained else tiny_net(next(n for n in FAMILIES if n.startswith(name)), **({'depth': 12} if 'patch1' in name else {})))
    with pytest.raises(InputError, match=reason) as e: create_backbone(BackboneOptions(**dict(weights='none') | o))
    assert '\n' not in str(e.value)

# ---- files ------------------------------------------------------------------------------------------------------------------
def facebook_convnext(state):
    "timm's names as ConvNeXt's authors have them."
    import re
    out = {}
    for k, v in state.items():
        k = re.sub(r'^stem\.', 'downsample_layers.0.', k)
        k = re.sub(r'^stages\.(\d)\.downsample\.', r'downsample_layers.\1.', k)
        k = re.sub(r'^stages\.(\d)\.blocks\.', r'stages.\1.', k)
        out[k.replace('conv_dw', 'dwconv').replace('mlp.fc', 'pwconv').replace('head.norm', 'norm').replace('head.fc.', 'head.')] = v
    return out

def microsoft_swin(state):
    "timm's names as Swin's authors have them: a stage ends with its reduction; masks and indices lie in the file."
    import re
    out = {re.sub(r'layers\.(\d)\.downsample', lambda m: f'layers.{int(m[1]) - 1}.downsample', k).replace('head.fc.', 'head.'): v for k, v in state.items()}
    return out | {'layers.0.blocks.0.attn.relative_position_index': torch.zeros(49, 49, dtype=torch.long), 'layers.0.blocks.1.attn_mask': torch.zeros(64, 49, 49)}

def meta_dinov2(state):
    "timm's names as DINOv2's release with registers has them: the class token's place lies apart from it."
    out = {k.replace('reg_token', 'register_tokens'): v for k, v in state.items()}
    first = torch.randn(1, 1, 32)
    return out | {'cls_token': state['cls_token'] - first, 'pos_embed': torch.cat([first, state['pos_embed']], 1), 'mask_token': torch.zeros(1, 32)}

def meta_dinov3(state):
    "timm's names as DINOv3's release has them."
    out = {k.replace('reg_token', 'storage_tokens').replace('gamma_', 'ls').replace('ls1', 'ls1.gamma').replace('ls2', 'ls2.gamma'): v for k, v in state.items()}
    return out | {'mask_token': torch.zeros(1, 32), 'rope_embed.periods': torch.zeros(4), **{f'blocks.{i}.attn.qkv.bias_mask': torch.ones(96) for i in range(3)}, **{f'blocks.{i}.attn.qkv.bias': torch.zeros(96) for i in range(3)}}

AUTHORS = {'convnext_tiny': facebook_convnext, 'swin_tiny_patch4_window7_224': microsoft_swin, 'vit_small_patch14_reg4_dinov2.lvd142m': meta_dinov2, 'vit_small_patch16_dinov3.lvd1689m': meta_dinov3}

@pytest.mark.parametrize('name', PLAIN + ['vit_small_patch14_reg4_dinov2.lvd142m', 'swinv2_tiny_window8_256'])
@torch.no_grad()
def test_files_of_timm_and_of_the_authors(name, tmp_path):
    theirs, x = tiny_net(name, seed=4, num_classes=5, **(dict(output_stride=8) if name == 'convnext_tiny' else {})), torch.randn(1, 3, 64, 64)
    state, o = theirs.state_dict(), BackboneOptions(backbone=name, weights='none')
    whole = backbone_of(theirs, o).eval()
    want = whole(x)
    for n, made in enumerate([lambda s: s, AUTHORS.get(name, lambda s: {f'module.{k}': v for k, v in s.items()})]):
        torch.save({'model': made(dict(state))}, tmp_path/f'{n}.pth')
        got = tiny(name, seed=5, weights=str(tmp_path/f'{n}.pth'))
        for s in got.names[:-1 if isinstance(got.stages[got.names[-1]], Upsampler) else None]: torch.testing.assert_close(got(x)[s], want[s], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(tiny(name, seed=5)(x)['stem'], want['stem'], atol=1e-3)
    key = next(k for k in state if 'blocks.0' in k and k.endswith('norm.weight' if 'convnext' in name else 'norm1.weight'))
    torch.save({k: v for k, v in state.items() if k != key}, tmp_path/'less.pth')
    with pytest.raises(InputError, match=f"no tensor '{key}'"): tiny(name, weights=str(tmp_path/'less.pth'))
    torch.save({k: v for k, v in state.items()} | {key: torch.ones(7)}, tmp_path/'other.pth')
    with pytest.raises(InputError, match=rf"'{key}' has shape \(7,\), expected \(\d+,\)"): tiny(name, weights=str(tmp_path/'other.pth'))

def test_a_file_of_another_family_is_refused(tmp_path):
    for n in PLAIN: torch.save(tiny_net(n).state_dict(), tmp_path/f'{n}.pth')
    for n in PLAIN:
        for other in (PLAIN[(PLAIN.index(n) + i) % len(PLAIN)] for i in (1, 3)):
            if {'vit_base_patch16_384', 'deit_base_patch16_224'} >= {n, other}: continue               # one architecture under two names
            with pytest.raises(InputError, match="another architecture") as e: tiny(n, weights=str(tmp_path/f'{other}.pth'))
            assert '\n' not in str(e.value) and ('tensor' in str(e.value) or 'shape' in str(e.value))
    (tmp_path/'w.npz').write_bytes(b'')
    with pytest.raises(InputError, match='an .npz holds a plain ViT, not a Swin'): tiny('swin_tiny_patch4_window7_224', weights=str(tmp_path/'w.npz'))

@pytest.mark.parametrize('kind', ['convnext', 'swin'])
@torch.no_grad()
def test_torchvision_s_files(kind, tmp_path):
    from torchvision.models import convnext, swin_transformer
    torch.manual_seed(6)
    if kind == 'convnext':
        dims = (8, 16, 32, 64)
        theirs = convnext.ConvNeXt([convnext.CNBlockConfig(i, o, n) for i, o, n in zip(dims, (*dims[1:], None), (1, 1, 2, 1))], layer_scale=.5).eval()
        name, kw = 'convnext_tiny', dict(output_stride=32)
    else: theirs, name, kw = swin_transformer.SwinTransformer([4, 4], 8, [1, 1, 2, 1], [1, 2, 4, 8], [7, 7]).eval(), 'swin_tiny_patch4_window7_224', dict(img_size=224)
    torch.save(theirs.state_dict(), tmp_path/'w.pth')
    net = backbone_of(tiny_net(name, **kw), BackboneOptions(backbone=name, weights=str(tmp_path/'w.pth'), last_stage='last', output_stride=32)).eval()
    x = torch.randn(1, 3, 224, 224)
    want = theirs.features(x)
    torch.testing.assert_close(net(x)['stage4'], want if kind == 'convnext' else want.movedim(-1, 1), atol=1e-4, rtol=1e-4)

# ---- recipes and diagnostics ------------------------------------------------------------------------------------------------
MODULES_OF_ALL = ['prototype', 'ssp+lem+lcm', 'hsl', 'ssp+apm_m+acpa', 'ssp+apm_s']

@pytest.mark.parametrize('recipe', MODULES_OF_ALL)
@pytest.mark.parametrize('name', PLAIN)
def test_recipes_work_on_every_family(name, recipe):
    seg, e = build(recipe, tiny(name)), episode(2, size=64)
    with torch.no_grad(): p = seg.eval()(e)
    assert p.scores.shape == (2, 2, 64, 64) and p.scores.isfinite().all()
    sum(seg.train().loss(e).values()).backward()
    kept = dict(seg.backbone.named_parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in kept.values() if p.requires_grad)
    assert all(p.grad is None for n, p in kept.items() if n.split('.')[1] in seg.backbone.frozen)
    if 'apm' in recipe:
        values, losses = tune(seg, e, replace(seg.tuning, steps=2))
        assert losses.isfinite().all() and len(values) == len(seg.adaptable()) > 0

@pytest.mark.parametrize('recipe', ['hsnet', 'patnet', 'lfm'])
@pytest.mark.parametrize('name', ['convnext_tiny', 'swin_tiny_patch4_window7_224'])
def test_blocks_of_hierarchical_nets_are_compared(name, recipe):
    net = tiny(name, output_stride=32, last_stage='last', freeze='all')
    seg = build(recipe, net).eval()
    assert seg.reads == ('stage2.0', 'stage3.0', 'stage3.1', 'stage4.0')
    with torch.no_grad(): assert seg(episode(1, size=128)).scores.isfinite().all()

@pytest.mark.parametrize('name', [n for n in PLAIN if is_vit(n)])
def test_hsnet_says_what_it_wants_of_a_vit(name):
    with pytest.raises(InputError, match='hsnet: it compares three levels') as e: build('hsnet', tiny(name))
    assert '\n' not in str(e.value)

@pytest.fixture(scope='module')
def domains(miniature):
    data = {n: open_dataset(n, miniature) for n in ('isic', 'chest')}
    return [(ImageStore(d, 48), draw('balanced', d, 1, episodes=3)) for d in data.values()]

@pytest.mark.parametrize('name', [PLAIN[0], 'vit_small_patch16_dinov3.lvd1689m', 'convnext_tiny', 'swin_tiny_patch4_window7_224'])
def test_diagnostics_of_stages_work_on_every_family(name, domains):
    seg, (source, target) = build('ssp+lcm', tiny(name)).eval(), domains
    assert {*activations.activations({'m': seg}, {'chest': target})['stage']} == {*seg.backbone.names}
    found = cka.cka(seg, *target, layers=seg.backbone.outputs)
    assert {*found['a']} == {*seg.backbone.outputs} and (found.query('a == b').cka - 1).abs().max() < 1e-3
    for kind in ('feature', 'weight', 'sam'):
        frame = sharpness.disturbed(seg, *target, kind, strengths=(0., .2), draws=1)
        assert {*frame['stage']} == {'', *seg.backbone.names} and frame['loss'].notna().all()
        clean = frame[frame.stage == ''].loss.to_numpy()
        for stage in seg.backbone.names:
            of = lambda r: frame[(frame.stage == stage) & (frame.strength == r)].loss.to_numpy()
            np.testing.assert_allclose(of(0.), clean, atol=1e-4)
            assert np.abs(of(.2) - clean).max() > 1e-5, (kind, stage)

@pytest.mark.parametrize('study,few', [('errors', dict(draws=20)), ('granularity', dict(scales=(5,))), ('calibration', dict(draws=20, ks=(1,), ws=(.6,), betas=(.7,), patches=(1,)))])
def test_the_other_diagnostics_work_on_tokens(study, few, domains):
    seg, (source, target) = build('ssp+lcm', tiny('vit_small_patch16_dinov3.lvd1689m')).eval(), domains
    frames = import_module(f'cdfss.diagnostics.{study}').study(seg, source, {'chest': target}, episodes=3, **few)
    assert frames and all(len(f) for f in frames.values())

@pytest.mark.parametrize('name', ['vit_small_patch16_dinov3.lvd1689m', 'swin_tiny_patch4_window7_224'])
def test_frequencies_of_every_family(name, domains):
    frame = frequency.filtered_episodes(build('ssp', tiny(name)).eval(), *domains[1], levels=('feature',), cutoffs=(.25,))
    assert frame['amplitude'].nunique() > 1 and len(frame) > 3

# ---- real weights, where they lie beside the checkout -------------------------------------------------------------------------
@pytest.mark.parametrize('name,file,o,reads,least', [('resnet18', 'resnet18_in1k_to_layer3', {}, 'stage3', 55), ('mobilenetv2_100', 'mobilenetv2_100_in1k_1001', dict(pixels='half', last_stage='stage4'), 'stage4', 45)])
def test_real_weights_tell_lungs_from_the_rest(real_data, name, file, o, reads, least):
    "SSP without any training: 69 on 150 episodes with ResNet-18 by the note beside the weights; random weights do not come near."
    data = open_dataset('chest', real_data)
    episodes = draw('balanced', data, 1, episodes=4)
    store = ImageStore(data, 224)
    seg = build('ssp', create_backbone(BackboneOptions(backbone=name, weights=str(real_data/'weights'/f'{file}.safetensors'), **o))).eval()
    assert seg.reads == (reads,)
    assert class_miou(evaluate({'m': seg}, store, episodes, epoch=0)) > least

@pytest.mark.parametrize('name,freeze,still', [(PLAIN[0], 'stem+stage1.0', ['stem.', 'stage1.blocks.0.']), ('vit_small_patch16_dinov3.lvd1689m', 'stage1.0-1', ['stage1.blocks.0.', 'stage1.blocks.1.']),
                                               ('convnext_tiny', 'stem+stage3.0', ['stem.', 'stage3.stages_2.blocks.0.']), ('swin_tiny_patch4_window7_224', 'stage1+stage3.1', ['stage1.', 'stage3.layers_2.blocks.1.'])])
def test_blocks_freeze_one_by_one(name, freeze, still):
    net = tiny(name, freeze=freeze).train()
    frozen = {n.removeprefix('stages.') for n, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {n.removeprefix('stages.') for n, _ in net.named_parameters() if n.removeprefix('stages.').startswith(tuple(still))} and len(frozen) > 3
    assert not any(net.part(n).training for n in net.frozen) and net.part(net.names[1]).training == (net.names[1] not in net.frozen)
    with pytest.raises(InputError, match="unknown stage in freeze 'stage1.9'"): tiny(name, freeze='stage1.9')
