"ViTs behind the interface of stages: maps, restarts, reads, weights from files of three kinds, and every recipe on one."
import numpy as np
import pytest, timm, torch
from safetensors.torch import save_file
from torchvision.models import VisionTransformer as Torchvision
from cdfss.basics import InputError
from cdfss.engine.train import EvaluateSettings, evaluation, segmenter_of
from cdfss.methods.seams import build, parse_recipe
from cdfss.models.backbones import BackboneOptions, Transformer, create_backbone, is_vit, load_state, published_state, resolve_backbone, split_stages, vit_name, vit_state
from episodes import RECIPES, episode

pytestmark = pytest.mark.usefixtures('one_thread')
TINY = 'vit_tiny_patch16_224'
RECIPES_OF_SSP = [r for r in RECIPES if parse_recipe(r).base in ('prototype', 'ssp', 'ifa')]

def make(name=f'{TINY}:2', **o):
    torch.manual_seed(0)
    return create_backbone(BackboneOptions(backbone=name, **dict(weights='none') | o)).eval()

def plain(depth=3, **kw):
    torch.manual_seed(1)
    return timm.models.VisionTransformer(img_size=48, embed_dim=48, depth=depth, num_heads=3, num_classes=0, **kw).eval()

@torch.no_grad()
def test_stages_are_maps_and_restarts_are_exact():
    net, x = make(), torch.randn(2, 3, 49, 64)
    whole = net(x)
    assert {n: tuple(f.shape[1:]) for n, f in whole.items()} == dict(stem=(192, 4, 4), stage1=(192, 4, 4), stage2=(192, 8, 8)) and net.channels() == dict.fromkeys(net.names, 192)
    for i, start in enumerate(net.names):
        rest = net(whole[start], start=start)
        assert tuple(rest) == net.names[i:] and all(torch.equal(rest[n], whole[n]) for n in rest)
    read = net(x, blocks=net.outputs)
    assert tuple(n for n in read if '.' in n) == ('stage1.0', 'stage1.1') and torch.equal(net.stages['stage1'].norm(read['stage1.1'].movedim(1, -1)).movedim(-1, 1), whole['stage1'])

@pytest.mark.parametrize('kind', [dict(), dict(reg_tokens=2), dict(no_embed_class=True), dict(reg_tokens=4, no_embed_class=True), dict(class_token=False, global_pool='avg', fc_norm=False), dict(pre_norm=True)],
                         ids=['class token', 'registers', 'token without a place', 'registers without places', 'no token', 'norm before'])
@torch.no_grad()
def test_a_vit_is_timm_s_own(kind):
    vit, x = plain(**kind), torch.randn(2, 3, 48, 48)
    stages = split_stages(vit, 3)
    want, prefix = vit.forward_features(x), vit.num_prefix_tokens
    assert torch.allclose(stages['stage1'](stages['stem'](x)).flatten(2).mT, want[:, prefix:], atol=1e-5)
    assert len(split_stages(vit)['stage1'].blocks) == 1                                       # all but two

@torch.no_grad()
def test_positions_follow_the_image():
    vit = plain()
    at = Transformer(vit, 3)
    wide = timm.models.VisionTransformer(img_size=(32, 80), embed_dim=48, depth=3, num_heads=3, num_classes=0).eval()
    wide.load_state_dict(vit_state(wide, vit.state_dict()))
    x = torch.randn(1, 3, 32, 80)
    assert torch.allclose(at(split_stages(wide)['stem'](x)).flatten(2).mT, wide.forward_features(x)[:, 1:], atol=1e-5)
    moved = x.flip(-1)
    assert not torch.allclose(at(split_stages(wide)['stem'](moved)).flip(-1), at(split_stages(wide)['stem'](x)), atol=1e-2)          # places matter

@pytest.mark.parametrize('name,parts', [('a', ('a', None, None)), ('a:3', ('a', 3, None)), ('a@480', ('a', None, 480)), ('a:3@480', ('a', 3, 480)), ('a:x', ('a:x', None, None)), ('a.b_c', ('a.b_c', None, None))])
def test_names(name, parts): assert vit_name(name) == parts

