"Backbones: stages, freezing, batch norms, and weights files, good and hostile."
import collections, json, os, pickle
import pytest, timm, torch
from safetensors.torch import save_file
from parity_tools import official_state
from cdfss.basics import InputError
from cdfss.models.backbones import NETS, BackboneOptions, create_backbone, read_state
from cdfss.models.importers import from_official
from episodes import backbone, enliven, episode, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')
KINDS = ['miniature', 'resnet18', 'resnet50', 'resnet50_deepstem', 'mobilenetv2_100', 'efficientnet_b0']

def make(name='miniature', **o): return create_backbone(BackboneOptions(backbone=name, **dict(weights='none') | o))
def lively(name='miniature', **o): return enliven(make(name, **o)).eval()

# ---- stages -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', KINDS)
@torch.no_grad()
def test_restart_from_any_stage(name):
    net, x = lively(name), torch.randn(2, 3, 49, 64)
    whole = net(x)
    assert tuple(whole) == net.names and {k: v.shape[1] for k, v in whole.items()} == net.channels()
    for i, start in enumerate(net.names):
        rest = net(whole[start], start=start)
        assert tuple(rest) == net.names[i:] and all(torch.equal(rest[n], whole[n]) for n in rest)
        assert tuple(net(x, stop=start)) == net.names[:i + 1]
        assert tuple(net(whole[start], start=start, stop=start)) == (start,)
    doubled = net(x, after=lambda n, t: 2*t if n == 'stage1' else t)
    assert torch.equal(doubled['stem'], whole['stem']) and torch.equal(doubled['stage1'], 2*whole['stage1'])
    assert torch.equal(doubled['stage2'], net(2*whole['stage1'], start='stage1')['stage2'])

@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'mobilenetv2_100'])
@torch.no_grad()
def test_stages_are_timm_s_own(name):
    last = 'stage5' if name == 'mobilenetv2_100' else 'stage4'
    net, x = lively(name, last_stage=last, last_relu=True, output_stride=32), torch.randn(1, 3, 64, 64)
    extra = dict(num_classes=1001, pad_type='same') if name == 'mobilenetv2_100' else {}
    with_features = timm.create_model(name, features_only=True, output_stride=32, **extra).eval()
    own = timm_names(net)
    with_features.load_state_dict({k: own[k] for k in with_features.state_dict()})
    for got, want in zip([net(x)[s] for s in net.names[-3:]], with_features(x)[-3:]): assert torch.allclose(got, want, atol=1e-5)

def timm_names(net):
    "State with the stages' names taken off, as timm has it (a block number is one word here)."
    strip = {k.split('.', 2)[2]: v for k, v in net.state_dict().items()}
    return {k.replace('blocks_', 'blocks.'): v for k, v in strip.items()}

@pytest.mark.parametrize('name', ['miniature', 'resnet18', 'resnet50_deepstem'])
@torch.no_grad()
def test_last_relu(name):
    x = torch.randn(2, 3, 64, 64)
    a, b = lively(name), lively(name, last_relu=True)
    b.load_state_dict(a.state_dict())
    a, b = a(x), b(x)
    assert a['stage3'].min() < 0 and torch.equal(a['stage3'].relu(), b['stage3'])
    assert all(torch.equal(a[n], b[n]) and a[n].min() == 0 for n in ('stem', 'stage1', 'stage2'))

@pytest.mark.parametrize('name', ['miniature', 'resnet18', 'mobilenetv2_100'])
@pytest.mark.parametrize('stride,stage3,stage4', [(8, 8, 8), (16, 16, 16), (32, 16, 32)])
@torch.no_grad()
def test_output_stride(name, stride, stage3, stage4):
    # mobile nets count from stride 2 on: their stage 4 is a ResNet's stage 3
    last, at = ('stage4', 'stage3') if name != 'mobilenetv2_100' else ('stage5', 'stage4')
    out = make(name, output_stride=stride, last_stage=last).eval()(torch.zeros(1, 3, 96, 96))
    assert out[at].shape[-1] == 96//stage3 and out[last].shape[-1] == 96//stage4

def test_pixels():
    norm = lambda **o: (make(**o).mean, make(**o).std)
    imagenet, half = ((.485, .456, .406), (.229, .224, .225)), ((.5,)*3,)*2
    assert norm() == imagenet and norm(pixels='half') == half and norm(name='resnet18') == imagenet
    assert norm(name='mobilenetv2_100', pixels='imagenet') == imagenet

