"Weights that exist: official checkpoints by their own names, run folders under other recipes, and an evaluation that trains nothing."
import collections, os, re
import pytest, torch
from cdfss.basics import InputError
from cdfss.engine.runs import Run
from cdfss.engine.train import EvaluateSettings, TrainSettings, evaluation, load_segmenter, open_run, prepare, segmenter_of, train
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone
from cdfss.models import importers
from cdfss.models.importers import from_official, importers_of, load_official
from episodes import episode, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

def official_names(seg) -> dict[str, torch.Tensor]:
    "A segmenter's tensors under the names of the published code, with what it does not use."
    def theirs(k):
        k = re.sub(r'^backbone\.stages\.stem\.(conv1|bn1)', r'backbone.\1', re.sub(r'^backbone\.stages\.stage\d\.layer', 'backbone.layer', k))
        k = re.sub(r'^backbone\.stages\.\w+\.features_', 'backbone.features.', k)
        for i, n in enumerate((4, 3, 2)): k = k.replace(f'learner.squeeze.{i}.', f'hpn_learner.encoder_layer{n}.')
        for i, n in enumerate(('4to3', '3to2')): k = k.replace(f'learner.mix.{i}.', f'hpn_learner.encoder_layer{n}.')
        return re.sub(r'^anchors\.(\d)', lambda m: f'reference_layer{int(m[1]) + 1}.weight', k.replace('learner.decoder', 'hpn_learner.decoder') if k.startswith('learner') else k)
    state = {theirs(k): v for k, v in seg.state_dict().items()}
    if any(k.startswith('reference') for k in state): state |= {f'reference_layer{i}.bias': torch.zeros(2) for i in (1, 2, 3)}
    return state | {'backbone.fc.weight': torch.zeros(1000, 8), 'backbone.fc.bias': torch.zeros(1000)}

def made(method, backbone, seed=0):
    torch.manual_seed(seed)
    return build(method, create_backbone(BackboneOptions(backbone=backbone, weights='none', last_stage='last', output_stride=32, freeze='all'))).eval()

@pytest.mark.parametrize('method,backbone', [('hsnet', 'resnet50'), ('hsnet', 'vgg16'), ('patnet', 'resnet101'), ('patnet', 'vgg16')])
def test_official_names_there_and_back(method, backbone):
    seg = made(method, backbone)
    state = official_names(seg)
    if backbone == 'vgg16' and method == 'patnet': state['reference_layer3.weight'] = torch.zeros(2, 512)
    back = from_official(method, {f'module.{k}': v for k, v in state.items()})
    own = seg.state_dict()
    assert back.backbone.name == backbone and back.state_dict().keys() == own.keys() and all(torch.equal(v, own[k]) for k, v in back.state_dict().items())

def test_other_architectures_are_refused():
    state = official_names(made('hsnet', 'resnet50'))
    wrong = {'backbone.layer3.0.conv1.weight': torch.zeros(3, 3)}
    for method, bad, reason in (
            ('hsnet', collections.ChainMap(wrong, state), r"'backbone.layer3.0.conv1.weight' has shape \(3, 3\), expected \(256, 512, 1, 1\)"),
            ('hsnet', {k: v for k, v in state.items() if k != 'hpn_learner.decoder2.2.bias'}, "nothing for 'learner.decoder2.2.bias'"),
            ('hsnet', {k: v for k, v in state.items() if 'layer3.5' not in k}, r'layer3 has 5 blocks, expected 6 \(ResNet-50\) or 23 \(ResNet-101\)'),
            ('hsnet', collections.ChainMap({'reference_layer1.weight': torch.zeros(2, 512)}, state), "unknown tensor 'reference_layer1.weight'"),
            ('patnet', state, "nothing for 'anchors.0'"), ('ssp', state, "")):
        with pytest.raises(InputError, match=reason) as e: from_official(method, dict(bad))
        assert '\n' not in str(e.value)

class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

def test_a_pickle_that_is_no_tensor_file_is_not_opened(tmp_path):
    torch.save({'state_dict': {'a': torch.zeros(1)}, 'args': Trap(tmp_path/'sprung')}, tmp_path/'hsnet.pt')
    for act in (lambda: load_official('hsnet', tmp_path/'hsnet.pt'), lambda: evaluation(EvaluateSettings(method='hsnet', checkpoint=str(tmp_path/'hsnet.pt')))):
        with pytest.raises(InputError, match='not a checkpoint that can be read safely') as e: act()
        assert '\n' not in str(e.value) and not (tmp_path/'sprung').exists()

# ---- through a run --------------------------------------------------------------------------------------------------------------
def settings(root, runs, **kw):
    return dict(dict(data_root=str(root), size=48, targets='isic', shots='1', test_episodes=3, track_episodes=3, samples=0, runs=str(runs)) | kw)

