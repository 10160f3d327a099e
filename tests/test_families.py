"Every family of backbones behind one interface: stages and blocks are timm's own, restarts are exact, files load or are refused, every recipe and diagnostic works."
import pytest, timm, torch
from cdfss.basics import InputError
from cdfss.models.backbones import Backbone, BackboneOptions, Row, Upsampler, backbone_of, create_backbone, image_size, is_vit, split_stages, usual_depth
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