# ---- freezing and batch norms -----------------------------------------------------------------------------------------------
def tensors(net): return {k: v.detach().clone() for k, v in net.state_dict().items()}

@pytest.mark.parametrize('freeze', ['none', 'stem+stage1', 'stage2'])
@pytest.mark.parametrize('bn', ['frozen', 'eval', 'train'])
def test_one_step_moves_what_trains_and_nothing_else(freeze, bn):
    seg = segmenter('ssp', freeze=freeze, bn=bn)
    net, before = seg.backbone, tensors(seg.backbone)
    opt = torch.optim.SGD([p for p in seg.parameters() if p.requires_grad], lr=.1, momentum=.9, weight_decay=.01)
    seg.train()
    for _ in range(2):
        opt.zero_grad()
        sum(seg.loss(episode(2)).values()).backward()
        opt.step()
    frozen = () if freeze == 'none' else tuple(freeze.split('+'))
    norms = {f'{n}.' for n, m in net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    for key, now in net.state_dict().items():
        stage, last = key.split('.')[1], key.split('.')[-1]
        norm = any(key.startswith(n) for n in norms)
        if stage in frozen: moves = False
        elif last in ('running_mean', 'running_var', 'num_batches_tracked'): moves = bn == 'train'
        elif norm: moves = bn != 'frozen'
        else: moves = True
        assert torch.equal(now, before[key]) != moves, key

def test_modes_survive_train_and_eval():
    net = backbone(freeze='stem')
    for mode in (True, False, True):
        net.train(mode)
        assert not any(m.training for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert not net.stages['stem'].training and net.stages['stage1'].training == mode
    before = tensors(net)
    assert net.channels() == dict(stem=32, stage1=32, stage2=64, stage3=128) and net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

# ---- weights ----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def state():
    torch.manual_seed(3)
    return NETS['miniature']().state_dict()

def weights(path): return make(weights=str(path))

def same(net, state):
    own = timm_names(net)
    return all(torch.equal(own[k], state[k]) for k in own)

@pytest.mark.parametrize('wrap', ['plain', 'state_dict', 'model', 'module', 'both'])
def test_torch_files(tmp_path, state, wrap):
    named = {f'module.{k}': v for k, v in state.items()} if wrap in ('module', 'both') else state
    torch.save({'epoch': 3, 'state_dict': named} if wrap in ('state_dict', 'both') else {'model': named} if wrap == 'model' else named, tmp_path/'w.pth')
    assert same(weights(tmp_path/'w.pth'), state) and not same(make(), state)

def test_safetensors(tmp_path, state):
    save_file(state, tmp_path/'w.safetensors')
    assert same(weights(tmp_path/'w.safetensors'), state)

def test_later_stages_and_classifier_may_be_missing(tmp_path, state):
    torch.save({k: v for k, v in state.items() if not k.startswith(('layer4', 'fc'))}, tmp_path/'w.pth')
    assert same(weights(tmp_path/'w.pth'), state)
    torch.save(state | {'fc.weight': torch.zeros(7, 256), 'fc.bias': torch.zeros(7)}, tmp_path/'other_classes.pth')
    assert same(weights(tmp_path/'other_classes.pth'), state)

class Trap:
    "Unpickling this creates a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

@pytest.mark.parametrize('wrapped', ['pickle', 'torch', 'entry'])
@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_code_in_a_checkpoint_is_not_run(tmp_path, state, wrapped):
    trap, path = tmp_path/'sprung', tmp_path/'w.pth'
    pickle.loads(pickle.dumps(Trap(trap)))
    assert trap.exists(), 'the trap itself works'
    trap.rmdir()
    if wrapped == 'pickle': path.write_bytes(pickle.dumps(Trap(trap)))
    else: torch.save(Trap(trap) if wrapped == 'torch' else dict(state, extra=Trap(trap)), path)
    refused(path, 'not a checkpoint that can be read safely')
    assert not trap.exists()

def refused(path, reason):
    with pytest.raises(InputError, match=reason) as e: weights(path)
    text = str(e.value)
    assert '\n' not in text and text.startswith('weights=') and str(path) in text and len(text) < 400

def test_files_that_are_no_checkpoint(tmp_path, state):
    torch.save(state, tmp_path/'whole.pth')
    whole = (tmp_path/'whole.pth').read_bytes()
    save_file(state, tmp_path/'whole.safetensors')
    half = (tmp_path/'whole.safetensors').read_bytes()[:5000]
    bad = dict(truncated=whole[:len(whole)//2], text=b'these are not the weights you are looking for\n'*20, empty=b'')
    for name, content in bad.items():
        for suffix in ('.pth', '.safetensors'):
            (tmp_path/f'{name}{suffix}').write_bytes(content if suffix == '.pth' or name != 'truncated' else half)
            refused(tmp_path/f'{name}{suffix}', 'not a checkpoint that can be read safely')
    refused(tmp_path/'missing.pth', 'no such file')
    refused(tmp_path, 'no such file')
    for n, thing in enumerate(([torch.zeros(2)], {}, {'a': 3, 'b': torch.zeros(2)}, torch.zeros(3))):
        torch.save(thing, tmp_path/f'thing{n}.pth')
        refused(tmp_path/f'thing{n}.pth', 'expected a dictionary of tensors')

def test_a_checkpoint_of_another_architecture_is_named(tmp_path, state):
    torch.save(NETS['resnet50_deepstem']().state_dict(), tmp_path/'r50.pth')
    refused(tmp_path/'r50.pth', r"'conv1.0.weight' has shape \(64, 3, 3, 3\), expected \(16, 3, 3, 3\)")
    torch.save({k: v for k, v in state.items() if k != 'layer2.0.bn1.running_var'}, tmp_path/'less.pth')
    refused(tmp_path/'less.pth', r"no tensor 'layer2.0.bn1.running_var' of shape \(64,\)")
    torch.save(state | {'layer2.5.conv1.weight': torch.zeros(1)}, tmp_path/'more.pth')
    refused(tmp_path/'more.pth', "unknown tensor 'layer2.5.conv1.weight'")

def test_a_refused_file_leaves_no_half_loaded_net(tmp_path, state):
    torch.save({k: v for k, v in state.items() if k != 'layer3.1.conv2.weight'}, tmp_path/'less.pth')
    with pytest.raises(InputError): weights(tmp_path/'less.pth')
    assert read_state(tmp_path/'less.pth').keys() == state.keys() - {'layer3.1.conv2.weight'}

@pytest.mark.parametrize('o,reason', [
    (dict(name='resnet18x'), "unknown backbone 'resnet18x': did you mean"), (dict(name='minature'), 'miniature'),
    (dict(name='vgg11'), 'ResNet, MobileNet or EfficientNet'), (dict(name='mixer_s32_224'), 'MlpMixer has no stages this version can cut'), (dict(name='resnet18:3'), "unknown backbone 'resnet18:3'"), (dict(last_stage='stage7'), "unknown last_stage 'stage7'"),
    (dict(freeze='stem+stage9'), "unknown stage in freeze 'stage9'"), (dict(freeze='stage4'), "unknown stage in freeze 'stage4'"),
    (dict(weights='hub'), "timm has none for backbone 'miniature'"), (dict(output_stride=4), 'output_stride=4: choose from 8, 16, 32')])
def test_impossible_backbones(o, reason):
    with pytest.raises(InputError, match=reason) as e: make(**o)
    assert '\n' not in str(e.value)

# ---- the published checkpoint's names ---------------------------------------------------------------------------------------
def test_ssp_s_key_list_maps_one_to_one(parity):
    keys = json.loads((parity/'ssp_full.keys.json').read_text())
    state = official_state(parity, 'ssp_full')
    assert state.keys() == keys.keys()
    seg = from_official('ssp', state)
    ours = {k: v for k, v in seg.state_dict().items()}
    assert len(ours) == len(keys)
    for theirs, value in state.items():
        head, _, rest = theirs.partition('.')
        if head == 'layer0': mine = 'backbone.stages.stem.' + ('conv1' if rest[0] == '0' else 'bn1') + rest[1:]
        else: mine = f'backbone.stages.stage{head[-1]}.{theirs}'
        assert torch.equal(ours.pop(mine), value), theirs
    assert not ours
    for bad, reason in ((collections.ChainMap({'extra.weight': torch.zeros(1)}, state), "unknown tensor 'extra.weight'"),
                        ({k: v for k, v in state.items() if k != 'layer3.5.conv3.weight'}, "nothing for 'backbone.stages.stage3.layer3.5.conv3.weight'"),
                        (state | {'layer1.0.conv1.weight': torch.zeros(1, 2)}, r"'layer1.0.conv1.weight' has shape \(1, 2\), expected \(64, 128, 1, 1\)")):
        with pytest.raises(InputError, match=reason): from_official('ssp', dict(bad))