@pytest.fixture(scope='module')
def run(miniature, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('CDFSS_CACHE', str(tmp_path_factory.mktemp('cache')))
        where = settings(miniature, tmp_path_factory.mktemp('runs'), method='hsnet', backbone='miniature', weights='none', epochs=1, fit_episodes=8)
        yield train(TrainSettings(**where), say=lambda line: None), where['runs']

def test_a_run_of_hsnet_trains_its_learner_alone(run):
    start, now = segmenter_of(evaluation_of(run)), load_segmenter(run[0])
    fresh = made('hsnet', 'miniature')
    frozen = [k for k in fresh.state_dict() if k.startswith('backbone')]
    assert all(torch.equal(now.state_dict()[k], start.state_dict()[k]) for k in now.state_dict()), 'a checkpoint starts where the run ended'
    assert run[0].params['optimizer'] == 'adam' and run[0].params['freeze'] == 'all' and frozen
    assert {p for p in now.parameters() if p.requires_grad} == set(now.learner.parameters())

def evaluation_of(run, runs=None, **kw):
    return evaluation(EvaluateSettings(**settings(run[0].params['data_root'], runs or run[1], **dict(method='hsnet', checkpoint=str(run[0].path)) | kw)))

def test_a_run_is_evaluated_again_with_other_modules(run, miniature):
    same = train(evaluation_of(run), say=lambda line: None)
    frames = [r.episodes[['query', 'tp', 'fp', 'fn', 'tn']] for r in (run[0], same)]
    assert frames[0].equals(frames[1]) and same.path != run[0].path and same.metrics['epoch'] == 0
    lines = []
    assert train(evaluation_of(run), say=lines.append).path == same.path and 'nothing is computed' in lines[-1]
    lfm = segmenter_of(evaluation_of(run, method='lfm'))
    trained = load_segmenter(run[0]).state_dict()
    assert {m.__class__.__name__ for m in lfm.extras} == {'APMM', 'ACPA'} and all(torch.equal(v, trained[k]) for k, v in lfm.state_dict().items() if not k.startswith('extras'))
    assert train(evaluation_of(run, method='lfm', adapt_steps=1, test_episodes=2), say=lambda line: None).complete
    file = evaluation_of(run, checkpoint=str(run[0].path/'weights.safetensors'))
    assert train(file, say=lines.append).path == same.path, 'the file of a run is the run'

def test_an_official_checkpoint_is_evaluated(run, tmp_path, monkeypatch):
    seg = made('hsnet', 'resnet50')
    torch.save(official_names(seg), tmp_path/'official.pt')
    s = evaluation_of(run, checkpoint=str(tmp_path/'official.pt'), runs=tmp_path/'runs')
    assert (s.backbone, s.output_stride, s.last_stage, s.epochs) == ('resnet50', 32, 'last', 0)
    e = episode(1, size=64)
    seg.backbone.quicken()
    with torch.no_grad(): assert torch.equal(segmenter_of(s).eval()(e).scores, seg(e).scores)
    done = train(s, say=lambda line: None)
    assert done.complete and done.metrics['epoch'] == 0 and load_segmenter(done).backbone.name == 'resnet50'
    torch.save(official_names(made('hsnet', 'resnet50', 1)), tmp_path/'official.pt')
    other = evaluation_of(run, checkpoint=str(tmp_path/'official.pt'), runs=tmp_path/'runs')
    assert open_run(other, prepare(other)).path != done.path, 'its content counts, not its name'

def test_checkpoints_that_can_not_be_used(run, tmp_path):
    for kw, reason in ((dict(checkpoint=None), 'checkpoint=None: give the file'), (dict(checkpoint=str(tmp_path)), 'no weights.json'), (dict(checkpoint='nofile.pt'), 'no such file'),
                       (dict(method='ssp'), 'it is a run of hsnet, not of ssp'), (dict(method='prototype', checkpoint=__file__), 'not of prototype; give a run folder')):
        with pytest.raises(InputError, match=reason) as e: evaluation_of(run, **kw)
        assert '\n' not in str(e.value)

def test_a_method_s_everyday_name_finds_its_importers(monkeypatch):
    "An alias stands for its modules on any base; the file decides, and the error is that of the base it is of."
    assert importers_of('pahnet') == ['hdmnet+pfe+asc', 'sccan+pfe+asc'] and [importers_of(n) for n in ('ssp', 'ifa', 'hsnet', 'patnet', 'sccan', 'hdmnet', 'hsl')] == [[n] for n in ('ssp', 'ifa', 'hsnet', 'patnet', 'sccan', 'hdmnet', 'hsl')]
    def imported(name, state):
        if name.split('+')[0] not in state: raise InputError(f"official {name} checkpoint: unknown tensor 'x'")
        if 'short' in state: raise InputError(f"official {name} checkpoint: nothing for 'y'")
        tried.append(name)
        return segmenter('prototype')
    tried, mark = [], torch.zeros(1)
    monkeypatch.setattr(importers, '_imported', imported)
    for host in ('hdmnet', 'sccan'): from_official('pahnet', {host: mark})
    assert tried == ['hdmnet+pfe+asc', 'sccan+pfe+asc']
    for state, reason in (({'sccan': mark, 'short': mark}, "sccan.*nothing for 'y'"), ({}, "hdmnet.*unknown tensor 'x'")):
        with pytest.raises(InputError, match=reason): from_official('pahnet', state)

def test_names_without_a_published_checkpoint():
    for name, reason in (('lfm', 'none is known of lfm'), ('hsnett', "unknown official checkpoint 'hsnett'")):
        with pytest.raises(InputError, match=reason): from_official(name, {})