def test_what_is_a_vit():
    assert is_vit('vit_base_patch16_384') and is_vit('vit_base_patch16_384:12@480') and not any(map(is_vit, ('resnet50', 'miniature', 'nothing', 'swin_tiny_patch4_window7_224')))
    o = resolve_backbone(BackboneOptions(backbone='vit_base_patch16_384'))
    assert (o.last_stage, o.freeze, o.weights) == ('last', 'none', 'hub')
    assert make(f'{TINY}@64').stages['stage1'].pos_embed.shape[1] == 17 and len(make(TINY).stages['stage1'].blocks) == 10

@pytest.mark.parametrize('o,reason', [
    (dict(name=f'{TINY}:13'), 'has 12 blocks'), (dict(name=f'{TINY}:0'), 'has 12 blocks'), (dict(name=f'{TINY}@50'), 'no multiple of the patch of 16'), (dict(output_stride=32), 'output_stride is 16, or 8'),
    (dict(name='vit_tiny_patch16_224x'), 'unknown backbone'), (dict(last_stage='stage9'), "unknown last_stage 'stage9'"), (dict(freeze='stage3'), "unknown stage in freeze 'stage3'")])
def test_impossible_vits(o, reason):
    with pytest.raises(InputError, match=reason) as e: make(**o)
    assert '\n' not in str(e.value)

# ---- weights ----------------------------------------------------------------------------------------------------------------
def same(net, state):
    own = {k.split('.', 2)[2]: v for k, v in net.state_dict().items() if not k.startswith('stages.stage2')}
    return all(torch.equal(own[k], state[k]) for k in own)

@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_timm_s_files(tmp_path, suffix):
    torch.manual_seed(5)
    state = timm.create_model(TINY).state_dict()
    torch.save(state, tmp_path/'w.pth'), save_file(state, tmp_path/'w.safetensors')
    net = make(weights=str(tmp_path/f'w{suffix}'))
    assert same(net, state) and not same(make(), state)
    other = make(f'{TINY}:2@96', weights=str(tmp_path/f'w{suffix}'))                            # positions of another size
    assert other.stages['stage1'].pos_embed.shape[1] == 37 and torch.equal(other.stages['stage1'].blocks[1].mlp.fc1.weight, state['blocks.1.mlp.fc1.weight'])
    del state['blocks.1.norm1.weight']
    torch.save(state, tmp_path/'less.pth')
    with pytest.raises(InputError, match="no tensor 'blocks.1.norm1.weight'"): make(weights=str(tmp_path/'less.pth'))
    torch.save(timm.create_model('vit_small_patch16_224', depth=1).state_dict(), tmp_path/'small.pth')
    with pytest.raises(InputError, match='another architecture'): make(weights=str(tmp_path/'small.pth'))

@torch.no_grad()
def test_torchvision_s_files():
    torch.manual_seed(6)
    theirs = Torchvision(image_size=48, patch_size=16, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=192, num_classes=7).eval()
    vit = plain()
    stages = split_stages(vit, 3)
    state = vit_state(vit, published_state(vit, theirs.state_dict()))
    load_state(vit, state, torch.nn.ModuleDict(stages))
    x = torch.randn(2, 3, 48, 48)
    tokens = theirs.encoder(torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(x)], 1))
    assert torch.allclose(stages['stage1'](stages['stem'](x)).flatten(2).mT, tokens[:, 1:], atol=1e-5)

def augreg(net) -> dict[str, np.ndarray]:
    "A timm ViT's tensors as the npz of the augreg release has them."
    s, heads = {k: v.numpy() for k, v in net.state_dict().items()}, net.blocks[0].attn.num_heads
    out = {'embedding/kernel': s['patch_embed.proj.weight'].transpose(2, 3, 1, 0), 'embedding/bias': s['patch_embed.proj.bias'], 'cls': s['cls_token'],
           'Transformer/posembed_input/pos_embedding': s['pos_embed'], 'Transformer/encoder_norm/scale': s['norm.weight'], 'Transformer/encoder_norm/bias': s['norm.bias'],
           'head/kernel': s['head.weight'].T, 'head/bias': s['head.bias']}
    for i in range(len(net.blocks)):
        at, b = f'Transformer/encoderblock_{i}/', {k.removeprefix(f'blocks.{i}.'): v for k, v in s.items() if k.startswith(f'blocks.{i}.')}
        for n, (w, bias) in zip(('query', 'key', 'value'), zip(np.split(b['attn.qkv.weight'], 3), np.split(b['attn.qkv.bias'], 3))):
            out[f'{at}MultiHeadDotProductAttention_1/{n}/kernel'], out[f'{at}MultiHeadDotProductAttention_1/{n}/bias'] = w.T.reshape(w.shape[1], heads, -1), bias.reshape(heads, -1)
        out |= {f'{at}MultiHeadDotProductAttention_1/out/kernel': b['attn.proj.weight'].T.reshape(heads, -1, w.shape[1]), f'{at}MultiHeadDotProductAttention_1/out/bias': b['attn.proj.bias']}
        for n, k in ((0, 'norm1'), (2, 'norm2')): out |= {f'{at}LayerNorm_{n}/scale': b[f'{k}.weight'], f'{at}LayerNorm_{n}/bias': b[f'{k}.bias']}
        for n, k in ((0, 'fc1'), (1, 'fc2')): out |= {f'{at}MlpBlock_3/Dense_{n}/kernel': b[f'mlp.{k}.weight'].T, f'{at}MlpBlock_3/Dense_{n}/bias': b[f'mlp.{k}.bias']}
    return out

def test_augreg_s_npz(tmp_path):
    torch.manual_seed(7)
    net = timm.create_model(TINY)
    arrays = augreg(net)
    np.savez(tmp_path/'w.npz', **arrays)
    assert same(make(weights=str(tmp_path/'w.npz')), net.state_dict())
    np.savez(tmp_path/'less.npz', **{k: v for k, v in arrays.items() if k != 'cls'})
    (tmp_path/'text.npz').write_text('no weights')
    for name in ('less', 'text'):
        with pytest.raises(InputError, match='not the .npz of') as e: make(weights=str(tmp_path/f'{name}.npz'))
        assert '\n' not in str(e.value)
    with pytest.raises(InputError, match='no such file'): make(weights=str(tmp_path/'absent.npz'))

# ---- recipes ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('recipe', RECIPES_OF_SSP)
def test_recipes_work_on_a_vit(recipe):
    seg, e = build(recipe, make()), episode(2, size=64)
    with torch.no_grad(): p = seg.eval()(e)
    assert p.scores.shape == (2, 2, 64, 64) and p.scores.isfinite().all()
    sum(seg.train().loss(e).values()).backward()
    quiet = [n for n, p in seg.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert not quiet

def test_hsl_s_checkpoint_is_evaluated(tmp_path):
    "A file under the names of the HSL release decides backbone and weights of `hsl` and of what shares its base."
    torch.manual_seed(8)
    hsl = build('hsl', make(f'{TINY}:2@64', pixels='imagenet'))
    theirs = lambda k: k.replace('backbone.stages.stem.', 'backbone.backbone.').replace('backbone.stages.stage1.', 'backbone.backbone.').replace('backbone.stages.stage2.', 'backbone.purifier.').replace('extras.1.layers.', 'attn_layer.')
    torch.save({theirs(k): v for k, v in hsl.state_dict().items()}, tmp_path/'hsl.pth')
    e = episode(1, size=64)
    for method in ('hsl', 'ssp', 'ssp+hsm+lcm'):
        seg = segmenter_of(evaluation(EvaluateSettings(method=method, checkpoint=str(tmp_path/'hsl.pth')))).eval()
        kept = build(method, hsl.backbone).eval()
        for m, n in zip(kept.extras, seg.extras):
            if hasattr(m, 'layers'): m.load_state_dict(hsl.extras[1].state_dict())
        with torch.no_grad(): assert torch.equal(kept(e).scores, seg(e).scores)
    assert seg.backbone.mean == (.485, .456, .406)
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path/'other.pth')
    with pytest.raises(InputError, match='layer3 has 0 blocks'): evaluation(EvaluateSettings(method='hsl', checkpoint=str(tmp_path/'other.pth')))

def test_noise_of_dsr_is_the_paper_s_for_the_backbone():
    of = lambda net, **v: build('ssp+dsr', net, v).extras[0].sigma
    small = create_backbone(BackboneOptions(weights='none'))
    assert (of(make()), of(small), of(make(), dsr_sigma=.2), of(small, dsr_sigma=.3)) == (.6, .1, .2, .3)
